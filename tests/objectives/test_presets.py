"""The YAML files of conf/objective: every key of the dataclass, each with a comment, within its rules."""

from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from uft.objectives import OBJECTIVES, make

FOLDER = Path(__file__).parents[2] / "conf" / "objective"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
preset = pytest.mark.parametrize("name", PRESETS)


def load(name):
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return values.pop("defaults"), values


def schema(method):
    return {f.name: f for f in fields(OBJECTIVES[method]) if not f.metadata.get("internal")}


def test_the_names_of_the_seed_papers_are_there():
    assert {"sft", "ift", "uft", "una", "dft", "dft2", "dpo"} <= set(PRESETS)


@preset
def test_keys_are_the_fields_of_the_dataclass(name):
    defaults, values = load(name)
    assert values["name"] == name
    assert defaults == [f"/schema/objective/{values['method']}@_here_", "_self_"]
    assert values.keys() == schema(values["method"]).keys()


@preset
def test_every_key_has_a_comment_and_the_file_says_what_it_is(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if line and not line.startswith(("#", " ", "defaults:"))]
    assert len(keys) == len(load(name)[1])
    assert [line for line in keys if " # " not in line] == []


@preset
def test_values_are_of_their_type_within_their_rules_and_agree(name):
    _, values = load(name)
    found = schema(values["method"])
    types = typing.get_type_hints(OBJECTIVES[values["method"]])
    for key, value in values.items():
        rules = found[key].metadata
        if value is None:
            assert type(None) in typing.get_args(types[key]), key
            continue
        kinds = typing.get_args(types[key]) if typing.get_origin(types[key]) is not dict else ()
        assert isinstance(
            value, (*(k for k in kinds if isinstance(k, type)), typing.get_origin(types[key]) or types[key])
        )
        assert value in rules.get("choices", (value,)), key
        assert not ("ge" in rules and value < rules["ge"]), key
        assert not ("gt" in rules and value <= rules["gt"]), key
        assert not ("le" in rules and value > rules["le"]), key
    objective = make(values)
    assert objective.problems() == []
    assert objective.length_convention


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_key_has_help_and_a_plain_type(method):
    hints = typing.get_type_hints(OBJECTIVES[method])
    for key, found in schema(method).items():
        assert found.metadata.get("help"), key
        assert hints[key] in (float, int, bool, str, float | None, dict[str, float]), key


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ift", {"lam": 0.2, "lam_start": None, "lam_noise": 0.0, "gamma": 0.95, "propagation": "normalized"}),
        ("ift", {"detach_weights": False, "embed_grad": False, "reduction": "sequence"}),
        ("uft", {"beta": 0.01, "loss": "mse", "pairs": "pairwise", "demonstration_score": 1.0}),
        ("una", {"beta": 0.01, "loss": "mse", "pairs": "pairwise", "length_normalize": False, "method": "uft"}),
        ("dft", {"tau": 1.0, "gamma": 0.85, "negatives": 2, "length_normalize": False, "denominator": "plain"}),
        ("dft2", {"tau": 0.3, "gamma": 0.9, "negatives": 2, "length_normalize": True, "method": "dft"}),
        ("dpo", {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "method": "pairwise"}),
        ("sft", {"reduction": "token"}),
    ],
)
def test_defaults_are_the_papers(name, values):
    found = load(name)[1]
    assert {key: found[key] for key in values} == values


@pytest.mark.parametrize("name", ["sft", "ift", "uft", "dft", "dpo"])
def test_the_plain_preset_of_a_method_repeats_its_defaults(name):
    values = load(name)[1]
    assert make(values) == make({"name": name, "method": values["method"]})


def test_needs():
    needs = {name: make(load(name)[1]).needs for name in PRESETS}
    assert {n for n, need in needs.items() if need.reference} >= {"uft", "una", "dft", "dpo"}
    assert not {"sft", "ift", "dft2"} & {n for n, need in needs.items() if need.reference}
    assert needs["ift"].guesses
