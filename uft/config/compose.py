"""From a request to a configuration: composed, judged, and everything that is wrong with it told at once.

Hydra composes the files of a choice of options, once (:mod:`uft.config.files`); the values of the command line are laid
over them, and pydantic judges the whole (:mod:`uft.config.checks`). So jobs of a sweep that differ in values alone are
composed together. A request with stages is composed once for each of them: the second half of this file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from uft.config.checks import NOT_TYPED, OBJECTIVE, REWARD, AbsentKey, Draft, Setting, adapter, faults, path_of
from uft.config.files import (
    BROKEN,
    ENDLESS,
    NAMES_CODE,
    Composed,
    Files,
    Request,
    Words,
    files_of,
    read_words,
    translate,
)
from uft.config.frozen import to_builtins
from uft.config.messages import COMMAND_LINE, as_typed, hint, nearest, no_such_option, written
from uft.config.models import complete, gives_choice
from uft.config.schema import Config, KeyPath, Stage, flat, leaves
from uft.config.stages import (
    FILE,
    MADE_BY,
    PAST,
    SOURCES,
    STAGES,
    Round,
    differing,
    expanded,
    is_made,
    maker,
    rounds_of,
    unready,
    without_stages,
)
from uft.errors import Problem, UftError, raise_problems


@dataclass
class Examined:
    """A request after composition and validation."""

    settings: dict[str, Any]  # resolved; where there are problems, defaults stand in for what is wrong
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> where it was set; absent: the default
    references: dict[str, str] = field(default_factory=dict)  # dotted key -> the reference that it is
    choices: Mapping[str, str | None] = field(default_factory=dict)  # group -> option
    problems: list[Problem] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # the overrides that are right, mended choices of groups among them

    @property
    def wrong(self) -> set[str]:
        """The dotted keys that something is wrong with, and the groups whose choice is."""
        return {key_of(problem.what) for problem in self.problems}


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of `uft train OVERRIDES`, nested. Raises UftError with every problem."""
    return require(Request(tuple(overrides))).settings


def require(request: Request) -> Examined:
    """`examine`; UftError with every problem when there is one."""
    examined = examine(request)
    if examined.problems:
        raise UftError(*examined.problems, footer=footer(examined))
    return examined


def footer(examined: Examined) -> str:
    words = [quoted(word) for word in as_typed(examined.kept) if not word.lstrip("+~").startswith("hydra")]
    command = " ".join(["uft config", *words])
    return f"Nothing was started.  See what would run:  {command}"


def quoted(word: str) -> str:
    """A word as it goes on a command line; braces and brackets of values stay bare where the shell leaves them."""
    return shlex.quote(word) if set(word) & set(" '\"$*?;&|<>()`\\!#") else word


def examine(request: Request) -> Examined:
    """Compose and check everything; never raises for what the user wrote."""
    words = Words()
    try:
        files = files_of(request)
        words = read_words(request.overrides, files)
        composed = files.composed(words.chosen)
        if composed.options.get("model") == DEFAULT_MODEL and gives_model(words, composed):
            words.choices.append("model=custom")
            composed = files.composed(words.chosen)
    except (UftError, *BROKEN) as error:
        unread = error.problems if isinstance(error, UftError) else (translate(error),)
        return Examined(asdict(Config()), problems=[*words.problems, *unread], kept=list(words.chosen))
    paths = [setting.path for setting in composed.settings if setting.path[1:]] + list(map(path_of, words.values))
    if composed.problems:
        examined = Examined(asdict(Config()), problems=list(composed.problems))
    elif any(path[0] == STAGES for path in paths):
        examined = judge_stages(composed, words, files)
    else:
        examined = judge_single(composed, words, files)
    examined.choices = composed.options
    if examined.settings["arm"] is not None and composed.options.get("sweep") is None:
        advice = ("a sweep has it:  uft train sweep=NAME arm=...   list them:  uft train --help",)
        what, where = f"arm={examined.settings['arm']}", examined.origins.get("arm", "")
        examined.problems.append(Problem(what, "is a row of a sweep's table, and no sweep is chosen", where, advice))
    wrong = {problem.what for problem in examined.problems}
    keys = set(map(key_of, wrong))
    lines = [str(override.input_line) for override in words.values]
    examined.kept = [line for line in words.chosen if line not in wrong] + [x for x in lines if key_of(x) not in keys]
    examined.problems = [*words.problems, *examined.problems]
    return examined


