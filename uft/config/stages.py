"""Stages: a run as a list of stages, each with a configuration of its own.

A request writes `stages` (`schema.Stage`): what a stage does, its objective and data by name, and keys for it alone.
What stands in a run's frozen configuration is resolved: under `stages.NAME.config` the top-level nodes in which the
stage differs from the run's own. Everything after composition reads the second form, with the functions here.

Of a run with stages, `objective` and `data` at the top are those of its last fit stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from uft.config.files import BROKEN, Files, Layers, Words, translate
from uft.config.frozen import ABSENT, difference, plain, tree_of, typed
from uft.config.messages import COMMAND_LINE, hint, nearest, no_such_option, written
from uft.config.schema import Config, KeyPath
from uft.config.tree import NOT_TYPED, OBJECTIVE, Setting, Tree, leaves, path_of, settings_of
from uft.errors import Problem

STAGES = "stages"
MADE_BY = "stage:"
"""How a source's path names the rows that an earlier stage made, and a model path the model of an earlier stage."""

FILE = "config.yaml of the run"
ROWS = "rows.jsonl"

WORK = ("generate.", "annotate.")
"""Keys that mean something to stages which do that, and to verbs; to those stages they are no longer free."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage of a run, resolved."""

    name: str  # "" of the only stage of a run without `stages`
    number: int  # 1-based
    do: str  # fit, generate or annotate
    reference: str  # start: the model it starts from; initial: the model that the run started from
    config: Config

    @property
    def folder(self) -> str:
        """Its place in the run folder; the only stage of a run without `stages` has the run folder itself."""
        return f"{STAGES}/{self.number}-{self.name}" if self.name else "."


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run in their order; one unnamed fit stage where the request has no `stages`."""
    if not config.stages:
        return [Stage(name="", number=1, do="fit", reference="start", config=config)]
    whole = expanded(plain(asdict(config)))
    return [
        Stage(
            name=name,
            number=number,
            do=node["do"],
            reference=node.get("reference", "start"),
            config=typed(whole[name]),
        )
        for number, (name, node) in enumerate(config.stages.items(), 1)
    ]


def expanded(settings: Settings) -> dict[str, dict[str, Any]]:
    """Stage -> its whole configuration, from the resolved one of the run."""
    own = {key: value for key, value in settings.items() if key != STAGES}
    return {name: {**own, **node["config"]} for name, node in settings.get(STAGES, {}).items()}


def completed(settings: Settings) -> dict[str, Any]:
    """A frozen configuration as this version writes it: keys that came since have their defaults, in stages too.

    Raises UftError for one that another version wrote, with keys that are none here.
    """
    run = plain(tree_of(settings, FILE).values)
    stages = {}
    for name, whole in expanded(settings).items():
        stages[name] = {**settings[STAGES][name], "config": differing(plain(tree_of(whole, FILE).values), run)}
    return run | ({STAGES: stages} if stages else {})


def differing(whole: Settings, run: Settings) -> dict[str, Any]:
    """The top-level nodes in which a stage differs from its run."""
    return {key: value for key, value in whole.items() if key != STAGES and value != run.get(key, ABSENT)}


def differences(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """`difference` of two resolved configurations. What differs alike in a run and in a stage of it is told once."""
    changes = difference(without_stages(old), without_stages(new))
    told = set(map(repr, changes))
    before, after = expanded(old), expanded(new)
    if list(before) != list(after):
        changes.append((STAGES, list(before), list(after)))
    for name in [*after, *(name for name in before if name not in after)]:
        prefix = f"{STAGES}.{name}."
        heads = [{STAGES: {name: head(settings, name)}} if head(settings, name) else {} for settings in (old, new)]
        changes += difference(*heads)
        if name in before and name in after:
            for key, was, now in difference(before[name], after[name]):
                own = key.startswith(f"{new[STAGES][name]['do']}.")  # `generate.` of a stage that generates
                if own or (repr((key, was, now)) not in told and not key.startswith(WORK)):
                    changes.append((prefix + key, was, now))
    return changes


def without_stages(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != STAGES}


def head(settings: Settings, name: str) -> dict[str, Any]:
    """What a stage is, without its configuration."""
    node = settings.get(STAGES, {}).get(name, {})
    return {key: value for key, value in node.items() if key != "config"}


def data_nodes(settings: Settings) -> Iterator[dict[str, Any]]:
    """The `data` of the run, or of each of its stages; without the sources whose rows an earlier stage makes."""
    for stage in expanded(settings).values() or [settings]:
        sources = {name: source for name, source in stage["data"]["sources"].items() if not made(source["path"])}
        if sources:
            yield {**stage["data"], "sources": sources}


def made(path: str | None) -> bool:
    """Whether a path names what an earlier stage makes."""
    return str(path or "").startswith(MADE_BY)


def maker(path: str) -> str:
    """The stage that `stage:NAME` names."""
    return path.removeprefix(MADE_BY)


def rows_of(run: Path, path: str, source: str) -> Path:
    """The file that `stage:NAME` means in a run folder: the stage's only one, or the one of the source of this name.

    KeyError where there is no such stage.
    """
    folders = {folder.name.partition("-")[2]: folder for folder in (run / STAGES).glob("*-*")}
    folder = folders[maker(path)]
    return folder / ROWS if (folder / ROWS).is_file() else folder / "rows" / f"{source}.jsonl"


# --- A request with stages: every stage a tree of its own, and the run's tree above them.
#
# A stage is what the same request would be with the stage's objective and data chosen, and then its own keys:
#
# 1. the files, in Hydra's order; the keys that `stages.NAME.set` gives have the place of the file they stand in,
# after
#    what that file says for all stages: a file that comes later (debug=fast) wins over them;
# 2. what was typed for all stages. A key counts for every stage that has it; one that no stage has is a mistake;
# 3. what was typed for this stage (`stages.NAME.set`).
#
# Everything that is wrong with any stage is told at once, once if it is wrong in all of them.


SET = "set"
SOURCES = ("data", "sources")
OWN = (OBJECTIVE, "data")  # groups that a stage may choose for itself
UNCLEAR = ""  # a choice that could not even be guessed: which keys the stage has is not known
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
SAME = ("hardware", "tracking", "run", "sweep", STAGES)
MODEL = ("path", "name", "revision", "trust_remote_code")
MEASURED = ("holdout", "eval_path", "eval_split")


@dataclass
class Draft:
    """A stage while it is put together; the run's own tree is one too, under the name ""."""

    name: str
    does: str = ""
    tree: Tree = field(default_factory=Tree)
    problems: list[Problem] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # in the end
    is_read: bool = False  # whether its files could be

    def knows(self, override: Override) -> bool:
        """Whether what was typed has a place here."""
        path = path_of(override)
        if override.is_delete():
            return self.tree.get(path) is not None
        if path[: len(SOURCES)] == SOURCES and (override.is_add() or override.is_force_add()):
            return True
        known = all(self.tree.key_at(setting.path) is not None for setting in settings_of(override))
        return known and not self.tree.is_new(path)

    def keys_at(self, place: KeyPath) -> list[str]:
        return [key for key in self.tree.keys_at(place) if key not in NOT_TYPED] or list(self.tree.get(place))


