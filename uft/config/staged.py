"""A request with stages: every stage a tree of its own, and the run's tree above them.

A stage is what the same request would be with the stage's objective and data chosen, and then its own keys:

1. the files, in Hydra's order; the keys that `stages.NAME.set` gives have the place of the file they stand in, after
   what that file says for all stages: a file that comes later (debug=fast) wins over them;
2. what was typed for all stages. A key counts for every stage that has it; one that no stage has is a mistake;
3. what was typed for this stage (`stages.NAME.set`).

What is wrong with any stage is told at once, once if it is wrong in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import split_key

from uft.config.fitting import apply, fill, new_key, unfit
from uft.config.freeze import plain
from uft.config.loader import Composed, Setting, leaves
from uft.config.outline import OWN, SET, UNCLEAR, of_stages, outlined, own_keys, refused_choices, unknown_choices
from uft.config.overrides import COMMAND_LINE, Sorted
from uft.config.schema import Data
from uft.config.stage_rules import fixed, rules
from uft.config.stages import STAGES, differing
from uft.config.suggest import hint, nearest
from uft.config.translate import BROKEN, translate
from uft.config.tree import OBJECTIVE, SOURCES, Tree, fields_of
from uft.errors import Problem

Read = Callable[[tuple[str, ...]], Composed]
"""What choices of groups come to."""

Fitted = tuple[DictConfig, dict[str, str], dict[str, str | None], list[Problem], list[str]]
"""Tree, origins, choices, problems, and the words that are right."""


@dataclass
class Draft:
    """A stage while it is put together; the run's own tree is one too, under the name ""."""

    name: str
    does: str = ""
    tree: Tree = field(default_factory=Tree)
    problems: list[Problem] = field(default_factory=list)
    choices: dict[str, str | None] = field(default_factory=dict)

    def lacks(self, path: tuple[str, ...]) -> bool:
        """Whether this is a key of another objective."""
        return path[0] == OBJECTIVE and not self.tree.knows(path)

    def knows(self, override: Override) -> bool:
        """Whether what was typed has a place here."""
        path = tuple(split_key(override.key_or_group))
        if override.is_delete():
            return OmegaConf.select(self.tree.root, override.key_or_group, throw_on_missing=False) is not None
        if path[: len(SOURCES)] == SOURCES and (override.is_add() or override.is_force_add()):
            return True
        value = override.value()
        inner = [path + more for more, _ in leaves(value)] if isinstance(value, dict) and value else [path]
        return not new_key(self.tree, path) and all(self.tree.knows(leaf) for leaf in inner)

    def finish(self, typed: Sequence[Setting]) -> None:
        """What was typed for this stage alone, and the rules."""
        if not self.choices:  # its files could not even be read
            return
        problems = [fixed(setting) or self.tree.put(setting) for setting in typed]
        self.problems += [problem for problem in problems if problem is not None]
        self.problems += unfit(self.tree).values()


def asked(files: Sequence[Sequence[Setting]], words: Sorted) -> bool:
    """Whether the request has stages."""
    set_in_files = any(setting.path[0] == STAGES and setting.path[1:] for settings in files for setting in settings)
    return set_in_files or any(of_stages(override) for override in words.values)


def fit_stages(files: Sequence[Sequence[Setting]], words: Sorted, read: Read, repository: IConfigRepository) -> Fitted:
    """Everything about a request with stages; `files` are those of its own choices."""
    outline, typed, problems = outlined(files, words)
    stages = outline.root[STAGES]
    problems = [*words.problems, *problems, *refused_choices(words, outline)]
    for name, stage in stages.items():
        problems += unknown_choices(name, stage, outline, repository)
    chosen = [*words.choices, *words.mended]
    if any(stage[group] == UNCLEAR for stage in stages.values() for group in OWN):
        return outline.root, outline.origins, {}, [*problems, *rules(outline, {})], chosen
    run, drafts, lacking = drafts_of(stages, chosen, read)
    problems += lacking
    general = [override for override in words.values if not of_stages(override)]
    known = [override for override in general if override.key_or_group.split(".")[0] not in words.unclear]
    problems += [problem for override in known for problem in spread(override, drafts, run)]
    for draft in drafts:
        draft.finish(typed.get(draft.name, ()))
    problems += [*together(drafts), *rules(outline, {draft.name: draft.tree for draft in drafts})]
    if not problems:
        freeze(run.tree, outline, drafts)
    wrong = {problem.what for problem in problems}
    right = [line for line in (*chosen, *(str(override.input_line) for override in words.values)) if line not in wrong]
    return run.tree.root, run.tree.origins, run.choices, problems, right


# every stage


def drafts_of(
    stages: Mapping[str, DictConfig], chosen: Sequence[str], read: Read
) -> tuple[Draft, list[Draft], list[Problem]]:
    """(the run's own tree, that of every stage, keys of the files that no stage has)."""
    last = next((stage for stage in reversed(list(stages.values())) if stage.do == "fit"), None)
    lacking: dict[tuple[str, str], list[Setting]] = {}
    drafts = []
    for name, stage in stages.items():
        objective = last if last is not None and stage.do != "fit" else stage
        own = {OBJECTIVE: objective.objective, "data": stage.data}
        drafts.append(drafted(name, stage.do, own, chosen, read, lacking))
    run = drafted("", "", {group: last[group] for group in OWN} if last is not None else {}, chosen, read, {})
    fits = [draft for draft in drafts if draft.does == "fit"]
    nowhere = [found[0] for found in lacking.values() if len(found) == len(fits)]
    return run, drafts, [missing(setting.text, setting.where, fits) for setting in nowhere]


