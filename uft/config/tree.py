"""Settings of files and of the command line laid one over the other, each with its place and what is wrong with it.

A setting that cannot stand is told of and left out, and the whole is judged at the end, so that one mistake does not
hide the next. Nothing here imports Hydra: a worker reads its frozen configuration with it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uft.config.messages import (
    COMMAND_LINE,
    belongs_to,
    config_dirs,
    expected,
    groups,
    hint,
    listing,
    nearest,
    right_type,
    written,
)
from uft.config.schema import (
    MISSING,
    NAMED,
    REFERENCE,
    Config,
    Key,
    KeyPath,
    flat,
    key_at,
    keys_of,
    parameters,
    problems_of,
    resolved,
    value_at,
)
from uft.errors import Problem, secret_in, secrets

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OBJECTIVE = "objective"
NOT_TYPED = ("name", "method")  # keys of an objective that its file sets; they cannot be overridden


@dataclass(frozen=True)
class Setting:
    """One value that a file or the command line sets."""

    path: tuple[str, ...]
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


def leaves(value: Mapping[Any, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in a nested dict that is not itself a filled dict."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from leaves(item, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), item


def path_of(override: Override) -> KeyPath:
    return tuple(re.findall(r"[^.\[\]]+", override.key_or_group))


def settings_of(override: Override) -> Iterator[Setting]:
    """The settings that an override comes to: one, or one for each leaf of a dict."""
    path, value = path_of(override), override.value()
    for more, item in leaves(value) if isinstance(value, dict) and value else [((), value)]:
        yield Setting((*path, *more), item, COMMAND_LINE, str(override.input_line))


class Tree:
    """A configuration while it is put together: nested values, references unresolved, and the origin of each.

    A setting that cannot stand is told of and left out, so that one mistake does not hide the next.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = dataclasses.asdict(Config())
        self.origins: dict[str, Setting] = {}
        self.objectives: dict[KeyPath, dict[str, Key]] = {}  # by the place of an objective: the keys it has

    def fill(self, settings: Sequence[Setting], leave: Callable[[Setting], bool] | None = None) -> list[Problem]:
        """Lay the settings of files: an objective's method first, since it decides about its other keys.

        An objective has the keys that its file names: a method knows more of them than one preset of it has a use for
        (`objective=dpo` says nothing of `lam`). It may hold others (`per_kind`), which come after it. `leave`, asked of
        each setting when its turn comes, leaves it out.
        """
        problems: list[Problem] = []
        methods = {s.path[:-1]: s for s in settings if s.path[0] == OBJECTIVE and s.path[-1] == "method"}
        for place, method in sorted(methods.items(), key=lambda item: len(item[0])):
            inside = [s for s in settings if s.path[: len(place)] == place]
            known = parameters().get(str(method.value))
            if known is not None:
                named = [s for s in inside if s.file == method.file or s.path[len(place) + 1 :] == ("method",)]
                names = dict.fromkeys(s.path[len(place)] for s in named)
                self.objectives[place] = {name: known[name] for name in names if name in known}
            else:
                problems.append(no_such_method(method.key, method.value, method.where))
                settings = [s for s in settings if s not in inside]
        for setting in settings:
            if not (leave and leave(setting)) and (problem := self.put(setting)):
                problems.append(problem)
        return problems

    def put(self, setting: Setting) -> Problem | None:
        """Lay one value over what is there, or say why it cannot be."""
        path, value, node = setting.path, setting.value, self.values
        for depth, part in enumerate(path[:-1], 1):
            above = self.key_at(path[:depth])
            if above is None:
                return self.unknown(setting, path[:depth])
            if not (above.group or above.is_open or above.kind is Any):
                why = f"{'.'.join(path[:depth])} is a value and has no keys of its own"
                return Problem(setting.text, why, setting.where)
            node = self._below(node, part, above)
        key = self.key_at(path)
        if key is None:
            return self.unknown(setting, path)
        if value is None and path[:-1] in NAMED:  # an entry of which nothing is said
            value = {}
        if key.group or key.is_open:
            if not isinstance(value, dict):
                return self.wrong_type(setting)
            self._below(node, path[-1], key)
        else:
            try:
                node[path[-1]] = converted(key.kind, value)
            except (TypeError, ValueError, OverflowError):
                return self.wrong_type(setting)
        self.origins[setting.key] = setting
        return None

    @staticmethod
    def _below(node: dict[str, Any], part: str, key: Key) -> dict[str, Any]:
        """The group `part` of a node, made with its defaults if it is not there."""
        if not isinstance(node.get(part), dict):
            node[part] = dataclasses.asdict(key.group()) if key.group else {}
        below: dict[str, Any] = node[part]
        return below

    def apply(self, override: Override) -> list[Problem]:
        """Lay one override of the command line, or say what is wrong with it."""
        line, path = str(override.input_line), path_of(override)
        added = override.is_add() or override.is_force_add()
        why, advice = "", tuple[str, ...]()
        if override.package is not None:
            why = f"{override.key_or_group} is not a group"
        elif override.is_delete():
            parent, above = self.get(path[:-1]), self.key_at(path[:-1])
            if above and above.is_open and path[:-1] not in self.objectives and path[-1] in parent:
                parent.pop(path[-1])
                own = ".".join(path)
                kept = {k: s for k, s in self.origins.items() if k != own and not k.startswith(f"{own}.")}
                self.origins = kept
                return []
            why = "only named sources, stages and free keys can be removed"
        elif override.is_add() and self.get(path) is not None and not isinstance(override.value(), (dict, list)):
            why, advice = "has a value already", (f"without the +:  {line[1:]}",)
        elif self.is_new(path) and not added:
            why, advice = f"nothing of that name in {'.'.join(path[:-1])}", (f"to add it:  +{line}",)
        else:
            return [problem for setting in settings_of(override) if (problem := self.put(setting))]
        return [Problem(line, why, COMMAND_LINE, advice)]

    def get(self, path: KeyPath) -> Any:
        """The value at a path, unresolved; None where there is none."""
        value = value_at(self.values, path)
        return None if value == MISSING else value

    def key_at(self, path: KeyPath) -> Key | None:
        return key_at(path, self.objectives)

    def is_new(self, path: KeyPath) -> bool:
        """Whether `path` leads to a new entry of free keys, the one place where + is right."""
        for depth in range(2, len(path)):
            key = self.key_at(path[:depth])
            if key and key.is_open and path[depth] not in (self.get(path[:depth]) or {}):
                return True
        return False

    def judge(self) -> tuple[dict[str, Any], dict[str, Problem]]:
        """(the settings, references resolved; what is wrong with their values, by dotted key).

        In the settings defaults stand in for wrong values.
        """
        settings, wrong = self.finish(())
        method = settings[OBJECTIVE].get("method")
        if not settings[OBJECTIVE]:
            wrong[OBJECTIVE] = Problem(OBJECTIVE, "not chosen", advice=(f"give it:  {OBJECTIVE}=...",))
        elif method not in parameters():
            key = f"{OBJECTIVE}.method"
            wrong[key] = no_such_method(key, method, self.where(key))
        typed = [key for key, setting in self.origins.items() if setting.where == COMMAND_LINE]
        for key, why, advice in rules_broken(settings, wrong.keys(), typed):
            wrong[key] = self.against_rule(key, why, advice, value_at(settings, tuple(key.split("."))))
        return settings, wrong

    def finish(self, below: KeyPath) -> tuple[dict[str, Any], dict[str, Problem]]:
        """(what is below a path, references resolved; missing values, and those out of range or no choice)."""
        whole, lost = resolved(self.values)
        wrong: dict[str, Problem] = {}

        def walk(node: dict[str, Any], path: KeyPath) -> None:
            for name, value in node.items():
                here, raw = (*path, name), self.get((*path, name))
                key, text = self.key_at(here), ".".join(here)
                if isinstance(value, dict):
                    walk(value, here)
                elif value == MISSING:
                    wrong[text] = Problem(text, "has no value", self.where(text), (f"give it:  {text}=...",))
                elif here in lost:
                    wrong[text] = self.against_rule(text, f"refers to something that has no value: {raw}", (), None)
                elif key is not None:
                    try:
                        node[name] = value = converted(key.kind, value)
                    except (TypeError, ValueError, OverflowError):
                        reference = REFERENCE.fullmatch(str(raw))
                        if not (reference and reference[1] in wrong):
                            wrong[text] = self.wrong_type(Setting(here, value, self.where(text), text))
                    else:
                        if found := out_of_range(text, key, value):
                            wrong[text] = self.against_rule(text, *found, value)
                if text in wrong and key is not None:
                    node[name] = key.default

        walk(value_at(whole, below), below)
        return value_at(whole, below), wrong

    # in words

    @property
    def places(self) -> dict[str, str]:
        """Where each value was set, by dotted key; nothing for defaults."""
        return {key: setting.where for key, setting in self.origins.items()}

    def where(self, key: str) -> str:
        return self.places.get(key, "")

    def against_rule(self, key: str, why: str, advice: tuple[str, ...], value: Any) -> Problem:
        what = key if value in (None, {}) else f"{key}={written(value)}"
        return Problem(what, why, self.where(key), advice)

    def wrong_type(self, setting: Setting) -> Problem:
        key = self.key_at(setting.path)
        kind = key.kind if key else None
        advice = (f"its keys: {listing(keys_of(key.group))}",) if key and key.group else right_type(kind, setting.value)
        what = setting.text if "=" in setting.text else f"{setting.text}={written(setting.value)}"
        return Problem(what, f"must be {expected(kind)}", setting.where, advice)

    def unknown(self, setting: Setting, path: KeyPath) -> Problem:
        """The problem of a key, at `path` or above the setting, that the schema does not have."""
        prefix, siblings = path[:-1], self.keys_at(path[:-1])
        near = None if not prefix and self.elsewhere(path[0]) else nearest(path[-1], siblings)  # steps is train.steps
        meant = ".".join((*prefix, near, *setting.path[len(path) :])) if near else self.elsewhere(setting.path[-1])
        if len(path) == 1 and near in groups(config_dirs()):
            meant = f"{near}={written(setting.value)}"
        shown = [key for key in siblings if prefix[:1] != (OBJECTIVE,) or key not in NOT_TYPED]
        advice = hint(meant, "keys" if prefix else "groups and keys", shown)
        more = belongs_to(path[-1]) if prefix[:1] == (OBJECTIVE,) else ()
        place = f" in {'.'.join(prefix)}" if prefix else ""
        if prefix in self.objectives:
            node = self.get(prefix)
            place += f"={node.get('name') or node.get('method')}"
        return Problem(setting.text, f"no such key{place}", setting.where, (advice, *more))

    def keys_at(self, path: KeyPath) -> list[str]:
        """The keys of the group at `path`, in their order."""
        if path in self.objectives:
            return list(self.objectives[path])
        key = self.key_at(path)
        return list(keys_of(key.group)) if key and key.group else []

    def elsewhere(self, leaf: str) -> str | None:
        """The same last name somewhere else in the tree: `lr` is optim.lr."""
        matches = [f"{group}.{leaf}" for group in keys_of(Config) if leaf in self.keys_at((group,))]
        matches.sort(key=lambda match: match.split(".")[0] in ("model", "generate", "seeds"))
        return matches[0] if matches else None