def judge_single(composed: Composed, words: Words, files: Files) -> Examined:
    """Judge a request without stages."""
    draft = Draft(composed.values, composed.settings)
    apply_words(draft, words)
    complete(draft, words, files)
    draft.complete_sources()
    settings, origins = to_builtins(draft.judge()), draft.origins()
    if settings["rounds"] is not None and not (words.problems or draft.problems):
        what = f"rounds={settings['rounds']}"
        draft.problems.append(Problem(what, "repeats stages, and this run has none", origins.get("rounds", "")))
    return Examined(settings, origins, references_of(draft), problems=draft.problems)


def apply_words(draft: Draft, words: Words) -> None:
    """Lay what the command line sets for the whole run; of a group whose choice is unclear, no key is known."""
    for override in words.values:
        if path_of(override)[0] not in (STAGES, *words.unclear):
            draft.apply(override)


def references_of(draft: Draft) -> dict[str, str]:
    return {key: value for key, value in flat(draft.values) if "${" in str(value)}


DEFAULT_MODEL = "playground"


def gives_model(words: Words, composed: Composed) -> bool:
    """Whether a request sets `model.path` and no file of conf/model: the values of the default one are not for it."""
    if any(map(gives_choice, words.chosen)) or "model" in words.unclear:
        return False
    files = [s.value for s in composed.settings if s.key == "model.path" and Path(s.file).parent.name != "model"]
    typed = [override.value() for override in words.values if path_of(override) == ("model", "path")]
    return (files + typed or [None])[-1] not in (None, f"builtin:{DEFAULT_MODEL}")


def key_of(line: str) -> str:
    """The key that an override is about, without `+` or `~`."""
    return line.lstrip("+~").partition("=")[0]


def refuse_named_code(request: Request) -> None:
    """UftError where this request would make Hydra run code that it names. To be asked before Hydra starts.

    Words that stand for several values are looked at job by job.
    """
    words = read_words(request.overrides, files_of(request))
    problems = [problem for problem in words.problems if problem.why in (NAMES_CODE, ENDLESS)]
    if not problems and (composed := composed_of(request)):
        problems = [problem for problem in composed.problems if problem.why == NAMES_CODE]
    raise_problems(problems)


def needs_hydra(request: Request) -> bool:
    """Whether a request is for Hydra to carry out: it sets something of Hydra's own, or draws in a file that does."""
    try:
        composed = composed_of(request)
    except UftError:
        return False
    return composed is not None and composed.needs_hydra


def composed_of(request: Request) -> Composed | None:
    """The files of the request's right choices; None where something is wrong with them, which is told elsewhere."""
    try:
        files = files_of(request)
        return files.composed(tuple(read_words(request.overrides, files).choices))
    except BROKEN:
        return None