@dataclass
class Outline:
    """What a request says of its stages, before any of them is put together."""

    tree: Tree = field(default_factory=Tree)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # valid; without the keys that they set
    typed: dict[str, list[Setting]] = field(default_factory=dict)  # into the `set` of each
    problems: list[Problem] = field(default_factory=list)

    def add(self, setting: Setting) -> None:
        inside = setting.path[2:3] == (SET,)
        problem = self.tree.put(replace(setting, path=setting.path[:2], value={}) if inside else setting)
        self.problems += [problem] if problem else []


def has_stages(layers: Layers, words: Words) -> bool:
    in_files = any(setting.path[0] == STAGES and setting.path[1:] for settings in layers.files for setting in settings)
    return in_files or any(path_of(override)[0] == STAGES for override in words.values)


def compose_stages(
    layers: Layers, words: Words, files: Files
) -> tuple[dict[str, Any], Tree, dict[str, str], list[Problem], list[str]]:
    """(the run's settings with its resolved stages, its tree, where each value was set, problems, the right words).

    `layers` are those of the request's own choices.
    """
    outline = outlined(layers, words)
    problems = [*outline.problems, *refused_choices(outline, words), *unknown_choices(outline, files)]
    if any(stage[group] == UNCLEAR for stage in outline.stages.values() for group in OWN):
        problems += [problem for name in outline.stages for problem in rules(name, None, outline)]
        return Tree().judge()[0], outline.tree, outline.tree.places, problems, list(words.chosen)
    lacking: dict[tuple[str, str], list[str]] = {}
    fits = [name for name, stage in outline.stages.items() if stage["do"] == "fit"]
    last = outline.stages[fits[-1]] if fits else None
    drafts = []
    for name, stage in outline.stages.items():
        own = {OBJECTIVE: (stage if stage["do"] == "fit" or last is None else last)[OBJECTIVE], "data": stage["data"]}
        drafts.append(drafted(Draft(name, stage["do"]), own, words, files, lacking))
    run = drafted(Draft(""), {group: last[group] for group in OWN} if last else {}, words, files, {})
    fitting = [draft for draft in drafts if draft.does == "fit"]
    for (where, text), having in lacking.items():
        if len(having) == len(fitting):
            problems.append(missing(text, where, fitting))
    for override in words.values:
        group = path_of(override)[0]
        if group != STAGES and group not in words.unclear:
            problems += spread(override, drafts, run)
    for draft in (run, *drafts):
        for setting in outline.typed.get(draft.name, ()):
            problem = fixed(setting) or draft.tree.put(setting)
            draft.problems += [problem] if problem else []
        draft.settings, wrong = draft.tree.judge()
        draft.problems += wrong.values() if draft.is_read else ()
    problems += together(drafts)
    problems += [problem for draft in drafts for problem in rules(draft.name, draft, outline)]
    if outline.stages and not fits:
        problems.append(Problem(STAGES, "none of them trains anything", advice=("one of them must be  do: fit",)))
    templates = {draft.name: draft.settings["data"]["template"] for draft in drafts}
    if len(set(templates.values())) > 1:  # the evaluation is one for all stages
        each = ", ".join(f"{name}: {template}" for name, template in templates.items())
        why = "is one for all stages, which are measured alike"
        problems.append(Problem("data.template", why, advice=(each,)))
    settings, origins = put_together(run, drafts, outline)
    wrong_words = {problem.what for problem in problems}
    lines = [*words.chosen, *(str(override.input_line) for override in words.values)]
    return settings, run.tree, origins, problems, [line for line in lines if line not in wrong_words]


