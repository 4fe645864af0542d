"""Frozen configurations, their differences, and the way back to dataclasses."""

from itertools import pairwise

import pytest
import yaml

from uft.config.compose import change, compose
from uft.config.frozen import difference, frozen, load_config, may_change, to_builtins
from uft.errors import UftError
from uft.report.runs import load
from uft.runs import Run


def test_frozen_is_resolved_and_reads_back(tmp_path):
    cfg = compose(["objective=uft", "seed=3", "optim.lr=3e-5", "+data.sources.pairs.columns.prompt=q"])
    file = tmp_path / "config.yaml"
    file.write_text(frozen(cfg))
    assert "${" not in file.read_text()
    config = load_config(file)
    assert (config.seed, config.seeds.data, config.optim.lr) == (3, 3, 3e-5)
    assert config.objective["method"] == "uft"
    assert type(config.objective) is dict
    assert config.data.sources["pairs"].columns == {"prompt": "q"}
    assert config.data.sources["pairs"].path == "builtin:playground/pairs"
    assert yaml.safe_load(file.read_text()) == to_builtins(cfg)


def test_a_config_of_another_version_is_told_of(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: 3, from_the_future: 1}\n")
    with pytest.raises(UftError, match="cannot be read by this version"):
        load_config(file)


CHANGED = {
    "length_normalize:": ("lenoth_normalize:", "cannot be read by this version"),
    "method: kto": ("method: ktp", "no such method"),
    "method: per_kind": ("metiod: per_kind", "no such method"),
    "method: nll": ("method: gone", "a package that is not installed here"),
    "reduction: sequence": ("reduction: seqqence", "reduction"),
    "objective:": ("objectivf:", "cannot be read by this version"),
    "batch_size: 32": ("batch_size: 0", r"train\.batch_size"),
}


def test_a_config_that_no_request_could_have_made_is_refused(tmp_path):
    """Here, with the file: not by whatever meets the value first."""
    file, text = tmp_path / "config.yaml", frozen(compose(["objective=per_kind"]))
    for old, (new, told) in CHANGED.items():
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(UftError, match=told) as refused:
            load_config(file)
        assert "config.yaml" in str(refused.value)


def test_millions_of_values_are_refused_at_once(tmp_path):
    file, names = tmp_path / "config.yaml", "abcdefgh"
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names)]
    aliases, large = "\n".join(["a: &a [1, 1]", *lines]), "seed: 0\na: [" + "0, " * 1_000_000 + "]"
    for text, why in {aliases: "stands for", "a: &a [*a]": "stands for", large: "larger"}.items():
        file.write_text(text)
        with pytest.raises(UftError, match=r"config\.yaml .*cannot be read"):
            load_config(file)
        with pytest.raises(UftError, match=r"config\.yaml .*is damaged"):
            Run(tmp_path).config()
        assert why in str(load(tmp_path).error)


def test_difference():
    old = {"a": 1, "b": {"c": [1], "d": 2}, "e": {}}
    new = {"a": 1, "b": {"c": [2], "f": 3}}
    assert difference(old, new) == [("b.c", [1], [2]), ("b.f", "(absent)", 3), ("b.d", 2, "(absent)")]
    assert difference(old, old) == []


def test_keys_that_change_no_result_are_free():
    for key in ("tracking.mode", "run.name", "sweep.name", "hardware.threads", "train.log_every"):
        assert may_change(key)
    for key in ("seed", "optim.lr", "train.steps", "train.batch_size", "model.dtype"):
        assert not may_change(key)


def test_changing_a_frozen_config():
    settings = to_builtins(compose(["objective=dpo"]))
    new = to_builtins(change(settings, ["tracking=offline", "objective.beta=0.3", "data=pairs"]))
    assert new["tracking"]["mode"] == "offline"
    assert new["objective"] == settings["objective"] | {"beta": 0.3}
    assert new["data"] == to_builtins(compose(["data=pairs"]))["data"] != settings["data"]
    assert to_builtins(change(settings, [])) == settings


def test_mistakes_in_a_change_are_found_together():
    with pytest.raises(UftError) as caught:
        change(to_builtins(compose()), ["objective.bta=1", "train.batch_size=0", "experiment=poft"])
    assert {p.what for p in caught.value.problems} == {"objective.bta=1", "train.batch_size=0", "experiment=poft"}
