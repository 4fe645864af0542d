"""The shipped YAML files: every key commented, every option composes with every objective."""

import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hydra import compose

from uft.config.compose import examine, require
from uft.config.files import Request, application
from uft.config.frozen import frozen, to_builtins, to_config
from uft.config.messages import conf_dir, groups, headline
from uft.config.parameters import parameters
from uft.config.schema import fields_of
from uft.config.stages import completed

GROUPS = groups([conf_dir()])
LAUNCHERS = {  # an option that cannot be composed without the launcher of an extra
    "local_pool": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "slurm8x4": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
OBJECTIVES = list(GROUPS["objective"])
NEEDS = {  # what an option leaves for the user to say
    "data=files": ("+data.sources.mine.path=rows.jsonl",),
    "reward=likelihood": ("reward.path=some/model",),
    "reward=classifier": ("reward.path=some/model",),
    "model=custom": ("model.path=some/model", "model.name=mine"),
    **{f"optim={name}": ("hardware.sharding=none",) for name in ("adafactor", "adamw8bit", "muon")},
    "objective=distill": ("teacher.path=some/model",),
}
OWN = {  # completions that an objective learns from, of a model that is not sharded and of scored or plain rows
    objective: ("rollout.completions=4", "hardware.sharding=none")
    for objective, file in GROUPS["objective"].items()
    if "method: policy_gradient" in file.read_text() or "method: srft" in file.read_text()
}
ALONE = ("objective", "experiment")  # the first is crossed with all other groups, the second composes alone
KINDS = {"demonstration", "preference", "binary", "scored", "negatives"}
MOST = max(len(options) for group, options in GROUPS.items() if group not in ALONE)


@pytest.fixture(autouse=True)
def every_extra(monkeypatch):
    """Packages of choices that are extras (TensorBoard, Trackio) count as installed: files are looked at here."""
    monkeypatch.setattr("uft.config.rules.find_spec", lambda name: True)


def keys_without_comment(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    found = []

    def walk(node):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                row = key.start_mark.line
                if not re.search(r"\s#\s*\S", lines[row]) and not (row and lines[row - 1].lstrip().startswith("#")):
                    heading = isinstance(value, yaml.MappingNode) and value.value and not value.flow_style
                    if not (heading or key.value == "defaults"):
                        found.append(f"{file.name}:{row + 1} {key.value}")
                if value.start_mark.line > row or isinstance(value, yaml.MappingNode):
                    walk(value)

    walk(yaml.compose("\n".join(lines)))
    return found


def test_every_key_has_a_comment(tmp_path):
    assert [found for file in sorted(conf_dir().rglob("*.yaml")) for found in keys_without_comment(file)] == []
    file = tmp_path / "x.yaml"  # and the check can fail
    file.write_text("a: 1 # one\n# two\nb: 2\nc: 3\nd:\n  e: 4\n")
    assert keys_without_comment(file) == ["x.yaml:4 c", "x.yaml:6 e"]


def rotation(number: int) -> list[str]:
    """One option of every group, but for those whose launcher is not installed; over all numbers, each option."""
    absent = {name for name, module in LAUNCHERS.items() if find_spec(f"hydra_plugins.{module}") is None}
    choices = []
    for group, options in GROUPS.items():
        names = [name for name in options if group != "hardware" or name not in absent]
        names = [name for name in names if "override /experiment" not in options[name].read_text()]  # likewise alone
        choices += [f"{group}={names[number % len(names)]}"] if group not in ALONE else []
    return [*choices, *(line for choice in choices for line in NEEDS.get(choice, ()))]


def written(file):
    """What a file says itself, without what it builds on or places."""
    content = yaml.safe_load(file.read_text())
    content.pop("defaults", None)
    return content


@pytest.mark.parametrize("shift", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, MOST))])
def test_every_option_composes_with_every_objective(shift):
    """The fast part has an objective of each method, with other options each. An objective has the keys that its file
    names, and those it places."""
    ours = {written(file)["method"]: name for name, file in GROUPS["objective"].items()}
    tried = OBJECTIVES if shift else sorted(ours.values())
    for place, objective in enumerate(tried):
        own = f"objective={objective}"
        words = (own, *NEEDS.get(own, ()), *rotation(place + shift), *OWN.get(objective, ()))
        examined = examine(Request(words))
        assert examined.problems == [], words
        chosen = {f"{group}={option}" for group, option in examined.choices.items()}
        assert chosen >= {word for word in words if "." not in word.partition("=")[0]}
        content = written(GROUPS["objective"][objective])
        assert content.keys() <= fields_of(parameters()[content["method"]]).keys(), objective
        assert content.keys() >= {"name", "method"}, objective
        composed = examined.settings["objective"]
        placed = set(composed) - content.keys()
        assert placed == (KINDS if placed else set()), objective
        assert all(composed[kind]["name"] in OBJECTIVES for kind in placed)


@pytest.mark.slow
def test_what_is_checked_is_what_hydra_composes():
    for number in (0, 3):
        own = [word for word in rotation(number) if not word.startswith("reward")]  # it is laid on the sources besides
        own = [*own, *OWN.get(OBJECTIVES[number], ())]
        words = [f"objective={OBJECTIVES[number]}", *own, "seed=3", "optim.lr=1e-4", "run.name=2026"]
        request = Request(tuple(words))
        settings = require(request).settings
        with application(request):
            cfg = compose("config", words)
        assert completed(to_builtins(cfg)) == settings
        assert to_builtins(asdict(to_config(yaml.safe_load(frozen(settings))))) == settings


@pytest.mark.slow
def test_every_experiment_composes():
    for experiment in GROUPS.get("experiment", {}):
        assert require(Request((f"experiment={experiment}",))).settings


def test_every_option_says_what_it_is():
    assert [file for options in GROUPS.values() for file in options.values() if not headline(file)] == []


def test_a_key_of_the_class_that_the_file_does_not_name_is_none_of_the_objective():
    """DPO is computed by a class that knows `lam`; objective=dpo does not have it."""
    [problem] = examine(Request(("objective=dpo", "objective.lam=5"))).problems
    assert "lam" in problem.what
    assert any("dpop" in line for line in problem.advice)
    assert examine(Request(("objective=dpop", "objective.lam=5"))).problems == []


@pytest.mark.slow
def test_an_objective_of_per_kind_is_exchanged_with_the_keys_it_has():
    words = ("objective=per_kind", "objective@objective.preference=simpo", "objective.preference.gamma=0.5")
    examined = examine(Request(words))
    assert examined.problems == []
    found = examined.settings["objective"]["preference"]
    assert (found["name"], found["gamma"]) == ("simpo", 0.5)
    assert set(found) == written(GROUPS["objective"]["simpo"]).keys()
    with application(Request()):
        assert to_builtins(compose("config", list(words)))["objective"] == examined.settings["objective"]
    [problem] = examine(Request((*words[:2], "objective.preference.lam=1"))).problems
    assert "lam" in problem.what


def test_the_method_of_an_objective_comes_with_its_file():
    [problem] = examine(Request(("objective.method=kto",))).problems
    assert problem.why == "comes with the objective's file"