def no_such_method(key: str, method: Any, where: str) -> Problem:
    near = nearest(str(method), parameters())
    advice = hint(near and f"{key}={near}", "methods", list(parameters()))
    return Problem(f"{key}={method}", "no such method", where, (advice,))


# values


BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {  # such that NaN breaks each of them
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("above", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("below", lambda value, bound: value < bound),
}
BOOLEANS = {"yes": True, "y": True, "on": True, "true": True, "no": False, "n": False, "off": False, "false": False}


def converted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, as lenient as OmegaConf's typed nodes: text of a number is one, 3.0 is no whole number.

    A reference, and a value that is missing, stays as it is. Raises TypeError, ValueError or OverflowError for what
    cannot be one.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or value == MISSING:
        return value
    if "${" in str(value):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            OmegaConf.create({"": value})
        except OmegaConfBaseException as error:  # half a reference
            raise ValueError(value) from error
        return value
    if origin in (types.UnionType, typing.Union):
        (kind,) = (part for part in inside if part is not type(None))
        return None if value is None else converted(kind, value)
    if origin is list and isinstance(value, list):
        return [converted(inside[0], item) for item in value]
    if kind is int and type(value) in (int, str):
        return int(value)
    if kind is float and type(value) in (int, float, str):
        return float(value)
    if kind is bool and isinstance(value, (bool, int)):
        return bool(value)
    if kind is bool and isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if kind is str and isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(kind)


def out_of_range(name: str, key: Key, value: Any) -> tuple[str, tuple[str, ...]] | None:
    """(why a value cannot stand by the rules of its key, advice); None where it can. null may wherever its type may."""
    rules = key.rules
    if "choices" in rules and value not in rules["choices"]:
        choices = [written(choice) for choice in rules["choices"]]
        near = nearest(str(value), choices)
        return "no such choice", (hint(near and f"{name}={near}", "choices", choices),)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        failed = [op for op, (_, holds) in BOUNDS.items() if op in rules and not holds(value, rules[op])]
        if failed:
            return "must be " + " and ".join(f"{BOUNDS[op][0]} {rules[op]}" for op in failed), ()
    return None


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
            node.pop(path[-1]) if path[0] == "objective" else node.update({path[-1]: None})
    found = [one for rule in RULES for one in rule(settings)]
    steps = settings["train"]["steps"]
    if "train.epochs" in typed and steps is not None:
        found.insert(0, broken("train.epochs", f"does nothing beside train.steps={steps}", "add  train.steps=null"))
    return list({one[0]: one for one in reversed(found) if one[0] not in wrong}.values())[::-1]


def broken(key: str, why: str, *advice: str) -> Broken:
    return key, why, advice


def epochs_and_warmup(settings: Settings) -> Iterator[Broken]:
    warmup, steps = settings["optim"]["warmup"], settings["train"]["steps"]
    if warmup is not None and warmup >= 1:
        if warmup != int(warmup):
            yield broken("optim.warmup", "must be a share below 1 or a whole number of steps")
        elif steps is not None and warmup >= steps:
            yield broken("optim.warmup", f"leaves no step after the warm-up: train.steps={steps}")


def lists_of_numbers(settings: Settings) -> Iterator[Broken]:
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
        ends = source.get("score_range")
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            yield broken(f"{key}.score_range", "must be [lowest, highest]")
    for key in ("data.holdout", *(f"data.sources.{name}.holdout" for name in settings["data"]["sources"])):
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


def objective(settings: Settings) -> Iterator[Broken]:
    """The keys of an objective that contradict each other, by its own `problems`."""
    for key, why in problems_of(settings["objective"]) if settings["objective"].get("method") in parameters() else ():
        yield broken(f"objective.{key}", why)


RULES: tuple[Callable[[Settings], Iterator[Broken]], ...] = (
    epochs_and_warmup,
    lists_of_numbers,
    adapters,
    mixture,
    held_out,
    names,
    no_secret,
    machines,
    objective,
)
