"""A configuration while it is put together: what was composed, what is laid over it, and what is wrong with the whole.

pydantic judges types, ranges and choices by the schema (:mod:`uft.config.schema`); here its errors get the place where
the value was set and what was probably meant. The rules between keys stand below. Nothing here imports Hydra: a
worker reads its frozen configuration with it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from uft.config.messages import (
    COMMAND_LINE,
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
from uft.config.schema import (
    MISSING,
    REFERENCE,
    Config,
    KeyPath,
    default_of,
    fields_of,
    flat,
    is_open,
    kind_at,
    needed_rollouts,
    parameters,
    problems_of,
    resolved,
    schema_with,
    taken_kinds,
    value_at,
    wants_teacher,
)
from uft.data.rows import part_of
from uft.errors import Problem, secret_in, secrets

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OBJECTIVE, REWARD = "objective", "reward"
BY_METHOD = (OBJECTIVE, REWARD)  # groups whose keys are those of the class that their file names
NOT_TYPED = ("name", "method")  # keys of an objective that its file sets; they cannot be overridden
UNKNOWN = "unexpected_keyword_argument"  # pydantic's type of the error of a key that there is not
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


class Absent(Problem):
    """A key of an objective, or a source, that is not there; in a run of several stages another one may have it."""


@dataclass(frozen=True)
class Fault:
    """An error of pydantic's: its type, the bound that was crossed, and the value."""

    type: str
    value: Any
    bound: Any = None


