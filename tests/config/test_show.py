"""`uft config`'s text."""

import yaml

from uft.config.compose import require
from uft.config.files import Request
from uft.config.frozen import with_origins


def test_annotated_is_the_config_as_yaml():
    examined = require(Request(("seed=4", "+data.sources.pairs.columns={prompt: the question}")))
    text = with_origins(examined.settings, examined.origins, examined.references)
    assert yaml.safe_load(text) == examined.settings
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert text.splitlines()[0].endswith("# command line"), "seed"
    assert "# conf/optim/adamw.yaml:3, ${model.lr}" in text
    assert lines["save_model"].endswith("# default")
    columns = [line.index("  # ") for line in text.splitlines() if "  # " in line]
    assert max(columns.count(column) for column in set(columns)) > 0.9 * len(columns), "comments stand in a column"
