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

from uft.config.checks import (
    NOT_TYPED,
    OBJECTIVE,
    Absent,
    Draft,
    Setting,
    adapter,
    faults,
    leaves,
    path_of,
)
from uft.config.files import BROKEN, Composed, Files, Words, translate
from uft.config.frozen import ABSENT, current, difference, plain, typed
from uft.config.messages import COMMAND_LINE, hint, nearest, no_such_option, written
from uft.config.schema import Config, KeyPath
from uft.config.schema import Stage as StageRequest
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
    run = plain(current(settings, FILE))
    stages = {}
    for name, whole in expanded(settings).items():
        stages[name] = {**settings[STAGES][name], "config": differing(plain(current(whole, FILE)), run)}
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


# --- A request with stages: every stage a draft of its own, and the run's draft above them.
#
# A stage is what the same request would be with the stage's objective and data chosen, and then its own keys:
#
# 1. the files, as Hydra composes them; a key that `stages.NAME.set` gives has the place of the file it stands in: a
#    file that comes later (debug=fast) and sets it too wins over it;
# 2. what was typed for all stages;
# 3. what was typed for this stage (`stages.NAME.set`).
#
# A key that is set for all stages counts for every stage that has it; one that no stage has is a mistake. Everything
# that is wrong with any stage is told at once, once if it is wrong in all of them.


SET = "set"
SOURCES = ("data", "sources")
OWN = (OBJECTIVE, "data")  # groups that a stage may choose for itself
UNCLEAR = ""  # a choice that could not even be guessed: which keys the stage has is not known
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
SAME = ("hardware", "tracking", "run", "sweep", STAGES)
MODEL = ("path", "name", "revision", "trust_remote_code")
MEASURED = ("holdout", "eval_path", "eval_split")


@dataclass(eq=False)
class Planned:
    """A stage while it is put together; the run itself is one too, under the name ""."""

    name: str
    request: dict[str, Any]  # the keys of the stage, valid, without those that it sets
    typed: list[Setting] = field(default_factory=list)  # keys that the command line sets for it alone
    draft: Draft = field(default_factory=lambda: Draft(asdict(Config())))
    settings: dict[str, Any] = field(default_factory=dict)  # in the end

    @property
    def does(self) -> str:
        return str(self.request["do"])

    @property
    def key(self) -> str:
        return f"{STAGES}.{self.name}"


def has_stages(composed: Composed, words: Words) -> bool:
    in_files = any(setting.path[0] == STAGES and setting.path[1:] for setting in composed.settings)
    return in_files or any(path_of(override)[0] == STAGES for override in words.values)


def compose_stages(
    composed: Composed, words: Words, files: Files
) -> tuple[dict[str, Any], Draft, dict[str, str], list[Problem]]:
    """(the run's settings with its resolved stages, its draft, where each value was set, problems).

    `composed` is that of the request's own choices.
    """
    outline, stages = outlined(composed, words)
    problems = [*outline.problems, *refused_choices(stages, words), *unknown_choices(stages, outline, files)]
    if any(stage.request[group] == UNCLEAR for stage in stages for group in OWN):
        problems += [problem for stage in stages for problem in rules(stage, outline)]
        return asdict(Config()), outline, outline.origins(), problems
    last = next((stage for stage in reversed(stages) if stage.does == "fit"), None)
    run = Planned("", {"do": "", OBJECTIVE: None, "data": last and last.request["data"]})
    for stage in (run, *stages):
        objective = stage.request[OBJECTIVE] if stage.does == "fit" or last is None else last.request[OBJECTIVE]
        unread = lay_files(stage, {OBJECTIVE: objective, "data": stage.request["data"]}, words, files)
        for override in words.values:
            if path_of(override)[0] not in (STAGES, *words.unclear):
                stage.draft.apply(override)
        for setting in stage.typed:
            put(setting, stage.draft)
        stage.settings = stage.draft.judge()
        stage.draft.problems = unread or stage.draft.problems
    problems += together(stages)
    problems += [problem for stage in stages for problem in (*rules(stage, outline), *handed_on(stage, stages))]
    if stages and last is None:
        problems.append(Problem(STAGES, "none of them trains anything", advice=("one of them must be  do: fit",)))
    templates = {stage.name: stage.settings["data"]["template"] for stage in stages}
    if len(set(templates.values())) > 1:  # the evaluation is one for all stages
        each = ", ".join(f"{name}: {template}" for name, template in templates.items())
        why = "is one for all stages, which are measured alike"
        problems.append(Problem("data.template", why, advice=(each,)))
    settings, origins = put_together(run, last, stages, outline)
    return settings, run.draft, origins, problems