# what the request says of them


def outlined(layers: Layers, words: Words) -> Outline:
    outline = Outline()
    for settings in layers.files:
        for setting in settings:
            if setting.path[0] == STAGES and setting.path[1:]:
                outline.add(setting)
    for override in words.values:
        path, line, names = path_of(override), str(override.input_line), list(outline.tree.values[STAGES])
        if path[0] != STAGES:
            continue
        if override.is_delete():
            outline.problems += outline.tree.apply(override)
        elif path[1:] and path[1] not in names and not (override.is_add() or override.is_force_add()):
            near = nearest(path[1], names)
            advice = hint(near and f"{STAGES}.{near}", STAGES, names)
            outline.problems.append(Problem(line, "no such stage", COMMAND_LINE, (advice,)))
        else:
            for setting in own_keys(path, override.value(), COMMAND_LINE, line):
                outline.add(setting)
                if setting.path[2:3] == (SET,) and (setting.path[3:] or setting.value not in (None, {})):
                    outline.typed.setdefault(path[1], []).append(replace(setting, path=setting.path[3:]))
    for name in outline.tree.values[STAGES]:
        outline.stages[name], wrong = outline.tree.finish((STAGES, name))
        outline.problems += wrong.values()
    return outline


def own_keys(path: KeyPath, value: object, where: str, text: str) -> Iterator[Setting]:
    """The keys below `path`, whether they were written `objective.beta: 0.3` or as a tree; () where there are none."""
    for more, item in leaves(value) if isinstance(value, dict) and value else [((), value)]:
        key = tuple(part for part in ".".join((*path, *more)).split(".") if part)
        if key or item not in (None, {}):
            yield Setting(key, item, where, text)


def refused_choices(outline: Outline, words: Words) -> Iterator[Problem]:
    """`objective=kto` where every stage names its own."""
    for group in OWN:
        naming = {name: s for name, s in outline.stages.items() if group == "data" or s["do"] == "fit"}
        if not naming or any(stage[group] is None for stage in naming.values()):
            continue
        for line in words.choices:
            key, _, option = line.lstrip("+").partition("=")
            if key == group:
                each = "   or  ".join(f"{STAGES}.{name}.{group}={option}" for name in naming)
                why = f"every stage has {'an objective' if group == OBJECTIVE else 'data'} of its own"
                yield Problem(line, why, COMMAND_LINE, (f"for one of them:  {each}",))


