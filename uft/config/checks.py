"""A configuration while it is put together: what was composed, what is laid over it, and what is wrong with the whole.

pydantic judges types, ranges and choices by the schema (:mod:`uft.config.schema`); here its errors get the place where
the value was set and what was probably meant, and so do the rules between keys that are broken
(:mod:`uft.config.rules`). Nothing here imports Hydra: a worker reads its frozen configuration with it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from uft.config.messages import (
    COMMAND_LINE,
    TRL_KEYS,
    bare,
    belongs_to,
    choices,
    config_dirs,
    expected,
    groups,
    hint,
    item_of,
    listing,
    nearest,
    right_type,
    written,
)
from uft.config.parameters import parameters, schema_with
from uft.config.rules import BY_METHOD, rules_broken
from uft.config.schema import (
    MISSING,
    REFERENCE,
    Config,
    KeyPath,
    default_of,
    fields_of,
    is_open,
    kind_at,
    leaves,
    resolved,
    value_at,
)
from uft.errors import Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OBJECTIVE, REWARD = "objective", "reward"
NOT_TYPED = ("name", "method")  # keys of an objective that its file sets; they cannot be overridden
UNKNOWN_KEY = "unexpected_keyword_argument"  # pydantic's type of the error of a key that there is not
BOUNDS = {"greater_than_equal": "at least", "greater_than": "above", "less_than_equal": "at most", "less_than": "below"}


@dataclass(frozen=True)
class Setting:
    """One value that a file or the command line sets."""

    path: KeyPath
    value: Any
    where: str  # "command line", "conf/data/mix.yaml:12"
    text: str  # as it was written, roughly: "objective.bta=0.2"

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def file(self) -> str:
        """Where, without the line."""
        return self.where.rpartition(":")[0] or self.where


class AbsentKey(Problem):
    """A key of an objective, or a source, that is not there; in a run of several stages another one may have it."""


@dataclass(frozen=True)
class Fault:
    """An error of pydantic's: its type, the bound that was crossed, and the value."""

    type: str
    value: Any
    bound: Any = None


def path_of(override: Override) -> KeyPath:
    return tuple(re.findall(r"[^.\[\]]+", override.key_or_group))