def outlined(composed: Composed, words: Words) -> tuple[Draft, list[Planned]]:
    """The stages as the request names them, and the draft of `stages` with what is wrong in it."""
    outline, typed = Draft({STAGES: {}}), dict[str, list[Setting]]()

    def put_in(setting: Setting) -> None:
        inside = setting.path[2:3] == (SET,)
        outline.put(replace(setting, path=setting.path[:2], value={}) if inside else setting)

    for setting in composed.settings:
        if setting.path[0] == STAGES and setting.path[1:]:
            put_in(setting)
    for override in words.values:
        path, line, names = path_of(override), str(override.input_line), list(outline.values[STAGES])
        if path[0] != STAGES:
            continue
        if override.is_delete():
            outline.apply(override)
        elif path[1:] and path[1] not in names and not (override.is_add() or override.is_force_add()):
            near = nearest(path[1], names)
            advice = hint(near and f"{STAGES}.{near}", STAGES, names)
            outline.problems.append(Problem(line, "no such stage", COMMAND_LINE, (advice,)))
        else:
            for setting in own_keys(path, override.value(), COMMAND_LINE, line):
                put_in(setting)
                if setting.path[2:3] == (SET,) and (setting.path[3:] or setting.value not in (None, {})):
                    typed.setdefault(path[1], []).append(replace(setting, path=setting.path[3:]))
    stages = []
    for name, stage in outline.values[STAGES].items():
        for place, fault in faults(StageRequest, stage, (STAGES, name)).items():
            outline.problems.append(outline.problem_at(place, fault))
            outline.put_default(place)
        stages.append(Planned(name, asdict(adapter(StageRequest).validate_python(stage)), typed.get(name, [])))
    return outline, stages


def own_keys(path: KeyPath, value: object, where: str, text: str) -> Iterator[Setting]:
    """The keys below `path`, whether they were written `objective.beta: 0.3` or as a tree; () where there are none."""
    for more, item in leaves(value) if isinstance(value, dict) and value else [((), value)]:
        key = tuple(part for part in ".".join((*path, *more)).split(".") if part)
        if key or item not in (None, {}):
            yield Setting(key, item, where, text)


def refused_choices(stages: Sequence[Planned], words: Words) -> Iterator[Problem]:
    """`objective=kto` where every stage names its own."""
    for group in OWN:
        naming = [stage for stage in stages if group == "data" or stage.does == "fit"]
        if not naming or any(stage.request[group] is None for stage in naming):
            continue
        for line in words.choices:
            key, _, option = line.lstrip("+").partition("=")
            if key == group:
                each = "   or  ".join(f"{stage.key}.{group}={option}" for stage in naming)
                why = f"every stage has {'an objective' if group == OBJECTIVE else 'data'} of its own"
                yield Problem(line, why, COMMAND_LINE, (f"for one of them:  {each}",))


def unknown_choices(stages: Sequence[Planned], outline: Draft, files: Files) -> Iterator[Problem]:
    """Objectives and data that have no file. The stage then has the one that was probably meant."""
    for stage in stages:
        for group in OWN:
            option, key = stage.request[group], f"{stage.key}.{group}"
            if option is not None and not files.has(group, option):
                advice, meant = no_such_option(group, option, list(files.groups[group]), key)
                where = outline.where((STAGES, stage.name, group))
                yield Problem(f"{key}={option}", f"no such file in conf/{group}", where, advice)
                stage.request[group] = meant.partition("=")[2] if meant else UNCLEAR


# every stage


def lay_files(stage: Planned, own: Mapping[str, str | None], words: Words, files: Files) -> list[Problem]:
    """Begin the draft of a stage with the files, its own objective and data among them; why they cannot be read."""
    replaced = {group: option for group, option in own.items() if option is not None}
    others = [line for line in words.chosen if line.lstrip("+").partition("=")[0] not in replaced]
    try:
        composed = files.composed((*others, *(f"{group}={option}" for group, option in replaced.items())))
    except BROKEN as error:
        return [translate(error)]
    if composed.problems:
        return list(composed.problems)
    stage.draft = Draft({**composed.values, STAGES: {}}, [s for s in composed.settings if s.path[0] != STAGES])
    for number, file in enumerate(composed.files, 1):
        later = {setting.path for other in composed.files[number:] for setting in other}
        for setting in file:
            if setting.path[:3] == (STAGES, stage.name, SET):
                for one in own_keys(setting.path[3:], setting.value, setting.where, setting.text):
                    if one.path not in later:
                        put(one, stage.draft)
    return []


def put(setting: Setting, draft: Draft) -> None:
    """Lay a key that a stage sets for itself, unless no stage can have it for itself."""
    if problem := fixed(setting):
        draft.problems.append(problem)
    else:
        draft.put(setting)


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


def together(stages: Sequence[Planned]) -> Iterator[Problem]:
    """The problems of all stages, each once, with the stages that have it where not all do.

    A key that was set for all of them and that some do not have is no problem.
    """
    found: dict[Problem, list[str]] = {}
    absent: dict[tuple[str, str], list[Problem]] = {}
    for stage in stages:
        for problem in dict.fromkeys(stage.draft.problems):
            if isinstance(problem, Absent) and not problem.what.startswith(f"{STAGES}."):
                absent.setdefault((problem.what, problem.where), []).append(problem)
            else:
                found.setdefault(problem, []).append(stage.name)
    for (text, where), problems in absent.items():
        if len(problems) == len(stages):
            yield missing(text, where, stages)
    for problem, names in found.items():
        if len(names) == len(stages) or problem.what.startswith(f"{STAGES}."):
            yield problem
        else:
            where = f"in stage{'s' * (len(names) > 1)} {', '.join(names)}"
            yield replace(problem, advice=(*problem.advice, where))