def leaves(value: Mapping[Any, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of everything in a nested dict that is not itself a filled dict."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from leaves(item, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), item


def path_of(override: Override) -> KeyPath:
    return tuple(re.findall(r"[^.\[\]]+", override.key_or_group))


class Draft:
    """Nested values, references unresolved, the setting behind each, and the problems that were found.

    A setting that cannot stand is told of and left out, so that one mistake does not hide the next.
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
        """Whether a value stands where a group of keys has to; it is told of and must not hide what is in the group."""
        kind = kind_at(setting.path, self.schema)
        is_group = bool(fields_of(kind)) or is_open(kind)
        unsaid = setting.value is None and (kind != bare(kind) or self.is_unsaid(setting))
        if not is_group or isinstance(setting.value, dict) or unsaid:
            return False
        self.problems.append(self.wrong_type(setting, setting.value))
        return True

    @staticmethod
    def is_unsaid(setting: Setting) -> bool:
        """Whether this is a named source or stage of which nothing is said: `sources: {mine: }`."""
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
        added = override.is_add() or override.is_force_add()
        why, advice, kind = "", tuple[str, ...](), Problem
        places = ((path[:depth], path[depth]) for depth in range(2, len(path)))  # a new name is where + is right
        is_new = any(self.is_open(place) and name not in (self.get(place) or {}) for place, name in places)
        if override.package is not None:
            why = f"{override.key_or_group} is not a group"
        elif override.is_delete():
            named = self.get(path[:-1]) or {}
            if self.is_open(path[:-1]) and path[-1] in named:
                del named[path[-1]]
                self.settings = [setting for setting in self.settings if setting.path[: len(path)] != path]
                return
            kind = Absent if self.is_open(path[:-1]) else Problem
            why = "only named sources, stages and free keys can be removed"
        elif path[0] in BY_METHOD and path[-1] == "method":
            why, advice = f"comes with the {path[0]}'s file", (f"choose another:  {path[0]}=NAME",)
        elif override.is_add() and self.get(path) is not None and not isinstance(override.value(), (dict, list)):
            why, advice = "has a value already", (f"without the +:  {line[1:]}",)
        elif is_new and not added:
            kind, why = Absent, f"nothing of that name in {'.'.join(path[:-1])}"
            advice = (f"to add it:  +{line}",)
        else:
            value: Any = override.value()
            for more, item in leaves(value) if isinstance(value, dict) and value else [((), value)]:
                self.put(Setting((*path, *more), item, COMMAND_LINE, line))
            return
        self.problems.append(kind(line, why, COMMAND_LINE, advice))

    def get(self, path: KeyPath) -> Any:
        """The value at a path, unresolved; None where there is none."""
        value = value_at(self.values, path)
        return None if value == MISSING else value

    def is_open(self, path: KeyPath) -> bool:
        return is_open(kind_at(path, self.schema))

    def complete_model(self) -> None:
        """Lay what follows from a model's path and adapter: a learning rate that its file gives was meant for others.

        A model of `model=custom` is called after its path, and its rate goes by its size. Any other file's rate is for
        its own adapter. What was set elsewhere, on the command line or in an experiment, stays.
        """
        path, is_lora = self.get(("model", "path")), self.get(("model", "adapter")) == "lora"
        latest = {setting.path[1]: setting for setting in self.settings if setting.path[:1] == ("model",)}
        name, lr = latest.get("name"), latest.get("lr")
        if not isinstance(path, str):
            return
        if name is not None and Path(name.file).name == CUSTOM and (called := name_of_model(path)):
            self.put(Setting(("model", "name"), called, "after model.path", name.text))
        if lr is None or (Path(lr.file).parent.name != "model" and not lr.text.startswith("init_from=")):
            return
        own = [s for s in self.settings if s.file == lr.file and s.path == ("model", "adapter")]
        meant = bool(own) and own[-1].value == "lora"
        if Path(lr.file).name == CUSTOM:
            rate, why = first_rate(path, is_lora), "by size and adapter"
        elif meant == is_lora or not isinstance(lr.value, int | float):
            return
        elif is_lora:
            rate, why = max(lr.value, min(10 * lr.value, HIGHEST_RATE)), f"{lr.where}, tenfold for an adapter"
        else:
            rate, why = lr.value / 10, f"{lr.where}, a tenth for all weights"
        self.put(Setting(("model", "lr"), float(f"{rate:.3g}"), why, lr.text))

    def complete_sources(self) -> None:
        """Lay the run's reward as the checker of every source that says nothing of one."""
        method, said = self.get((REWARD, "method")), {setting.path for setting in self.settings}
        for name in (self.get(("data", "sources")) or ()) if isinstance(method, str) else ():
            if (path := ("data", "sources", name, "checker")) not in said:
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
        """(the settings as `judge` has them; what is wrong with each by itself, by dotted key)."""
        values, lost = resolved(self.values)
        found = faults(self.schema, values)
        unknown = {path for path, fault in found.items() if fault.type == UNKNOWN}
        lost = {path for path in lost if not unknown & {path[:depth] for depth in range(1, len(path) + 1)}}
        found |= {path: Fault("lost", self.get(path)) for path in lost}
        given = {path: self.get(path) for path in found}
        for path in found:
            self.put_default(path)
        valid = adapter(self.schema).validate_python(resolved(self.values)[0] if found else values)
        settings: dict[str, Any] = adapter(self.schema).dump_python(valid)
        found = {path: Fault("missing", None) for path, value in leaves(settings) if value == MISSING} | found
        wrong: dict[str, Problem] = {}
        for path, fault in found.items():
            reference = REFERENCE.fullmatch(str(given.get(path)))
            if fault.type == "lost" or not (reference and tuple(reference[1].split(".")) in found):
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
            return Problem(setting.key, "has no value", setting.where, (f"give it:  {setting.key}=...",))
        if fault.type == "lost":
            return self._against_rule(path, None, f"refers to something that has no value: {fault.value}", ())
        if fault.type == UNKNOWN:
            return self.unknown(setting, path)
        if len(setting.path) > len(path):
            return Problem(setting.text, f"{'.'.join(path)} is a value and has no keys of its own", setting.where)
        if fault.type == "literal_error":
            is_method = path[0] in BY_METHOD and path[-1] == "method"
            options = list(parameters(path[0])) if is_method else choices(kind)
            near = nearest(str(fault.value), options)
            advice = hint(near and f"{setting.key}={near}", "methods" if is_method else "choices", options)
            why = "no such method" if is_method else "no such choice"
            return self._against_rule(path, fault.value, why, (advice,))
        if fault.type in BOUNDS:
            value = float(fault.value) if bare(kind) is float else fault.value
            return self._against_rule(path, value, f"must be {BOUNDS[fault.type]} {fault.bound:g}", ())
        return self.wrong_type(setting, fault.value)

    def where(self, path: KeyPath) -> str:
        return next((setting.where for setting in reversed(self.settings) if setting.path == path), "")

    def origins(self) -> dict[str, str]:
        """Where each value was set, by dotted key; nothing for defaults."""
        return {setting.key: setting.where for setting in self.settings}

    def _against_rule(self, path: KeyPath, value: Any, why: str, advice: tuple[str, ...]) -> Problem:
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
        known_elsewhere = elsewhere(path[0], self) if not prefix else None  # steps is train.steps
        near = None if known_elsewhere else nearest(path[-1], siblings)
        meant = ".".join((*prefix, near, *setting.path[len(path) :])) if near else elsewhere(setting.path[-1], self)
        if len(path) == 1 and near in groups(config_dirs()):
            meant = f"{near}={written(setting.value)}"
        shown = [key for key in siblings if prefix[:1] not in ((OBJECTIVE,), (REWARD,)) or key not in NOT_TYPED]
        advice = hint(meant, "keys" if prefix else "groups and keys", shown)
        more = belongs_to(path[-1]) if prefix[:1] == (OBJECTIVE,) else ()
        place = f" in {'.'.join(prefix)}" if prefix else ""
        is_objective = prefix[:1] == (OBJECTIVE,) and "method" in siblings
        if "method" in siblings:
            place += f"={self.get((*prefix, 'name')) or self.get((*prefix, 'method'))}"
        kind = Absent if is_objective else Problem
        return kind(setting.text, f"no such key{place}", setting.where, (advice, *more))

    def keys_at(self, path: KeyPath) -> list[str]:
        """The keys of the group at `path`, in their order."""
        return list(fields_of(kind_at(path, self.schema)))


# --- What follows from a model's path.

CUSTOM = "custom.yaml"  # conf/model's file of models that are given by their path
HIGHEST_RATE = 1e-3  # of first learning rates
SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)


def name_of_model(path: str) -> str:
    """What a model is called: the last part of its path, RUN for RUN/model; "" where that is no name."""
    parts = [part for part in path.split("/") if re.search(r"\w", part)]
    parts = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
    return re.sub(r"[^\w.+-]", "_", parts[-1].rpartition(":")[2])[:60] if parts else ""


def size_of_model(path: str) -> float | None:
    """Roughly how many parameters: of the weights in a folder, or as the name says (Qwen2.5-0.5B); None: not known."""
    found = 0
    for file in Path(path).glob("*.safetensors") if os.path.isdir(path) else ():
        try:
            with file.open("rb") as opened:
                header = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), 100_000_000)))
            found += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # told when it is loaded
    sizes = SIZE_IN_NAME.findall(path.rstrip("/").rpartition("/")[2])
    return found or (float(sizes[-1][0]) * {"m": 1e6, "b": 1e9}[sizes[-1][1].lower()] if sizes else None)