def unknown_choices(outline: Outline, files: Files) -> Iterator[Problem]:
    """Objectives and data that have no file. The stage then has the one that was probably meant."""
    for name, stage in outline.stages.items():
        for group in OWN:
            option, key = stage[group], f"{STAGES}.{name}.{group}"
            if option is not None and not files.has(group, option):
                advice, meant = no_such_option(group, option, files.options(group), key)
                yield Problem(f"{key}={option}", f"no such file in conf/{group}", outline.tree.where(key), advice)
                stage[group] = meant.partition("=")[2] if meant else UNCLEAR


# every stage


def drafted(
    draft: Draft,
    own: Mapping[str, str | None],
    words: Words,
    files: Files,
    lacking: dict[tuple[str, str], list[str]],
) -> Draft:
    """A stage as the files have it. Keys of other objectives, set for all stages, are noted in `lacking`."""
    replaced = {group: option for group, option in own.items() if option is not None}
    others = [line for line in words.chosen if line.lstrip("+").partition("=")[0] not in replaced]
    try:
        layers = files.layers((*others, *(f"{group}={option}" for group, option in replaced.items())))
    except BROKEN as error:
        draft.problems.append(translate(error))
        return draft

    def leave(setting: Setting) -> bool:
        foreign = setting.path[0] == OBJECTIVE and draft.tree.key_at(setting.path) is None
        if setting.text.startswith(f"{STAGES}.") or not foreign:
            return False
        if draft.does == "fit":
            lacking.setdefault((setting.where, setting.text), []).append(draft.name)
        return True

    draft.is_read, kept = True, list[Setting]()
    for settings in layers.files:
        kept += [setting for setting in settings if setting.path[0] != STAGES]
        for setting in settings:
            if setting.path[:3] == (STAGES, draft.name, SET):
                for one in own_keys(setting.path[3:], setting.value, setting.where, setting.text):
                    problem = fixed(one)
                    draft.problems += [problem] if problem else []
                    kept += [] if problem else [one]
    draft.problems += draft.tree.fill(kept, leave)
    return draft


def fixed(setting: Setting) -> Problem | None:
    """A key that no stage can have for itself, or None."""
    why, advice, path = "", tuple[str, ...](), setting.path
    if not path:
        why = "must be a group of keys"
    elif path in ((OBJECTIVE,), ("data",)):
        why, advice = "is chosen by the stage", (f"beside set, not in it:  {path[0]}: {written(setting.value)}",)
    elif path[0] in SAME:
        why = f"{path[0]} is the same in all stages"
    elif path[0] == "model" and path[1:2] and path[1] in MODEL:
        why = "a stage starts from the model that the stage before it left"
    elif path in (("generate", "out"), ("annotate", "out")):
        why = "a stage writes into a folder of its own"
    return Problem(setting.text, why, setting.where, advice) if why else None


def spread(override: Override, drafts: Sequence[Draft], run: Draft) -> Iterator[Problem]:
    """Put what was typed for all stages into those that have the key; yields the problem where none has it."""
    if run.knows(override):
        run.problems += run.tree.apply(override)
    path, having = path_of(override), [draft for draft in drafts if draft.knows(override)]
    fits = [draft for draft in drafts if draft.does == "fit"]
    if not having and override.package is None and path[0] in OWN and path[1:] and fits:
        yield missing(str(override.input_line), COMMAND_LINE, fits if path[0] == OBJECTIVE else drafts)
    else:
        for draft in having or drafts:
            draft.problems += draft.tree.apply(override)


def missing(text: str, where: str, drafts: Sequence[Draft]) -> Problem:
    """A key that no stage has, with the keys of each."""
    path = tuple(text.lstrip("+").partition("=")[0].split("."))
    place = SOURCES if path[: len(SOURCES)] == SOURCES else path[:1]
    keys = {draft.name: draft.keys_at(place) for draft in drafts}
    near = nearest(path[len(place)], sorted({key for own in keys.values() for key in own}))
    meant = [hint(".".join((*place, near, *path[len(place) + 1 :])), "", ())] if near else []
    group = place[0]
    each = [f"{d.name} ({group}={d.tree.get((group, 'name'))}): {', '.join(keys[d.name])}" for d in drafts]
    return Problem(text, "no such key in any stage", where, (*meant, *each))


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