def missing(text: str, where: str, stages: Sequence[Planned]) -> Problem:
    """A key that no stage has, with the keys of each."""
    path = tuple(text.lstrip("+~").partition("=")[0].split("."))
    group = path[0]
    place = (group,) if group == OBJECTIVE else SOURCES
    having = [stage for stage in stages if stage.does == "fit" or group != OBJECTIVE]
    keys = {stage: stage.draft.keys_at(place) or list(stage.draft.get(place)) for stage in having}
    shown = {stage.name: [key for key in own if key not in NOT_TYPED] for stage, own in keys.items()}
    near = nearest(path[len(place)], sorted({key for own in shown.values() for key in own}))
    meant = [hint(".".join((*place, near, *path[len(place) + 1 :])), "", ())] if near else []
    each = [
        f"{stage.name} ({group}={stage.draft.get((group, 'name'))}): {', '.join(shown[stage.name])}" for stage in having
    ]
    return Problem(text, "no such key in any stage", where, (*meant, *each))


# rules about stages


def rules(stage: Planned, outline: Draft) -> Iterator[Problem]:
    """What is wrong with a stage by itself: its name, its kind, its reference."""
    where = next((place for own, place in outline.origins().items() if own.startswith(f"{stage.key}.")), "")
    reference = stage.request["reference"]
    if not NAME.fullmatch(stage.name):
        yield Problem(stage.key, "names a folder: letters, digits, - and _, a letter first", where)
    if reference != "start" and stage.does != "fit":
        yield Problem(f"{stage.key}.reference={reference}", f"has no meaning where do={stage.does}", where)
    if not stage.settings:
        return
    if stage.does == "annotate" and stage.settings["annotate"]["column"] is None:
        advice = f"{stage.key}.set={{annotate.column: baseline_logp}}"
        yield Problem(stage.key, "which column to write is not said", where, (advice,))
    if reference == "initial" and stage.settings["reference"]["path"] is not None:
        yield Problem(f"{stage.key}.reference=initial", "and reference.path both name the reference", where)


def handed_on(stage: Planned, stages: Sequence[Planned]) -> Iterator[Problem]:
    """What is wrong with what a stage takes from earlier ones: rows of its sources, models that annotate."""
    earlier = {other.name: other.does for other in stages[: stages.index(stage)]}
    trained = [other for other, do in earlier.items() if do == "fit"]
    makers = [other for other, do in earlier.items() if do != "fit"]
    for path in stage.settings["annotate"]["models"] if stage.does == "annotate" else ():
        if made(path) and maker(path) not in trained:
            advices = no_such_stage(path, "stages before this one that train", trained)
            place = stage.draft.where(("annotate", "models"))
            yield Problem(f"annotate.models=[{path}]", "no such stage before this one", place, advices)
    for source, node in stage.settings["data"]["sources"].items():
        if not made(node["path"]):
            continue
        key, path = f"data.sources.{source}", node["path"]
        what, where = f"{key}.path={path}", stage.draft.where((*SOURCES, source, "path"))
        if maker(path) in trained:
            yield Problem(what, f"stage {maker(path)} trains and leaves no rows", where)
        elif maker(path) not in makers:
            advices = no_such_stage(path, "stages before this one that make rows", makers)
            yield Problem(what, "no such stage before this one", where, advices)
        for leaf in MEASURED:
            if node.get(leaf):
                why = f"what {path} holds out is measured: rows to measure on are there before the first step"
                yield Problem(f"{key}.{leaf}", why, stage.draft.where((*SOURCES, source, leaf)))


def no_such_stage(path: str, label: str, stages: Sequence[str]) -> tuple[str, ...]:
    near = nearest(maker(path), stages)
    advice = hint(near and f"{MADE_BY}{near}", label, stages)
    return (advice,) if advice else ()


def put_together(
    run: Planned, last: Planned | None, stages: Sequence[Planned], outline: Draft
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the run's settings with its resolved stages, and the objective and data of its last fit stage; origins)."""
    settings, origins = plain(run.settings), run.draft.origins()
    for group in OWN if last is not None else ():
        assert last is not None
        settings[group] = last.settings[group]
        origins = {key: where for key, where in origins.items() if not key.startswith(f"{group}.")}
        origins |= {key: where for key, where in last.draft.origins().items() if key.startswith(f"{group}.")}
    nodes: dict[str, Any] = {}
    for stage in stages:
        head = {key: stage.request[key] for key in (("do", "reference") if stage.does == "fit" else ("do",))}
        nodes[stage.name] = {**head, "config": differing(plain(stage.settings), settings)}
        origins |= {f"{stage.key}.config.{key}": where for key, where in stage.draft.origins().items()}
        origins |= {key: where for key, where in outline.origins().items() if key.startswith(f"{stage.key}.")}
    return settings | {STAGES: nodes}, origins