def change(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Frozen `settings` with `overrides`, under the checks of a fresh request. UftError with every problem.

    A choice of a group (`data=pairs`) replaces that group's keys. In a run with stages an override counts for every
    stage that has such a key.
    """
    words = read_words(overrides, files_of(Request()))
    run, problems = _changed(without_stages(settings), words)
    raise_problems(problems)
    stages: dict[str, Any] = {}
    for name, whole in expanded(settings).items():
        stage, _ = _changed(whole, words)  # wrong here alone is a key that another stage's objective has
        stages[name] = {**settings[STAGES][name], "config": differing(stage, run)}
    return run | ({STAGES: stages} if stages else {})


def _changed(settings: Mapping[str, Any], words: Words) -> tuple[dict[str, Any], list[Problem]]:
    """(`settings` with `words`, what is wrong with these)."""
    problems, settings, files = list(words.problems), dict(settings), list[Setting]()
    for line in words.choices:
        group = line.partition("=")[0]
        if group in settings:
            settings[group] = examine(Request((line,))).settings[group]
        elif values := values_of(line):
            files += values
        else:
            advice = (f"its values can be given one by one; they are in  uft config {line}",)
            why = "is for a fresh run: it chooses other groups too"
            problems.append(Problem(line, why, COMMAND_LINE, advice))
    draft = Draft.of(settings, FILE)
    for setting in files:
        draft.put(setting)
    for override in words.values:
        draft.apply(override)
    if any(line.startswith(f"{REWARD}=") for line in words.choices):
        draft.complete_sources(frozen=True)
    return to_builtins(draft.judge()), [*problems, *draft.problems]


def values_of(line: str) -> list[Setting]:
    """The settings in the file of a choice (`debug=fast`), if it sets values alone; [] if it chooses files too."""
    files = files_of(Request())
    usual, chosen = files.composed(()), files.composed((line,))
    group, _, name = line.partition("=")
    others = {key: option for key, option in chosen.options.items() if key != group}
    if any(usual.options.get(key) != option for key, option in others.items()):
        return []
    return [setting for setting in chosen.settings if Path(setting.file).parts[-2:] == (group, f"{name}.yaml")]


# --- A request with stages: every stage a draft of its own, and the run's draft above them.
#
# A stage is what the same request would be with the stage's objective and data chosen, and then its own keys:
#
# 1. the files, as Hydra composes them; a key that `stages.NAME.set` gives has the place of the file it stands in: a
#    file that comes later (debug=fast) and sets it too wins over it;
# 2. what was typed for all stages;
# 3. what was typed for this stage (`stages.NAME.set`).
#
# `stages.NAME.by_round` is as `set`, with a value for each round: `uft.config.stages`.
#
# A key that is set for all stages counts for every stage that has it; one that no stage has is a mistake. Everything
# that is wrong with any stage is told at once, once if it is wrong in all of them.


BY_ROUND = "by_round"
INSIDE = (("set",), (BY_ROUND,))  # below a stage: groups of its own keys
STAGE_GROUPS = (OBJECTIVE, "data")  # groups that a stage may choose for itself
UNCLEAR_CHOICE = ""  # a choice that could not even be guessed: which keys the stage has is not known
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
SAME = ("hardware", "tracking", "run", "sweep", "arm", "rounds", STAGES)
MODEL = ("path", "name", "revision", "trust_remote_code")
MEASURED = ("holdout", "eval_path", "eval_split")


@dataclass(eq=False)
class Planned:
    """A stage while it is put together; the run itself is one too, under the name ""."""

    name: str
    request: dict[str, Any]  # the keys of the stage, valid, without those that it sets
    typed: list[Setting] = field(default_factory=list)  # keys that the command line sets for it alone
    written: str = ""  # its name in the request, which a stage of every round has
    round: Round = Round()
    draft: Draft = field(default_factory=lambda: Draft(asdict(Config())))
    settings: dict[str, Any] = field(default_factory=dict)  # in the end

    @property
    def does(self) -> str:
        return str(self.request["do"])

    @property
    def key(self) -> str:
        return f"{STAGES}.{self.written}"

    def rounds(self, count: int | None, stages: tuple[str, ...]) -> list[Planned]:
        """The stage of each round; the stage itself without rounds."""
        each = [Round(number, count, stages) for number in range(1, (count or 1) + 1)]
        return [Planned(r.name(self.written), self.request, self.typed, self.written, r) for r in each]


def judge_stages(composed: Composed, words: Words, files: Files) -> Examined:
    """Judge a request with stages. `composed` is that of the request's own choices."""
    outline, stages = outline_stages(composed, words)
    typed = [override.value() for override in words.values if path_of(override) == ("rounds",)]
    count, names = rounds_of([composed.values.get("rounds"), *typed]), tuple(stage.name for stage in stages)
    problems = [*outline.problems, *refused_choices(stages, words), *unknown_choices(stages, outline, files)]
    if any(stage.request[group] == UNCLEAR_CHOICE for stage in stages for group in STAGE_GROUPS):
        problems += [problem for stage in stages for problem in stage_rules(stage, outline)]
        return Examined(asdict(Config()), outline.origins(), references_of(outline), problems=problems)
    of_rounds = zip(*(stage.rounds(count, names) for stage in stages), strict=True)
    stages = [stage for of_round in of_rounds for stage in of_round]
    last = next((stage for stage in reversed(stages) if stage.does == "fit"), None)
    run = Planned("", {"do": "", OBJECTIVE: None, "data": last and last.request["data"]})
    for stage in (run, *stages):
        objective = stage.request[OBJECTIVE] if stage.does == "fit" or last is None else last.request[OBJECTIVE]
        judge_stage(stage, {OBJECTIVE: objective, "data": stage.request["data"]}, words, files)
    problems += merge_problems(stages)
    of_stages = [one for stage in stages for one in (*stage_rules(stage, outline), *source_rules(stage, stages))]
    problems += dict.fromkeys(of_stages)
    if stages and last is None:
        problems.append(Problem(STAGES, "none of them trains anything", advice=("one of them must be  do: fit",)))
    templates = {stage.name: stage.settings["data"]["template"] for stage in stages}
    if len(set(templates.values())) > 1:  # the evaluation is one for all stages
        each = ", ".join(f"{name}: {template}" for name, template in templates.items())
        why = "is one for all stages, which are measured alike"
        problems.append(Problem("data.template", why, advice=(each,)))
    settings, origins = assemble_run(run, last, stages, outline)
    return Examined(settings, origins, references_of(run.draft), problems=problems)


def outline_stages(composed: Composed, words: Words) -> tuple[Draft, list[Planned]]:
    """The stages as the request names them, and the draft of `stages` with what is wrong in it."""
    outline, typed = Draft({STAGES: {}}), dict[str, list[Setting]]()

    def put_in(setting: Setting) -> None:
        inside = setting.path[2:3] in INSIDE
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
            for setting in keys_below(path, override.value(), COMMAND_LINE, line):
                put_in(setting)
                if setting.path[2:3] in INSIDE and (setting.path[3:] or setting.value not in (None, {})):
                    typed.setdefault(path[1], []).append(setting)
    stages = []
    for name, stage in outline.values[STAGES].items():
        for place, fault in faults(Stage, stage, (STAGES, name)).items():
            outline.problems.append(outline.problem_at(place, fault))
            outline.put_default(place)
        stages.append(Planned(name, asdict(adapter(Stage).validate_python(stage)), typed.get(name, []), name))
    return outline, stages


def keys_below(path: KeyPath, value: object, where: str, text: str) -> Iterator[Setting]:
    """The keys below `path`, whether they were written `objective.beta: 0.3` or as a tree; () where there are none."""
    for more, item in leaves(value):
        key = tuple(part for part in ".".join((*path, *more)).split(".") if part)
        if key or item not in (None, {}):
            yield Setting(key, item, where, text)


def refused_choices(stages: Sequence[Planned], words: Words) -> Iterator[Problem]:
    """`objective=kto` where every stage names its own."""
    for group in STAGE_GROUPS:
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
        for group in STAGE_GROUPS:
            option, key = stage.request[group], f"{stage.key}.{group}"
            if option is not None and not files.has(group, option):
                advice, meant = no_such_option(group, option, list(files.groups[group]), key)
                where = outline.where((STAGES, stage.name, group))
                yield Problem(f"{key}={option}", f"no such file in conf/{group}", where, advice)
                stage.request[group] = meant.partition("=")[2] if meant else UNCLEAR_CHOICE


# every stage


def judge_stage(stage: Planned, own: Mapping[str, str | None], words: Words, files: Files) -> None:
    """Compose a stage with its `own` choices of groups, lay over it what is typed, and judge it."""
    replaced = {group: option for group, option in own.items() if option is not None}
    others = [line for line in words.chosen if line.lstrip("+").partition("=")[0] not in replaced]
    try:
        composed = files.composed((*others, *(f"{group}={option}" for group, option in replaced.items())))
        unread = list(composed.problems)
    except BROKEN as error:
        unread = [translate(error)]
    if not unread:
        stage.draft = Draft({**composed.values, STAGES: {}}, [s for s in composed.settings if s.path[0] != STAGES])
        for number, file in enumerate(composed.files, 1):
            later = {setting.path for other in composed.files[number:] for setting in other}
            inside = (s for s in file if s.path[:2] == (STAGES, stage.written) and s.path[2:3] in INSIDE)
            for setting in (one for s in inside for one in keys_below(s.path, s.value, s.where, s.text)):
                if setting.path[3:] not in later:
                    put_stage_key(setting, stage)
    apply_words(stage.draft, words)
    for setting in stage.typed:
        put_stage_key(setting, stage)
    complete(stage.draft, words, files)
    stage.round.settle(stage.draft)
    stage.draft.complete_sources()
    stage.settings = stage.draft.judge()
    stage.draft.problems = unread or stage.draft.problems


def put_stage_key(setting: Setting, stage: Planned) -> None:
    """Lay a key that a stage sets for itself, at `stages.NAME.set` or `by_round`, unless no stage can have it so."""
    own, problem = replace(setting, path=setting.path[3:]), None
    if setting.path[2] == BY_ROUND and own.path:
        own, problem = stage.round.value(own)
    why, advice, path = "", tuple[str, ...](), own.path
    if not path:
        why = "must be a group of keys"
    elif path in ((OBJECTIVE,), ("data",)):
        why, advice = "is chosen by the stage", (f"beside set, not in it:  {path[0]}: {written(own.value)}",)
    elif path[0] in SAME:
        why = f"{path[0]} is the same in all stages"
    elif path[0] == "model" and path[1:2] and path[1] in MODEL:
        why = "a stage starts from the model that the stage before it left"
    elif path in (("generate", "out"), ("annotate", "out"), ("select", "out")):
        why = "a stage writes into a folder of its own"
    if problem := problem or (Problem(own.text, why, own.where, advice) if why else None):
        stage.draft.problems.append(problem)
    else:
        stage.draft.put(own)


def merge_problems(stages: Sequence[Planned]) -> Iterator[Problem]:
    """The problems of all stages, each once, with the stages that have it where not all do.

    A key that was set for all of them and that some do not have is no problem.
    """
    having: dict[Problem, list[str]] = {}
    absent: dict[tuple[str, str], dict[str, Problem]] = {}
    for stage in stages:
        for problem in dict.fromkeys(stage.draft.problems):
            if isinstance(problem, AbsentKey) and not problem.what.startswith(f"{STAGES}."):
                absent.setdefault((problem.what, problem.where), {})[stage.name] = problem
            else:
                having.setdefault(problem, []).append(stage.name)
    for problems in absent.values():
        if len(problems) == len(stages):
            yield absent_key(problems[stages[-1].name], stages)
    for problem, names in having.items():
        if len(names) == len(stages) or problem.what.startswith(f"{STAGES}."):
            yield problem
        else:
            where = f"in stage{'s' * (len(names) > 1)} {', '.join(names)}"
            yield replace(problem, advice=(*problem.advice, where))


def absent_key(problem: Problem, stages: Sequence[Planned]) -> Problem:
    """A key that no stage has, with the keys of each. `problem`: that of one of them."""
    path = tuple(key_of(problem.what).split("."))
    group = path[0]
    place = (group,) if group == OBJECTIVE else SOURCES
    if not path[len(place) :]:  # a whole dict was typed
        return problem
    of_request = {stage.written: stage for stage in stages}.values()  # one of each, whatever the rounds
    having = [stage for stage in of_request if stage.does == "fit" or group != OBJECTIVE]
    keys = {stage: stage.draft.keys_at(place) or list(stage.draft.get(place)) for stage in having}
    shown = {stage.written: [key for key in own if key not in NOT_TYPED] for stage, own in keys.items()}
    near = nearest(path[len(place)], sorted({key for own in shown.values() for key in own}))
    meant = [hint(".".join((*place, near, *path[len(place) + 1 :])), "", ())] if near else []
    each = [
        f"{stage.written} ({group}={stage.draft.get((group, 'name'))}): {', '.join(shown[stage.written])}"
        for stage in having
    ]
    return Problem(problem.what, "no such key in any stage", problem.where, (*meant, *each))


# rules about stages


def stage_rules(stage: Planned, outline: Draft) -> Iterator[Problem]:
    """Problems of a stage by itself: its name, its kind, its reference."""
    where = next((place for own, place in outline.origins().items() if own.startswith(f"{stage.key}.")), "")
    reference = stage.request["reference"]
    if not NAME.fullmatch(stage.written):
        yield Problem(stage.key, "names a folder: letters, digits, - and _, a letter first", where)
    if reference != "start" and stage.does != "fit":
        yield Problem(f"{stage.key}.reference={reference}", f"has no meaning where do={stage.does}", where)
    if not stage.settings:
        return
    for why, example in unready(stage.does, stage.settings):
        yield Problem(stage.key, why, where, (f"{stage.key}.set={{{example}}}",))
    if reference == "initial" and stage.settings["reference"]["path"] is not None:
        yield Problem(f"{stage.key}.reference=initial", "and reference.path both name the reference", where)


def source_rules(stage: Planned, stages: Sequence[Planned]) -> Iterator[Problem]:
    """Problems of what a stage takes from earlier ones: rows of its sources, models that annotate."""
    earlier = {other.name: other for other in stages[: stages.index(stage)]}
    trained = [name for name, other in earlier.items() if other.does == "fit"]
    makers = [name for name, other in earlier.items() if other.does != "fit"]
    of_round = [other for other in earlier.values() if other.round == stage.round]
    past = stage.settings["select"]["past"] if stage.does == "select" else None
    if past and is_made(past) and (maker(past) not in makers or earlier[maker(past)].does != "select"):
        why = "no stage before this one selects under that name"
        yield Problem(f"select.past={past}", why, stage.draft.where(PAST))
    for path in stage.settings["annotate"]["models"] if stage.does == "annotate" else ():
        if is_made(path) and maker(path) not in trained:
            near = [other.written for other in of_round if other.does == "fit"]
            advices = no_such_stage(path, "stages before this one that train", near)
            place = stage.draft.where(("annotate", "models"))
            yield Problem(f"annotate.models=[{path}]", "no such stage before this one", place, advices)
    for source, node in stage.settings["data"]["sources"].items():
        if not is_made(node["path"]):
            continue
        key, path = f"data.sources.{source}", node["path"]
        what, where = f"{key}.path={path}", stage.draft.where((*SOURCES, source, "path"))
        if "@" in path and stage.round.count is None:
            yield Problem(what, "names rows by rounds, and this run has none", where, ("rounds=3",))
        elif maker(path) in trained:
            yield Problem(what, f"stage {maker(path)} trains and leaves no rows", where)
        elif maker(path) not in makers:
            near = [other.written for other in of_round if other.does != "fit"]
            advices = no_such_stage(path, "stages before this one that make rows", near)
            yield Problem(what, "no such stage before this one", where, advices)
        for leaf in MEASURED:
            if node.get(leaf):
                why = f"what {path} holds out is measured: rows to measure on are there before the first step"
                yield Problem(f"{key}.{leaf}", why, stage.draft.where((*SOURCES, source, leaf)))


def no_such_stage(path: str, label: str, stages: Sequence[str]) -> tuple[str, ...]:
    near = nearest(maker(path), stages)
    advice = hint(near and f"{MADE_BY}{near}", label, stages)
    return (advice,) if advice else ()


def assemble_run(
    run: Planned, last: Planned | None, stages: Sequence[Planned], outline: Draft
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the run's settings with its resolved stages, and the objective and data of its last fit stage; origins)."""
    settings, origins = to_builtins(run.settings), run.draft.origins()
    for group in STAGE_GROUPS if last is not None else ():
        assert last is not None
        settings[group] = last.settings[group]
        origins = {key: where for key, where in origins.items() if not key.startswith(f"{group}.")}
        origins |= {key: where for key, where in last.draft.origins().items() if key.startswith(f"{group}.")}
    nodes: dict[str, Any] = {}
    for stage in stages:
        head = {key: stage.request[key] for key in (("do", "reference") if stage.does == "fit" else ("do",))}
        nodes[stage.name] = {**head, "config": differing(to_builtins(stage.settings), settings)}
        node = f"{STAGES}.{stage.name}."
        origins |= {f"{node}config.{key}": where for key, where in stage.draft.origins().items()}
        heads = ((key.removeprefix(f"{stage.key}."), key, where) for key, where in outline.origins().items())
        origins |= {node + rest: where for rest, key, where in heads if rest != key}
    return settings | {STAGES: nodes}, origins
