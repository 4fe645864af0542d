"""`uft config`'s text."""

import yaml

from uft.config.compose import composed
from uft.config.freeze import plain
from uft.config.loader import Request
from uft.config.show import annotated


def test_annotated_is_the_config_as_yaml():
    cfg, examined = composed(Request(("seed=4", "+data.sources.pairs.columns={prompt: the question}")))
    text = annotated(cfg, examined.origins)
    assert yaml.safe_load(text) == plain(cfg)
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["seed"].endswith("# command line")
    assert "# conf/optim/adamw.yaml:3, ${model.lr}" in text
    assert lines["save_model"].endswith("# default")


def test_comments_stand_in_a_column():
    cfg, examined = composed(Request())
    columns = [line.index("  # ") for line in annotated(cfg, examined.origins).splitlines() if "  # " in line]
    assert max(columns.count(column) for column in set(columns)) > 0.9 * len(columns)