def drafted(
    name: str,
    does: str,
    own: dict[str, str | None],
    chosen: Sequence[str],
    read: Read,
    lacking: dict[tuple[str, str], list[Setting]],
) -> Draft:
    """A stage as the files have it. Keys of other objectives, set for all stages, are noted in `lacking`."""
    draft = Draft(name, does)
    replaced = {group: option for group, option in own.items() if option is not None}
    others = [line for line in chosen if line.lstrip("+").partition("=")[0] not in replaced]
    choices = (*others, *(f"{group}={option}" for group, option in replaced.items()))
    try:
        files, draft.choices = read(choices)
    except BROKEN as error:
        draft.problems.append(translate(error))
        return draft

    def leave(setting: Setting) -> bool:
        if setting.text.startswith(f"{STAGES}.") or not draft.lacks(setting.path):
            return False
        if does == "fit":
            lacking.setdefault((setting.where, setting.text), []).append(setting)
        return True

    settings = list(in_order(files, name))
    draft.problems += [problem for setting in settings if (problem := own_problem(setting)) is not None]
    draft.problems += fill(draft.tree, [s for s in settings if own_problem(s) is None], leave)
    return draft


def in_order(files: Sequence[Sequence[Setting]], name: str) -> Iterator[Setting]:
    """Settings as they count for a stage."""
    for settings in files:
        yield from (setting for setting in settings if setting.path[0] != STAGES)
        for setting in settings:
            if setting.path[:3] == (STAGES, name, SET):
                yield from own_keys(setting.path[3:], setting.value, setting.where, setting.text)


def own_problem(setting: Setting) -> Problem | None:
    """What is wrong with a key that stands in a `set`, whatever its value."""
    return fixed(setting) if setting.text.startswith(f"{STAGES}.") else None


def spread(override: Override, drafts: Sequence[Draft], run: Draft) -> Iterator[Problem]:
    """Put what was typed for all stages into those that have the key; yields the problem where none has it."""
    if run.knows(override):
        run.problems += apply(run.tree, override)
    having = [draft for draft in drafts if draft.knows(override)]
    for draft in having:
        draft.problems += apply(draft.tree, override)
    path = tuple(split_key(override.key_or_group))
    fits = [draft for draft in drafts if draft.does == "fit"]
    if not having and override.package is None and path[0] in OWN and path[1:] and fits:
        yield missing(str(override.input_line), COMMAND_LINE, fits if path[0] == OBJECTIVE else drafts)
    elif not having:
        yield from apply((drafts or [run])[-1].tree, override)


def missing(text: str, where: str, drafts: Sequence[Draft]) -> Problem:
    """A key that no stage has, with the keys of each."""
    path = tuple(text.lstrip("+").partition("=")[0].split("."))
    place = SOURCES if path[: len(SOURCES)] == SOURCES else path[:1]
    keys = {draft.name: keys_at(draft, place) for draft in drafts}
    near = nearest(path[len(place)], sorted({key for own in keys.values() for key in own}))
    meant = ".".join((*place, near, *path[len(place) + 1 :])) if near else None
    group = place[0]
    each = [
        f"{draft.name} ({group}={OmegaConf.select(draft.tree.root, f'{group}.name', throw_on_missing=False)}): "
        + ", ".join(keys[draft.name])
        for draft in drafts
    ]
    return Problem(text, "no such key in any stage", where, (*([hint(meant, "", ())] if meant else []), *each))


def keys_at(draft: Draft, place: tuple[str, ...]) -> list[str]:
    node = OmegaConf.select(draft.tree.root, ".".join(place), throw_on_missing=False)
    if not isinstance(node, DictConfig):
        return []
    known = fields_of(node)
    return list(node) if known is None else [key for key in known if key not in ("name", "method")]


def together(drafts: Sequence[Draft]) -> Iterator[Problem]:
    """The problems of all stages, each once, with the stages that have it where not all do."""
    found: dict[Problem, list[str]] = {}
    for draft in drafts:
        for problem in dict.fromkeys(draft.problems):
            found.setdefault(problem, []).append(draft.name)
    for problem, names in found.items():
        if len(names) == len(drafts) or problem.what.startswith(f"{STAGES}."):
            yield problem
        else:
            where = f"in stage{'s' * (len(names) > 1)} {', '.join(names)}"
            yield replace(problem, advice=(*problem.advice, where))


# what comes of it


def freeze(run: Tree, outline: Tree, drafts: Sequence[Draft]) -> None:
    """Give the run's tree its resolved stages, and the objective and the data of its last fit stage."""
    last = [draft for draft in drafts if draft.does == "fit"][-1]
    whole = {draft.name: plain(draft.tree.root) for draft in drafts}
    run.root.objective = OmegaConf.create(whole[last.name]["objective"])
    run.root.data = OmegaConf.merge(OmegaConf.structured(Data), whole[last.name]["data"])
    for group in OWN:
        own = f"{group}."
        run.origins = {key: where for key, where in run.origins.items() if not key.startswith(own)}
        run.origins |= {key: where for key, where in last.tree.origins.items() if key.startswith(own)}
    settings = plain(run.root)
    for draft in drafts:
        stage = outline.root[STAGES][draft.name]
        what = {"do": stage.do, "reference": stage.reference} if stage.do == "fit" else {"do": stage.do}
        run.root[STAGES][draft.name] = {**what, "config": differing(whole[draft.name], settings)}
        prefix = f"{STAGES}.{draft.name}."
        run.origins |= {f"{prefix}config.{key}": where for key, where in draft.tree.origins.items()}
        run.origins |= {key: where for key, where in outline.origins.items() if key.startswith(prefix)}