def first_rate(path: str, is_lora: bool) -> float:
    """A first learning rate for a model of which only its path is known: by its size, and tenfold for an adapter."""
    size = size_of_model(path)
    rate = 1e-5 if size is None or size > 3e8 else 2e-5 if size > 1e7 else HIGHEST_RATE
    return min(10 * rate, HIGHEST_RATE) if is_lora else rate


def elsewhere(leaf: str, draft: Draft) -> str | None:
    """The same last name somewhere else among the keys: `lr` is optim.lr."""
    matches = [f"{group}.{leaf}" for group in fields_of(Config) if leaf in draft.keys_at((group,))]
    matches.sort(key=lambda match: match.split(".")[0] in ("model", "generate", "seeds"))
    return matches[0] if matches else None


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
    """What pydantic finds wrong with values, by path below `place`; the first thing of each key."""
    try:
        adapter(kind).validate_python(values)
    except ValidationError as error:
        found: dict[KeyPath, Fault] = {}
        for one in error.errors(include_url=False):
            path = tuple(
                map(str, takewhile(lambda part: isinstance(part, str), one["loc"]))
            )  # a number: a place in a list
            bound = next(iter(one.get("ctx", {}).values()), None)
            kind_of_error = UNKNOWN if one["type"] == "extra_forbidden" else one["type"]
            if isinstance(one["loc"][-1], str) and path != one["loc"]:  # a key of a group in a list
                kind_of_error = "list_item"
            found.setdefault((*place, *path), Fault(kind_of_error, value_at(values, path), bound))
        return found
    return {}


