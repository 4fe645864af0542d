"""The shipped YAML files: every key commented, every option composes with every objective."""

import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hydra.types import RunMode

from uft.config.compose import examine, require
from uft.config.files import Request, make_loader
from uft.config.frozen import frozen, plain, typed
from uft.config.messages import conf_dir, groups, headline
from uft.config.stages import completed

FILES = sorted(conf_dir().rglob("*.yaml"))
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
    "model=custom": ("model.path=some/model",),
}
ALONE = (
    "objective",
    "experiment",
)  # groups that are not turned through: the first is crossed with all, the other composes
MOST = max(len(options) for group, options in GROUPS.items() if group not in ALONE)


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(conf_dir()).as_posix())
def test_every_key_has_a_comment(file):
    assert keys_without_comment(file) == []


def test_the_comment_check_can_fail(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: 1 # one\n# two\nb: 2\nc: 3\nd:\n  e: 4\n")
    assert keys_without_comment(file) == ["x.yaml:4 c", "x.yaml:6 e"]


def composable(group: str) -> list[str]:
    """Its options, but for those whose launcher is not installed."""
    absent = {name for name, module in LAUNCHERS.items() if find_spec(f"hydra_plugins.{module}") is None}
    return [name for name in GROUPS[group] if group != "hardware" or name not in absent]


def rotation(number: int) -> list[str]:
    """One option of every group; over all numbers, each option."""
    others = {group: composable(group) for group in GROUPS if group not in ALONE}
    choices = [f"{group}={options[number % len(options)]}" for group, options in others.items()]
    return [*choices, *(line for choice in choices for line in NEEDS.get(choice, ()))]


def crossed():
    """Every objective with every rotation; the fast ones have each of both in them."""
    for place, objective in enumerate(OBJECTIVES):
        for number in range(MOST):
            fast = (place + number) % MOST in (0, 1)
            yield pytest.param(objective, number, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("objective", "number"), crossed())
def test_every_option_composes_with_every_objective(objective, number):
    words = (f"objective={objective}", *rotation(number))
    examined = examine(Request(words))
    assert examined.problems == []
    chosen = {f"{group}={option}" for group, option in examined.choices.items()}
    assert chosen >= {word for word in words if "." not in word.partition("=")[0]}


@pytest.mark.parametrize("number", range(MOST))
def test_what_is_checked_is_what_hydra_composes(number):
    request = Request((f"objective={OBJECTIVES[number % len(OBJECTIVES)]}", *rotation(number)))
    settings = require(request).settings
    cfg = make_loader(request).load_configuration("config", list(request.overrides), RunMode.RUN)
    assert completed(plain(cfg)) == settings
    assert plain(asdict(typed(yaml.safe_load(frozen(settings))))) == settings


@pytest.mark.slow
def test_every_experiment_composes():
    for experiment in GROUPS.get("experiment", {}):
        assert require(Request((f"experiment={experiment}",))).settings


def test_every_option_says_what_it_is():
    assert [file for options in GROUPS.values() for file in options.values() if not headline(file)] == []


def written(file):
    """What a file says itself, without what it builds on or places."""
    content = yaml.safe_load(file.read_text())
    content.pop("defaults", None)
    return content


def test_objectives_have_the_keys_their_files_name_and_no_others():
    from uft.config.schema import parameters

    for name, file in GROUPS["objective"].items():
        content = written(file)
        assert content.keys() <= parameters()[content["method"]].keys(), name
        assert content.keys() >= {"name", "method"}, name
        composed = examine(Request((f"objective={name}",))).settings["objective"]
        placed = set(composed) - content.keys()
        assert placed == ({"demonstration", "preference", "binary", "scored", "negatives"} if placed else set()), name
        assert all(composed[kind]["name"] in OBJECTIVES for kind in placed)


def test_a_key_of_the_class_that_the_file_does_not_name_is_none_of_the_objective():
    """DPO is computed by a class that knows `lam`; objective=dpo does not have it."""
    [problem] = examine(Request(("objective=dpo", "objective.lam=5"))).problems
    assert "lam" in problem.what
    assert any("dpop" in line for line in problem.advice)
    assert examine(Request(("objective=dpop", "objective.lam=5"))).problems == []


def test_an_objective_of_per_kind_is_exchanged_with_the_keys_it_has():
    words = ("objective=per_kind", "objective@objective.preference=simpo", "objective.preference.gamma=0.5")
    examined = examine(Request(words))
    assert examined.problems == []
    found = examined.settings["objective"]["preference"]
    assert (found["name"], found["gamma"]) == ("simpo", 0.5)
    assert set(found) == written(GROUPS["objective"]["simpo"]).keys()
    cfg = make_loader(Request()).load_configuration("config", list(words), RunMode.RUN)
    assert plain(cfg)["objective"] == examined.settings["objective"]
    [problem] = examine(Request((*words[:2], "objective.preference.lam=1"))).problems
    assert "lam" in problem.what