# rules about stages


def rules(name: str, draft: Draft | None, outline: Outline) -> Iterator[Problem]:
    """Everything that is wrong with a stage beside the others: its name, its kind, what it takes from earlier ones."""
    key, stage = f"{STAGES}.{name}", outline.stages[name]
    where = next((place for own, place in outline.tree.places.items() if own.startswith(f"{key}.")), "")
    if not NAME.fullmatch(name):
        yield Problem(key, "names a folder: letters, digits, - and _, a letter first", where)
    if stage["reference"] != "start" and stage["do"] in ("generate", "annotate"):
        yield Problem(f"{key}.reference={stage['reference']}", f"has no meaning where do={stage['do']}", where)
    if draft is None:
        return
    names = list(outline.stages)
    earlier = {other: outline.stages[other]["do"] for other in names[: names.index(name)]}
    trained = [other for other, do in earlier.items() if do == "fit"]
    yield from handed_on(draft, earlier)
    if stage["do"] == "annotate":
        if draft.settings["annotate"]["column"] is None:
            advice = f"{key}.set={{annotate.column: baseline_logp}}"
            yield Problem(key, "which column to write is not said", where, (advice,))
        for path in draft.settings["annotate"]["models"]:
            if made(path) and maker(path) not in trained:
                advices = no_such_stage(path, "stages before this one that train", trained)
                place = draft.tree.where("annotate.models")
                yield Problem(f"annotate.models=[{path}]", "no such stage before this one", place, advices)
    if stage["reference"] == "initial" and draft.settings["reference"]["path"] is not None:
        yield Problem(f"{key}.reference=initial", "and reference.path both name the reference", where)


def handed_on(draft: Draft, earlier: Mapping[str, str]) -> Iterator[Problem]:
    """Sources whose rows an earlier stage makes; `earlier`: what each of these does."""
    makers = [stage for stage, do in earlier.items() if do != "fit"]
    for source, node in draft.settings["data"]["sources"].items():
        if not made(node["path"]):
            continue
        key, path = f"data.sources.{source}", node["path"]
        what, where = f"{key}.path={path}", draft.tree.where(f"{key}.path")
        if earlier.get(maker(path)) == "fit":
            yield Problem(what, f"stage {maker(path)} trains and leaves no rows", where)
        elif maker(path) not in makers:
            advices = no_such_stage(path, "stages before this one that make rows", makers)
            yield Problem(what, "no such stage before this one", where, advices)
        for leaf in MEASURED:
            if node.get(leaf):
                why = f"what {path} holds out is measured: rows to measure on are there before the first step"
                yield Problem(f"{key}.{leaf}", why, draft.tree.where(f"{key}.{leaf}"))


def no_such_stage(path: str, label: str, stages: Sequence[str]) -> tuple[str, ...]:
    near = nearest(maker(path), stages)
    advice = hint(near and f"{MADE_BY}{near}", label, stages)
    return (advice,) if advice else ()


def put_together(run: Draft, drafts: Sequence[Draft], outline: Outline) -> tuple[dict[str, Any], dict[str, str]]:
    """(the run's settings with its resolved stages, and the objective and data of its last fit stage; origins)."""
    settings = plain(run.settings)
    origins = run.tree.places
    last = next((draft for draft in reversed(drafts) if draft.does == "fit"), None)
    for group in OWN if last else ():
        assert last is not None
        settings[group] = last.settings[group]
        origins = {key: where for key, where in origins.items() if not key.startswith(f"{group}.")}
        origins |= {key: where for key, where in last.tree.places.items() if key.startswith(f"{group}.")}
    stages: dict[str, Any] = {}
    for draft in drafts:
        stage, prefix = outline.stages[draft.name], f"{STAGES}.{draft.name}."
        head = {"do": stage["do"], "reference": stage["reference"]} if draft.does == "fit" else {"do": stage["do"]}
        stages[draft.name] = {**head, "config": differing(plain(draft.settings), settings)}
        origins |= {f"{prefix}config.{key}": where for key, where in draft.tree.places.items()}
        origins |= {key: where for key, where in outline.tree.places.items() if key.startswith(prefix)}
    return settings | {STAGES: stages}, origins