# --- Rules between keys: each reads what it needs, and says nothing where that is missing or wrong itself.


Settings = dict[str, Any]
LONGEST_NAME = 200  # bytes; file systems allow 255, and our temporary files have longer names


Broken = tuple[str, str, tuple[str, ...]]
"""A dotted key, why its value breaks a rule, advice."""


def rules_broken(settings: Settings, wrong: Collection[str], typed: Collection[str]) -> list[Broken]:
    """The rules that settings break, at most one a key.

    `wrong` are the keys whose values are wrong by themselves: rules see them as not given. `typed` are those that the
    command line sets.
    """
    settings = copy.deepcopy(settings) if wrong else settings
    for path in (tuple(key.split(".")) for key in wrong if "." in key):
        node = value_at(settings, path[:-1])
        if isinstance(node, dict) and path[-1] in node:
            node.pop(path[-1]) if path[0] in BY_METHOD else node.update({path[-1]: None})
    found = [one for rule in RULES for one in rule(settings)]
    steps = settings["train"]["steps"]
    if "train.epochs" in typed and steps is not None:
        found.insert(0, broken("train.epochs", f"does nothing beside train.steps={steps}", "add  train.steps=null"))
    return list({one[0]: one for one in reversed(found) if one[0] not in wrong}.values())[::-1]


def broken(key: str, why: str, *advice: str) -> Broken:
    return key, why, advice


def numbers(settings: Settings) -> Iterator[Broken]:
    warmup, steps = settings["optim"]["warmup"], settings["train"]["steps"]
    if warmup is not None and warmup >= 1:
        if warmup != int(warmup):
            yield broken("optim.warmup", "must be a share below 1 or a whole number of steps")
        elif steps is not None and warmup >= steps:
            yield broken("optim.warmup", f"leaves no step after the warm-up: train.steps={steps}")
    betas, seeds = settings["optim"]["betas"], settings["generate"]["seeds"]
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        yield broken("optim.betas", "must be two numbers, at least 0 and below 1")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        yield broken("generate.seeds", "must be different seeds, at least one")


def adapters(settings: Settings) -> Iterator[Broken]:
    adapter = settings["model"]["adapter"]
    if settings["reference"]["mode"] == "adapter_off":
        if adapter == "none":
            advice = "model.adapter=lora  or  reference.mode=auto"
            yield broken("reference.mode", "needs an adapter to switch off", advice)
        if settings["reference"]["path"] is not None:
            why = "is another model, and switching the adapter off gives the initial policy"
            yield broken("reference.path", why, "reference.mode=auto")
    if settings["reference"]["sync_every"] is not None:
        if adapter == "lora":
            why = "moves the weights of a whole copy, and an adapter trains none of those"
            yield broken("reference.sync_every", why, "model.adapter=none")
        elif settings["hardware"]["sharding"] == "full":
            yield broken("reference.sync_every", "needs whole weights on every device", "hardware.sharding=none")
        if settings["reference"]["mode"] == "cached":
            yield broken("reference.mode", "keeps the log-probs of a reference that stays", "reference.mode=auto")
    if adapter == "lora" and settings["model"]["lora"]["targets"] == []:
        yield broken("model.lora.targets", "names no layer to adapt", "for all linear layers:  [all-linear]")


