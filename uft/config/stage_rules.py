"""Rules about stages: their names, what they need, what they may set, and which rows they hand on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uft.config.checks import walk
from uft.config.loader import Setting
from uft.config.stages import MADE_BY, STAGES, made, maker
from uft.config.suggest import hint, nearest, written
from uft.config.tree import Tree
from uft.errors import Problem

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
SAME = ("hardware", "tracking", "run", "sweep", STAGES)
MODEL = ("path", "name", "revision", "trust_remote_code")


def fixed(setting: Setting) -> Problem | None:
    """A key that no stage can have for itself, or None."""
    if not setting.path:
        return Problem(setting.text, "must be a group of keys", setting.where)
    if setting.path in (("objective",), ("data",)):
        (group,) = setting.path
        advice = f"beside set, not in it:  {group}: {written(setting.value)}"
        return Problem(setting.text, "is chosen by the stage", setting.where, (advice,))
    if setting.path[0] in SAME:
        return Problem(setting.text, f"{setting.path[0]} is the same in all stages", setting.where)
    if setting.path[0] == "model" and setting.path[1:2] and setting.path[1] in MODEL:
        return Problem(setting.text, "a stage starts from the model that the stage before it left", setting.where)
    if setting.path in (("generate", "out"), ("annotate", "out")):
        return Problem(setting.text, "a stage writes into a folder of its own", setting.where)
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
        if stage.reference != "start" and stage.do in ("generate", "annotate"):
            yield Problem(f"{key}.reference={stage.reference}", f"has no meaning where do={stage.do}", where)
        if name in trees:
            earlier = {n: s.do for n, s in list(stages.items())[:number]}
            yield from handed_on(trees[name], earlier)
            yield from WORK.get(stage.do, nothing)(name, trees[name], where, earlier)
            if stage.reference == "initial" and trees[name].value("reference.path") is not None:
                yield Problem(f"{key}.reference=initial", "and reference.path both name the reference", where)
    yield from same_everywhere(trees)


MEASURED = ("holdout", "eval_path", "eval_split")


def handed_on(tree: Tree, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """Sources whose rows an earlier stage makes."""
    sources: Any = OmegaConf.to_container(tree.root.data.sources)
    makers = [stage for stage, do in earlier.items() if do != "fit"]
    for source, node in sources.items():
        if not made(node.get("path")):
            continue
        key, path = f"data.sources.{source}", node["path"]
        what, where = f"{key}.path={path}", tree.origins.get(f"{key}.path", "")
        if earlier.get(maker(path)) == "fit":
            yield Problem(what, f"stage {maker(path)} trains and leaves no rows", where)
        elif maker(path) not in makers:
            near = nearest(maker(path), makers)
            advice = hint(near and f"{MADE_BY}{near}", "stages before this one that make rows", makers)
            yield Problem(what, "no such stage before this one", where, (advice,) if advice else ())
        for leaf in MEASURED:
            if node.get(leaf):
                why = f"what {path} holds out is measured: rows to measure on are there before the first step"
                yield Problem(f"{key}.{leaf}", why, tree.origins.get(f"{key}.{leaf}", ""))


def same_everywhere(trees: Mapping[str, Tree]) -> Iterator[Problem]:
    """What the battery, which is one for all stages, depends on."""
    values = {name: tree.value("data.template") for name, tree in trees.items()}
    if len(set(values.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in values.items())
        yield Problem("data.template", "is one for all stages, which are measured alike", advice=(each,))


def annotating(name: str, tree: Tree, where: str, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """What a stage that annotates needs: a column, and models that are there."""
    if tree.value("annotate.column") is None:
        advice = f"{STAGES}.{name}.set={{annotate.column: baseline_logp}}"
        yield Problem(f"{STAGES}.{name}", "which column to write is not said", where, (advice,))
    trained = [stage for stage, do in earlier.items() if do == "fit"]
    for path in tree.value("annotate.models") or ():
        if made(path) and maker(path) not in trained:
            near = nearest(maker(path), trained)
            advice = hint(near and f"{MADE_BY}{near}", "stages before this one that train", trained)
            place = tree.origins.get("annotate.models", "")
            yield Problem(f"annotate.models=[{path}]", "no such stage before this one", place, (advice,) * bool(advice))


def nothing(name: str, tree: Tree, where: str, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """No rules of its own."""
    yield from ()


WORK: dict[str, Callable[[str, Tree, str, Mapping[str, str]], Iterator[Problem]]] = {"annotate": annotating}
"""Rules of what a stage does."""
