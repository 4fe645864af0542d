"""The frozen configuration of a run, and how two of them differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

FREE = (
    "tracking.",
    "run.",
    "sweep.",
    "generate.",
    "annotate.",
    "hardware.threads",
    "hardware.processes",
    "hardware.nodes",
    "hardware.node_rank",
    "hardware.rendezvous",
    "hardware.pool",
    "hardware.sharding",
    "hardware.reshard",
    "hardware.offload",
    "hardware.keep_memory",
    "train.prefetch",
    "train.sync_every_step",
    "hardware.watchdog",
    "model.gradient_checkpointing",
    "train.micro_batch_tokens",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.eval_every",
    "train.save_model",
)
"""What may change between the sittings of one run: nothing here touches the weights it arrives at, but for rounding
(threads, processes, micro-batches and recomputation add up in another order)."""

ABSENT = "(absent)"
STAGE = re.compile(r"^stages\.[^.]+\.")


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A resolved dict of builtins: interpolations are replaced by what they say now."""
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    value = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(value, dict)
    value.pop("hydra", None)
    if not value.get("stages"):  # most runs are of one piece, and say nothing of stages
        value.pop("stages", None)
    return {str(key): item for key, item in value.items()}


def frozen(cfg: DictConfig | Mapping[str, Any]) -> str:
    """The configuration as YAML text, resolved: reading it back gives the same run on another day."""
    return to_yaml(plain(cfg))


def to_yaml(value: Mapping[str, Any]) -> str:
    """YAML with a line per key and lists of plain values in one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
            return super().represent_sequence(tag, sequence, not any(isinstance(x, (dict, list)) for x in sequence))

    return yaml.dump(dict(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of a nested dict; an empty dict is a leaf."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def free(key: str) -> bool:
    """Whether this key may change when a run is continued; so may it in a stage (`stages.NAME.KEY`), but for what a
    stage works by."""
    inner = STAGE.sub("", key)
    if inner != key and inner.startswith(("generate.", "annotate.")):
        return False
    return any(inner == name or (name.endswith(".") and inner.startswith(name)) for name in FREE)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) where two resolved configurations differ, in the order of the new one, then what it lacks."""
    before, after = dict(flat(old)), dict(flat(new))
    keys = [*after, *(key for key in before if key not in after)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [(key, was, now) for key, was, now in pairs if was != now and not (empty(was) and empty(now))]


def empty(value: Any) -> bool:
    return value == {} or value is ABSENT
