"""Rules about stages: their names, what they need, what they may set, and which rows they hand on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uft.config.checks import walk
from uft.config.loader import Setting
from uft.config.stages import MADE_BY, MEANING, STAGES, made, maker
from uft.config.suggest import hint, nearest, written
from uft.config.tree import Tree
from uft.errors import Problem

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
SAME = ("hardware", "tracking", "run", "sweep", STAGES)
MODEL = ("path", "name", "revision", "trust_remote_code")


def fixed(setting: Setting) -> Problem | None:
    """A key that no stage can have for itself, or None."""
    if setting.path[0] in SAME:
        return Problem(setting.text, f"{setting.path[0]} is the same in all stages", setting.where)
    if setting.path[0] == "model" and setting.path[1:2] and setting.path[1] in MODEL:
        return Problem(setting.text, "a stage starts from the model that the stage before it left", setting.where)
    return None


def rules(outline: Tree, trees: Mapping[str, Tree]) -> Iterator[Problem]:
    """Everything that is wrong with the stages together, and with what each of them is."""
    stages: Mapping[str, DictConfig] = outline.root[STAGES]
    for finding in walk(outline.root[STAGES], f"{STAGES}.", {}):
        what = f"{finding.key}={written(outline.value(finding.key))}"
        yield Problem(what, finding.why, outline.origins.get(finding.key, ""), finding.advice)
    if stages and not any(stage.do == "fit" for stage in stages.values()):
        yield Problem(STAGES, "none of them trains anything", advice=("one of them must be  do: fit",))
    for number, (name, stage) in enumerate(stages.items()):
        key = f"{STAGES}.{name}"
        where = next((place for own, place in outline.origins.items() if own.startswith(f"{key}.")), "")
        if not NAME.fullmatch(name):
            yield Problem(key, "names a folder: letters, digits, - and _, a letter first", where)
        yield from kind(key, stage, where)
        if name in trees:
            earlier = {n: s.do for n, s in list(stages.items())[:number]}
            yield from handed_on(name, trees[name], earlier)
            yield from models(key, stage, where, earlier)
            if stage.reference == "initial" and trees[name].value("reference.path") is not None:
                yield Problem(f"{key}.reference=initial", "and reference.path both name the reference", where)


def kind(key: str, stage: DictConfig, where: str) -> Iterator[Problem]:
    """A stage that lacks what it needs, or has what it cannot use."""
    if stage.do == "annotate" and stage.column is None:
        yield Problem(key, "has no column to write", where, (f"{key}.column=baseline_logp",))
    idle: dict[str, Any] = {"column": None, "models": [], "reference": "start"}
    for name, nothing in idle.items():
        if stage[name] != nothing and stage.do in MEANING and name not in MEANING[stage.do]:
            yield Problem(f"{key}.{name}", f"has no meaning where do={stage.do}", where)


def handed_on(name: str, tree: Tree, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """Sources whose rows an earlier stage makes."""
    sources: Any = OmegaConf.to_container(tree.root.data.sources)
    makers = [stage for stage, do in earlier.items() if do != "fit"]
    for source, node in sources.items():
        key = f"data.sources.{source}"
        for leaf in ("path", "eval_path"):
            path, where = node.get(leaf), tree.origins.get(f"{key}.{leaf}", "")
            if not made(path):
                continue
            what = f"{key}.{leaf}={path}"
            if leaf == "eval_path":
                yield Problem(what, "rows to measure on must be there before the first step", where)
            elif maker(path) in earlier and maker(path) not in makers:
                yield Problem(what, f"stage {maker(path)} trains and leaves no rows", where)
            elif maker(path) not in makers:
                near = nearest(maker(path), makers)
                advice = hint(near and f"{MADE_BY}{near}", "stages before this one that make rows", makers)
                yield Problem(what, "no such stage before this one", where, (advice,) if advice else ())
            if leaf == "path" and (node.get("holdout") or node.get("eval_split")):
                why = "rows to measure on must be there before the first step: eval_path"
                yield Problem(f"{key}.{'holdout' if node.get('holdout') else 'eval_split'}", why, where)


def models(key: str, stage: DictConfig, where: str, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """Models of earlier stages by name."""
    trained = [name for name, do in earlier.items() if do == "fit"]
    for path in stage.models:
        if made(path) and maker(path) not in trained:
            near = nearest(maker(path), trained)
            advice = hint(near and f"{MADE_BY}{near}", "stages before this one that train", trained)
            yield Problem(f"{key}.models=[{path}]", "no such stage before this one", where, (advice,) if advice else ())