class Draft:
    """Nested values, references unresolved, the setting behind each, and the problems that were found.

    A wrong setting is noted as a problem and left out, so that one mistake does not hide the next.
    """

    def __init__(self, values: Mapping[str, Any], files: Sequence[Setting] = ()) -> None:
        """`values`: a whole configuration; `files`: the settings of the files it was composed of, in their order."""
        self.values: dict[str, Any] = copy.deepcopy(dict(values))
        self.settings: list[Setting] = []  # a later one wins
        self.problems: list[Problem] = []
        self.schema = schema_of(files)
        for setting in files:
            if self.misfits(setting):
                self.put_default(setting.path)
            else:
                self.settings.append(setting)
                if self.is_unsaid(setting) and self.get(setting.path) is None:
                    value_at(self.values, setting.path[:-1])[setting.path[-1]] = {}
        before: dict[KeyPath, Setting] = {}
        for setting in files:  # a file of conf/debug makes shorter what there is, and brings nothing back
            is_debug, last = Path(setting.file).parent.name == "debug", before.get(setting.path)
            if is_debug and last is not None and last.value == 0 and setting.value:
                self.put(last)
            before[setting.path] = setting

    @classmethod
    def of(cls, settings: Mapping[str, Any], file: str) -> Draft:
        """The draft of resolved settings that stand in `file`, without stages; absent keys have their defaults."""
        own = ((path, value) for path, value in leaves(settings) if path[0] != "stages")
        return cls.laid([Setting(path, value, file, ".".join(path)) for path, value in own])

    @classmethod
    def laid(cls, settings: Sequence[Setting]) -> Draft:
        """The draft of settings laid over the defaults."""
        draft = cls(dataclasses.asdict(Config()))
        draft.schema = schema_of(settings)
        for setting in settings:
            draft.put(setting)
        return draft

    def misfits(self, setting: Setting) -> bool:
        """Whether a value stands where a group of keys has to. It is noted, and must not hide the keys of the group."""
        kind = kind_at(setting.path, self.schema)
        is_group = bool(fields_of(kind)) or is_open(kind)
        unsaid = setting.value is None and (kind != bare(kind) or self.is_unsaid(setting))
        if not is_group or isinstance(setting.value, dict) or unsaid:
            return False
        self.problems.append(self.wrong_type(setting, setting.value))
        return True

    @staticmethod
    def is_unsaid(setting: Setting) -> bool:
        """Whether a named source or stage has no keys at all: `sources: {mine: }`."""
        return setting.value is None and setting.path[:-1] in (("data", "sources"), ("stages",))

    def put(self, setting: Setting) -> None:
        """Lay one value over what is there."""
        if self.misfits(setting):
            return
        node, value = self.values, {} if self.is_unsaid(setting) else setting.value
        for part in setting.path[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        if not (value == {} and isinstance(node.get(setting.path[-1]), dict)):
            node[setting.path[-1]] = value
        self.settings.append(setting)

    def put_default(self, path: KeyPath) -> None:
        """Put a key back to its default; one that has none is taken away."""
        node, name = value_at(self.values, path[:-1]), path[-1]
        fields = fields_of(kind_at(path[:-1], self.schema))
        if isinstance(node, dict) and name in fields:
            node[name] = default_of(fields[name])
        elif isinstance(node, dict):
            node.pop(name, None)

    def apply(self, override: Override) -> None:
        """Lay one override of the command line, or note what is wrong with it."""
        line, path = str(override.input_line), path_of(override)
        if problem := self.refusal(override, line, path):
            self.problems.append(problem)
        elif override.is_delete():
            del self.get(path[:-1])[path[-1]]
            self.settings = [setting for setting in self.settings if setting.path[: len(path)] != path]
        else:
            for more, item in leaves(override.value()):
                self.put(Setting((*path, *more), item, COMMAND_LINE, line))

    def refusal(self, override: Override, line: str, path: KeyPath) -> Problem | None:
        """The problem of an override that cannot be laid; None where it can."""
        if override.package is not None:
            return Problem(line, f"{override.key_or_group} is not a group", COMMAND_LINE)
        if override.is_delete():
            is_open = self.is_open(path[:-1])
            if is_open and path[-1] in (self.get(path[:-1]) or {}):
                return None
            why = "only named sources, stages and free keys can be removed"
            return (AbsentKey if is_open else Problem)(line, why, COMMAND_LINE)
        if path[0] in BY_METHOD and path[-1] == "method":
            advice = (f"choose another:  {path[0]}=NAME",)
            return Problem(line, f"comes with the {path[0]}'s file", COMMAND_LINE, advice)
        if override.is_add() and self.get(path) is not None and not isinstance(override.value(), (dict, list)):
            return Problem(line, "has a value already", COMMAND_LINE, (f"without the +:  {line[1:]}",))
        if override.is_add() or override.is_force_add():
            return None
        places = ((path[:depth], path[depth]) for depth in range(2, len(path)))  # a new name is where + is right
        if any(self.is_open(place) and name not in (self.get(place) or {}) for place, name in places):
            why = f"nothing of that name in {'.'.join(path[:-1])}"
            return AbsentKey(line, why, COMMAND_LINE, (f"to add it:  +{line}",))
        return None

    def get(self, path: KeyPath) -> Any:
        """The value at a path, unresolved; None where there is none."""
        value = value_at(self.values, path)
        return None if value == MISSING else value

    def is_open(self, path: KeyPath) -> bool:
        return is_open(kind_at(path, self.schema))

    def complete_sources(self, frozen: bool = False) -> None:
        """Set the run's reward as the checker of every source whose checker is not set.

        `frozen`: the settings are those of a run, in which null means "not set" unless the command line gave it.
        """
        method = self.get((REWARD, "method"))
        given = {setting.path for setting in self.settings if not frozen or setting.where == COMMAND_LINE}
        for name in (self.get(("data", "sources")) or ()) if isinstance(method, str) else ():
            path = ("data", "sources", name, "checker")
            if path not in given and (not frozen or self.get(path) is None):
                self.put(Setting(path, method, "after reward", f"{REWARD}={self.get((REWARD, 'name'))}"))

    # what is wrong

    def judge(self) -> dict[str, Any]:
        """The settings, references resolved; `problems` are complete then. Defaults stand in for wrong values."""
        settings, wrong = self.finish()
        typed = [setting.key for setting in self.settings if setting.where == COMMAND_LINE]
        for key, why, advice in rules_broken(settings, wrong.keys(), typed):
            path = tuple(key.split("."))
            wrong[key] = self._against_rule(path, value_at(settings, path), why, advice)
        self.problems += wrong.values()
        return settings

    def finish(self) -> tuple[dict[str, Any], dict[str, Problem]]:
        """(the settings that `judge` returns, the problems of single keys); the rules between keys are not asked."""
        values, lost = resolved(self.values)
        at_fault = faults(self.schema, values)
        unknown = {path for path, fault in at_fault.items() if fault.type == UNKNOWN_KEY}
        lost = {path for path in lost if not unknown & {path[:depth] for depth in range(1, len(path) + 1)}}
        at_fault |= {path: Fault("lost", self.get(path)) for path in lost}
        given = {path: self.get(path) for path in at_fault}
        for path in at_fault:
            self.put_default(path)
        valid = adapter(self.schema).validate_python(resolved(self.values)[0] if at_fault else values)
        settings: dict[str, Any] = adapter(self.schema).dump_python(valid)
        at_fault = {path: Fault("missing", None) for path, value in leaves(settings) if value == MISSING} | at_fault
        wrong: dict[str, Problem] = {}
        for path, fault in at_fault.items():
            reference = REFERENCE.fullmatch(str(given.get(path)))
            if fault.type == "lost" or not (reference and tuple(reference[1].split(".")) in at_fault):
                wrong[".".join(path)] = self.problem_at(path, fault)
        if not settings[OBJECTIVE]:
            wrong[OBJECTIVE] = Problem(OBJECTIVE, "not chosen", advice=(f"give it:  {OBJECTIVE}=...",))
        elif not settings[OBJECTIVE].get("method") and f"{OBJECTIVE}.method" not in wrong:
            wrong[f"{OBJECTIVE}.method"] = self.problem_at((OBJECTIVE, "method"), Fault("literal_error", None))
        return settings, wrong

    def problem_at(self, path: KeyPath, fault: Fault) -> Problem:
        """A fault in words: the setting that it comes from, its place, and what was probably meant."""
        kind = kind_at(path, self.schema)
        setting = next((s for s in reversed(self.settings) if s.path[: len(path)] == path), None)
        setting = setting or Setting(path, fault.value, "", ".".join(path))
        if fault.type == "missing":
            inside = [s for s in self.settings if s.path[:2] == ("data", "sources") and len(s.path) > 3]
            # a key of a source that is called otherwise
            others = [s.path[2] for s in inside if s.path[3:] == ("path",) and s.path[:3] != path[:3]]
            keys = [s for s in inside if s.path[:3] == path[:3]] if path[3:] == ("path",) else []
            meant = [f"did you mean  {'.'.join((*path[:2], other, *s.path[3:]))} ?" for s in keys for other in others]
            return Problem(setting.key, "has no value", setting.where, (f"give it:  {setting.key}=...", *meant[:3]))
        if fault.type == "lost":
            return self._against_rule(path, None, f"refers to something that has no value: {fault.value}")
        if fault.type == UNKNOWN_KEY:
            return self.unknown(setting, path)
        if len(setting.path) > len(path):
            return Problem(setting.text, f"{'.'.join(path)} is a value and has no keys of its own", setting.where)
        if fault.type == "literal_error":
            is_method = path[0] in BY_METHOD and path[-1] == "method"
            options = list(parameters(path[0])) if is_method else choices(kind)
            near = nearest(str(fault.value), options)
            advice = hint(near and f"{setting.key}={near}", "methods" if is_method else "choices", options)
            why = "no such method" if is_method else "no such choice"
            packages = "or of a package that is not installed here:  uft docs rewards"
            return self._against_rule(path, fault.value, why, (advice, packages)[: 1 + (is_method and not near)])
        if fault.type in BOUNDS:
            value = float(fault.value) if bare(kind) is float else fault.value
            return self._against_rule(path, value, f"must be {BOUNDS[fault.type]} {fault.bound:g}")
        if fault.type == "finite_number":
            return self._against_rule(path, fault.value, "must be a finite number")
        return self.wrong_type(setting, fault.value)

    def where(self, path: KeyPath) -> str:
        return next((setting.where for setting in reversed(self.settings) if setting.path == path), "")

    def origins(self) -> dict[str, str]:
        """Where each value was set, by dotted key; nothing for defaults."""
        return {setting.key: setting.where for setting in self.settings}

    def _against_rule(self, path: KeyPath, value: Any, why: str, advice: tuple[str, ...] = ()) -> Problem:
        key = ".".join(path)
        return Problem(key if value in (None, {}) else f"{key}={written(value)}", why, self.where(path), advice)

    def wrong_type(self, setting: Setting, value: Any) -> Problem:
        kind = kind_at(setting.path, self.schema)
        keys = fields_of(kind) or fields_of(item_of(kind))
        advice = (f"its keys: {listing(keys)}",) if keys else right_type(kind, value)
        what = setting.text if "=" in setting.text else f"{setting.text}={written(value)}"
        return Problem(what, f"must be {expected(kind)}", setting.where, advice)

    def unknown(self, setting: Setting, path: KeyPath) -> Problem:
        """The problem of a key, at `path` or above the setting, that the schema does not have."""
        prefix, siblings = path[:-1], self.keys_at(path[:-1])
        of_trl, _, note = TRL_KEYS.get(".".join(path), TRL_KEYS.get(path[-1], "")).partition(": ")
        known_elsewhere = of_trl or (elsewhere(path[0], self) if not prefix else None)  # steps is train.steps
        near = None if known_elsewhere else nearest(path[-1], siblings)
        meant = ".".join((*prefix, near, *setting.path[len(path) :])) if near else elsewhere(setting.path[-1], self)
        if len(path) == 1 and near in groups(config_dirs()):
            meant = f"{near}={written(setting.value)}"
        if prefix in ((), ("data",)) and isinstance(setting.value, str) and not of_trl:
            from uft.data.readers import reader_of

            if reader_of(Path(setting.value)):  # file=rows.jsonl
                held_out = re.search("eval|test|val", path[-1])
                meant = f"{'data.sources.NAME.eval_path' if held_out else 'data'}={setting.value}"
        shown = [key for key in siblings if prefix[:1] not in ((OBJECTIVE,), (REWARD,)) or key not in NOT_TYPED]
        known = [] if of_trl or (meant and not prefix) else shown  # of all groups a long line, which helps no more
        advice = hint(of_trl or meant, "keys" if prefix else "groups and keys", known)
        advice = f"{of_trl}: {note}" if note else advice
        unknown = not prefix and meant is None and not of_trl  # beta, of an objective that has none
        more = belongs_to(path[-1]) if prefix[:1] == (OBJECTIVE,) or unknown else ()
        place = f" in {'.'.join(prefix)}" if prefix else ""
        is_objective = prefix[:1] == (OBJECTIVE,) and "method" in siblings
        if "method" in siblings:
            place += f"={self.get((*prefix, 'name')) or self.get((*prefix, 'method'))}"
        kind = AbsentKey if is_objective else Problem
        return kind(setting.text, f"no such key{place}", setting.where, (advice, *more))

    def keys_at(self, path: KeyPath) -> list[str]:
        """The keys of the group at `path`, in their order."""
        return list(fields_of(kind_at(path, self.schema)))


# --- Where a key is, and which keys there are.


def elsewhere(leaf: str, draft: Draft) -> str | None:
    """The same last name somewhere else among the keys, or the key that TRL calls so: `lr` is optim.lr."""
    if leaf in fields_of(Config):
        return leaf
    matches = [f"{group}.{leaf}" for group in fields_of(Config) if leaf in draft.keys_at((group,))]
    matches.sort(key=lambda match: match.split(".")[0] in ("model", "generate", "seeds"))
    return matches[0] if matches else TRL_KEYS.get(leaf, "").partition(": ")[0] or None


def schema_of(settings: Sequence[Setting]) -> Any:
    """The schema of a configuration with these settings of files: an objective has the keys that its file names.

    Its method knows more of them than one preset of it has a use for (`objective=dpo` says nothing of `lam`). An
    objective may hold others (`per_kind`).
    """
    methods = {s.path[:-1]: s for s in settings if s.path[0] in BY_METHOD and s.path[-1] == "method"}
    objectives = []
    for place, method in methods.items():
        inside = [s for s in settings if s.path[: len(place)] == place]
        named = [s.path[len(place)] for s in inside if s.file == method.file or s.path[len(place) + 1 :] == ("method",)]
        objectives.append((place, str(method.value), tuple(dict.fromkeys(named))))
    return schema_with(tuple(sorted(objectives, key=lambda one: -len(one[0]))))


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def faults(kind: Any, values: Any, place: KeyPath = ()) -> dict[KeyPath, Fault]:
    """pydantic's errors by path below `place`, the first of each key."""
    try:
        adapter(kind).validate_python(values)
    except ValidationError as error:
        of_path: dict[KeyPath, Fault] = {}
        for one in error.errors(include_url=False):
            names = takewhile(lambda part: isinstance(part, str), one["loc"])  # a number: a place in a list
            path = tuple(map(str, names))
            bound = next(iter(one.get("ctx", {}).values()), None)
            kind_of_error = UNKNOWN_KEY if one["type"] == "extra_forbidden" else one["type"]
            if isinstance(one["loc"][-1], str) and path != one["loc"]:  # a key of a group in a list
                kind_of_error = "list_item"
            of_path.setdefault((*place, *path), Fault(kind_of_error, value_at(values, path), bound))
        return of_path
    return {}