def mixture(settings: Settings) -> Iterator[Broken]:
    sources, ratio = settings["data"]["sources"], settings["data"]["ratio"]
    if not sources:
        advice = "+data.sources.mine.path=rows.jsonl", "or a mixture that has some:  data=mix"
        yield broken("data.sources", "the mixture has no sources", *advice)
    elif all(source.get("share") == 0 for source in sources.values()):
        yield broken("data.sources", "every share is 0")
    kinds = [source.get("kind") for source in sources.values()]
    if ratio is not None and kinds and None not in kinds:  # where kinds are named, the ratio must have two sides
        shown = kinds.count("demonstration") + kinds.count("negatives")
        if (ratio < 1 and shown == len(kinds)) or (ratio > 0 and shown == 0):
            side = "demonstrations only" if shown else "no demonstrations"
            why = f"shares between demonstrations and the rest, and the mixture has {side}"
            yield broken("data.ratio", why)


def held_out(settings: Settings) -> Iterator[Broken]:
    for name, source in settings["data"]["sources"].items():
        key = f"data.sources.{name}"
        ways = [way for way in ("holdout", "eval_path", "eval_split") if source.get(way) is not None]
        if len(ways) > 1:
            why = f"and {ways[0]} both say which rows are for evaluation: give one"
            yield broken(f"{key}.{ways[1]}", why)
        part = source.get("part")
        if part is not None and part_of(part, 0) is None:
            why = "must be r/n, the r-th of n slices; round has a meaning in a run of rounds alone"
            yield broken(f"{key}.part", why, "rounds=3") if part == "round" else broken(f"{key}.part", why)
        ends = source.get("score_range")
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            yield broken(f"{key}.score_range", "must be [lowest, highest]")
    for key in (
        "select.rows",
        "data.holdout",
        *(f"data.sources.{name}.holdout" for name in settings["data"]["sources"]),
    ):
        amount = value_at(settings, tuple(key.split(".")))
        if amount is not None and amount > 1 and amount != int(amount):
            yield broken(key, "must be a share below 1 or a whole number of rows")


def names(settings: Settings) -> Iterator[Broken]:
    """Names that become folders, and names of sources, which stand in the names of metrics and of files."""
    for key, name in (("run.name", settings["run"]["name"]), ("sweep.name", settings["sweep"]["name"])):
        bad = sorted(set(str(name or "")) & set("/\\=,"))
        if bad or name in ("", ".", ".."):
            yield broken(key, "names a folder", f"without {listing(bad)}" if bad else "give it a real name")
        elif name is not None:
            yield from _plain_name(key, name)
    for part in str(settings["run"]["dir"] or "").split("/"):
        yield from _plain_name("run.dir", part)
    for name in settings["data"]["sources"]:
        key = f"data.sources.{name}"
        if set(name) & set("/\\") or name in ("", ".", ".."):
            yield broken(key, "names files and metrics", "without / and \\")
        else:
            yield from _plain_name(key, name)


def _plain_name(key: str, name: str) -> Iterator[Broken]:
    if not name.isprintable():
        why = "has a character that cannot be shown"
        yield broken(key, why, "letters, digits and -_.+ are fine")
    elif len(name.encode()) > LONGEST_NAME:
        yield broken(key, f"is too long for a file's name: at most {LONGEST_NAME} bytes")


def no_secret(settings: Settings) -> Iterator[Broken]:
    """A configuration is written down, sent to W&B and compared by others."""
    known = secrets()
    for key, value in flat({**settings, "stages": {}}):
        texts = list(value) if isinstance(value, list) else [value]
        if key == "run.dir":
            texts += str(value or "").split("/")  # the last part names the run, and others may name a sweep
        what = next((found for text in texts if isinstance(text, str) and (found := secret_in(text, known))), None)
        if what:
            why = f"holds {what}, and configurations are written down"
            yield broken(key, why, "leave it in the environment")


