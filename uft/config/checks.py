"""What types cannot say: ranges, choices, and rules between keys. Reads a typed tree, returns every problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.suggest import hint, listing, nearest, written
from uft.errors import secret_in, secrets

LONGEST_NAME = 200  # bytes; file systems allow 255, and our temporary files have longer names

Values = Mapping[str, Any]  # dotted key -> resolved leaf


@dataclasses.dataclass(frozen=True)
class Finding:
    """A key whose value cannot stand."""

    key: str
    why: str
    advice: tuple[str, ...] = ()


Rule = Callable[[Values], Iterator[Finding]]

BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("above", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("below", lambda value, bound: value < bound),
}


def findings(tree: DictConfig, typed: Collection[str] = ()) -> list[Finding]:
    """Every problem of a composed tree; `typed` are the keys that the command line sets."""
    values: dict[str, Any] = {}
    found = list(walk(tree, "", values))
    for finding in found:  # one message per key: rules see it as not given
        values.pop(finding.key, None)
    found += epochs_in_vain(values, typed)
    return found + [finding for rule in RULES for finding in rule(values)]


def walk(node: DictConfig, prefix: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Missing values, references to nowhere, ranges and choices; fills `values` with what can be resolved."""
    kind = OmegaConf.get_type(node)
    rules = {f.name: f.metadata for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    for name in map(str, node):
        key = f"{prefix}{name}"
        try:
            value = node[name]
        except OmegaConfBaseException:
            yield unresolved(key, node, name)
            continue
        if isinstance(value, DictConfig):
            yield from walk(value, f"{key}.", values)
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        values[key] = plain
        yield from against(key, plain, rules.get(name, {}))


def unresolved(key: str, node: DictConfig, name: str) -> Finding:
    if OmegaConf.is_missing(node, name):
        choose = "not chosen" if key == "objective" else "has no value"
        return Finding(key, choose, (f"give it:  {key}=...",))
    raw = node._get_node(name)
    return Finding(key, f"refers to something that has no value: {getattr(raw, '_value', lambda: raw)()}")


def against(key: str, value: Any, rules: Mapping[str, Any]) -> Iterator[Finding]:
    """One value against the metadata of its field. null is allowed wherever the type allows it."""
    choices = rules.get("choices")
    if choices is not None and value not in choices:
        known = [written(choice) for choice in choices]
        near = nearest(str(value), known)
        yield Finding(key, "no such choice", (hint(near and f"{key}={near}", "choices", known),))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # written so that NaN breaks every bound
        broken = [op for op, (_, holds) in BOUNDS.items() if op in rules and not holds(value, rules[op])]
        if broken:
            yield Finding(key, "must be " + " and ".join(f"{BOUNDS[op][0]} {rules[op]}" for op in broken))


# rules between keys: each reads what it needs, and says nothing where that is missing


def epochs_in_vain(values: Values, typed: Collection[str]) -> Iterator[Finding]:
    """`train.epochs` counts only where `train.steps` is null: asked for beside steps, it would silently do nothing."""
    steps = values.get("train.steps")
    if "train.epochs" in typed and steps is not None:
        yield Finding("train.epochs", f"does nothing beside train.steps={steps}", ("add  train.steps=null",))


def warmup_within_training(values: Values) -> Iterator[Finding]:
    warmup, steps = values.get("optim.warmup"), values.get("train.steps")
    if warmup is None:
        return
    if warmup >= 1 and warmup != int(warmup):
        yield Finding("optim.warmup", "must be a share below 1 or a whole number of steps")
    elif warmup >= 1 and steps is not None and warmup >= steps:
        yield Finding("optim.warmup", f"leaves no step after the warm-up: train.steps={steps}")


def two_betas(values: Values) -> Iterator[Finding]:
    betas = values.get("optim.betas")
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        yield Finding("optim.betas", "must be two numbers, at least 0 and below 1")


def adapter_off_needs_an_adapter(values: Values) -> Iterator[Finding]:
    if values.get("reference.mode") != "adapter_off":
        return
    if values.get("model.adapter") == "none":
        advice = "model.adapter=lora  or  reference.mode=auto"
        yield Finding("reference.mode", "needs an adapter to switch off", (advice,))
    if values.get("reference.path") is not None:
        why = "is another model, and switching the adapter off gives the initial policy"
        yield Finding("reference.path", why, ("reference.mode=auto",))


def lora_has_targets(values: Values) -> Iterator[Finding]:
    if values.get("model.adapter") == "lora" and values.get("model.lora.targets") == []:
        yield Finding("model.lora.targets", "names no layer to adapt", ("for all linear layers:  [all-linear]",))


def sources_of(values: Values) -> dict[str, dict[str, Any]]:
    """Source name -> its leaves."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key.startswith("data.sources."):
            name, _, leaf = key.removeprefix("data.sources.").partition(".")
            found.setdefault(name, {})[leaf] = value
    return found


def mixture_has_sources(values: Values) -> Iterator[Finding]:
    sources = sources_of(values)
    if not sources:
        advice = "+data.sources.mine.path=rows.jsonl", "or a mixture that has some:  data=mix"
        yield Finding("data.sources", "the mixture has no sources", advice)
    elif all(source.get("share") == 0 for source in sources.values()):
        yield Finding("data.sources", "every share is 0")


def ratio_has_two_sides(values: Values) -> Iterator[Finding]:
    """`data.ratio` shares rows between demonstrations and the rest: where kinds are named, both must be there."""
    ratio, sources = values.get("data.ratio"), sources_of(values)
    if ratio is None or not sources:
        return
    kinds = [source.get("kind") for source in sources.values()]
    shown = kinds.count("demonstration") + kinds.count("negatives")
    if None not in kinds and ((ratio < 1 and shown == len(kinds)) or (ratio > 0 and shown == 0)):
        side = "demonstrations only" if shown else "no demonstrations"
        yield Finding("data.ratio", f"shares between demonstrations and the rest, and the mixture has {side}")


def sources_are_consistent(values: Values) -> Iterator[Finding]:
    for name, source in sources_of(values).items():
        key = f"data.sources.{name}"
        ways = [way for way in ("holdout", "eval_path", "eval_split") if source.get(way) is not None]
        if len(ways) > 1:
            yield Finding(f"{key}.{ways[1]}", f"and {ways[0]} both say which rows are for evaluation: give one")
        ends = source.get("score_range")
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            yield Finding(f"{key}.score_range", "must be [lowest, highest]")
        if whole_or_share(source.get("holdout")):
            yield Finding(f"{key}.holdout", "must be a share below 1 or a whole number of rows")


def holdout_is_share_or_count(values: Values) -> Iterator[Finding]:
    if whole_or_share(values.get("data.holdout")):
        yield Finding("data.holdout", "must be a share below 1 or a whole number of rows")


def whole_or_share(value: float | None) -> bool:
    """Whether a holdout is neither."""
    return value is not None and value > 1 and value != int(value)


def generation_has_seeds(values: Values) -> Iterator[Finding]:
    seeds = values.get("generate.seeds")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        yield Finding("generate.seeds", "must be different seeds, at least one")


def holds_no_secret(values: Values) -> Iterator[Finding]:
    """A configuration is written down, sent to W&B and compared by others."""
    known = secrets()
    for key, value in values.items():
        texts = list(value) if isinstance(value, list) else [value]
        if key == "run.dir":
            texts += str(value or "").split("/")  # the last part names the run, and others may name a sweep
        what = next((found for text in texts if isinstance(text, str) and (found := secret_in(text, known))), None)
        if what:
            yield Finding(key, f"holds {what}, and configurations are written down", ("leave it in the environment",))


def names_are_folders(values: Values) -> Iterator[Finding]:
    for key in ("run.name", "sweep.name"):
        name = values.get(key)
        bad = sorted(set(str(name or "")) & set("/\\=,"))
        if bad or name in ("", ".", ".."):
            yield Finding(key, "names a folder", (f"without {listing(bad)}" if bad else "give it a real name",))
        elif name is not None:
            yield from plain_name(key, str(name))


def a_folder_can_be_made(values: Values) -> Iterator[Finding]:
    for part in str(values.get("run.dir") or "").split("/"):
        yield from plain_name("run.dir", part)


def names_of_sources(values: Values) -> Iterator[Finding]:
    """They stand in the names of metrics and of files."""
    for name in sources_of(values):
        if set(name) & set("/\\") or name in ("", ".", ".."):
            yield Finding(f"data.sources.{name}", "names files and metrics", ("without / and \\",))
        else:
            yield from plain_name(f"data.sources.{name}", name)


def plain_name(key: str, name: str) -> Iterator[Finding]:
    if not name.isprintable():
        yield Finding(key, "has a character that cannot be shown", ("letters, digits and -_.+ are fine",))
    elif len(name.encode()) > LONGEST_NAME:
        yield Finding(key, f"is too long for a file's name: at most {LONGEST_NAME} bytes")


def machines_find_each_other(values: Values) -> Iterator[Finding]:
    nodes, rank = values.get("hardware.nodes") or 1, values.get("hardware.node_rank")
    if rank is not None and rank >= nodes:
        yield Finding("hardware.node_rank", f"counts from 0 to {nodes - 1}: hardware.nodes={nodes}")
    pool, processes = values.get("hardware.pool"), values.get("hardware.processes") or 1
    if pool is not None and len(set(pool)) < max(processes, len(pool)):
        yield Finding("hardware.pool", f"must be different numbers, at least {processes}: hardware.processes")


def objective_agrees(values: Values) -> Iterator[Finding]:
    from uft.config.register import objective_problems, objective_schemas

    settings = {key.removeprefix("objective."): v for key, v in values.items() if key.startswith("objective.")}
    if settings.get("method") in objective_schemas():
        nested = nest(settings)
        for key, why in objective_problems(nested):
            yield Finding(f"objective.{key}", why)


def nest(flat: Values) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


RULES: tuple[Rule, ...] = (
    warmup_within_training,
    two_betas,
    adapter_off_needs_an_adapter,
    lora_has_targets,
    mixture_has_sources,
    ratio_has_two_sides,
    sources_are_consistent,
    holdout_is_share_or_count,
    generation_has_seeds,
    names_are_folders,
    a_folder_can_be_made,
    names_of_sources,
    holds_no_secret,
    machines_find_each_other,
    objective_agrees,
)