def machines(settings: Settings) -> Iterator[Broken]:
    nodes, rank = settings["hardware"]["nodes"] or 1, settings["hardware"]["node_rank"]
    if rank is not None and rank >= nodes:
        yield broken("hardware.node_rank", f"counts from 0 to {nodes - 1}: hardware.nodes={nodes}")
    pool, processes = settings["hardware"]["pool"], settings["hardware"]["processes"] or 1
    if pool is not None and len(set(pool)) < max(processes, len(pool)):
        why = f"must be different numbers, at least {processes}: hardware.processes"
        yield broken("hardware.pool", why)


def rollouts(settings: Settings) -> Iterator[Broken]:
    """Completions that the policy samples while it trains: whether the objective wants them, and all the rest does."""
    rollout, objective = settings["rollout"], settings["objective"]
    if None in (rollout["completions"], rollout["reward"]) or objective.get("method") not in parameters():
        return
    name, least, many = objective.get("name"), needed_rollouts(objective), rollout["completions"]
    if many < least:
        why = f"objective={name} learns from at least {least} completions of its own for each prompt"
        yield broken("rollout.completions", why, "rollout.completions=8")
    if not many:
        return
    if "rollout" not in taken_kinds(objective):
        yield broken(
            "rollout.completions", f"objective={name} takes no completions of its own", "rollout.completions=0"
        )
    rows, prompts = settings["train"]["batch_size"], rollout["prompts"]
    if rows is not None and prompts is not None and prompts % rows:
        yield broken("rollout.prompts", f"must be a multiple of train.batch_size={rows}")
    weights = [weight for weight in rollout["reward"].values() if weight is not None]
    if any(weight < 0 for weight in weights) or sum(weights) > 1 + 1e-9:
        yield broken("rollout.reward", "its weights must be at least 0 and add up to at most 1: scores lie in [0, 1]")
    plain = (rollout["temperature"], rollout["top_k"], rollout["top_p"]) == (1.0, 0, 1.0)
    if objective.get("sampler_cap") is not None and not plain:
        why = "log-probs of the sampler are those of the policy at temperature 1 without filters only"
        yield broken("objective.sampler_cap", why, "rollout.temperature=1 rollout.top_k=0 rollout.top_p=1")
    if settings["hardware"]["sharding"] == "full":
        yield broken("rollout.completions", "cannot be sampled from a sharded model", "hardware.sharding=none")
    if rollout["refill"] and settings["data"]["exhaustion"] == "first":
        yield broken("rollout.refill", "draws further rows, and data.exhaustion=first ends where they do")
    if rollout["refill"] and settings["train"]["steps"] is None:
        yield broken("rollout.refill", "draws further rows, so that passes say nothing", "train.steps=...")


def objective(settings: Settings) -> Iterator[Broken]:
    """The keys of an objective that contradict each other, by its own `problems`, and a teacher that is not there."""
    if settings["objective"].get("method") not in parameters():
        return
    for key, why in problems_of(settings["objective"]):
        yield broken(f"objective.{key}", why)
    if settings["teacher"]["path"] is None and wants_teacher(settings["objective"]):
        yield broken(
            "teacher.path",
            "names the model to learn from, and is not given",
            "teacher.path=some/model   (a folder or a hub id)",
        )


def rewards(settings: Settings) -> Iterator[Broken]:
    """The run's reward and the checkers of its sources, each by its own `problems`."""
    from uft.rewards import problems_with

    named = {f"data.sources.{name}.checker": s.get("checker") for name, s in settings["data"]["sources"].items()}
    yield from problems_with(settings["reward"], named)


RULES: tuple[Callable[[Settings], Iterator[Broken]], ...] = (
    numbers,
    adapters,
    mixture,
    held_out,
    names,
    no_secret,
    machines,
    rollouts,
    objective,
    rewards,
)
