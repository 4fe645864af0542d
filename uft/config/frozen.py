"""Frozen configurations: the file of a run, written and read back; what may change in it; how two of them differ."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from uft.config.checks import Draft
from uft.config.messages import written
from uft.config.schema import Config, Source, flat, resolved
from uft.errors import Problem, UftError
from uft.runs import bounded, yaml_text

WORK = ("generate.", "annotate.", "select.")
"""Keys of the verbs that make rows, which mean something to stages that do that: to those they are not free."""

_FREE = {  # group -> its keys, or their beginnings
    "tracking": "",
    "run": "",
    "sweep": "",
    "hardware": "threads processes nodes node_rank rendezvous pool sharding reshard offload keep_memory watchdog",
    "model": "gradient_checkpointing",
    "train": "prefetch sync_every_step micro_batch_tokens log_every checkpoint_every keep_last eval_every save_model"
    " save_dtype check_model",
    "eval": "tasks task_files. shot_files. task_rows task_tokens out",
}
FREE = ("arm", *WORK, *(f"{group}.{key}" for group, keys in _FREE.items() for key in keys.split(" ")))
"""Keys that may change when a run is resumed. None of them changes the weights it arrives at, but for rounding
(threads, processes, micro-batches and recomputation add up in another order)."""

ABSENT = "(absent)"
STAGE = re.compile(r"^stages\.[^.]+\.")


def to_builtins(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with references replaced by what they refer to."""
    value, _ = resolved(cfg)
    if not value.get("stages"):  # most runs are of one piece, and say nothing of stages
        value.pop("stages", None)
    return value


def frozen(cfg: Mapping[str, Any]) -> str:
    """The configuration as YAML text, resolved: reading it back gives the same run on another day."""
    return to_yaml(to_builtins(cfg))


def to_yaml(value: Mapping[str, Any]) -> str:
    """YAML with a line per key and lists of plain values in one line."""

    class Dumper(yaml.SafeDumper):
        def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
            return super().represent_sequence(tag, sequence, not any(isinstance(x, (dict, list)) for x in sequence))

    return yaml.dump(dict(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def may_change(key: str) -> bool:
    """Whether this key may change when a run is continued; so may it in a stage (`stages.NAME.KEY`), but for what a
    stage works by."""
    inner = STAGE.sub("", key)
    if inner != key and inner.startswith(WORK):
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


# reading it back


def load_config(path: str | Path) -> Config:
    """The configuration in `path` (YAML or JSON), as dataclasses; `objective` is a plain dict."""
    file = Path(path)
    try:
        settings = yaml.safe_load(yaml_text(file))
        bounded(settings)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        advice = tuple(str(error).splitlines()[:1])
        raise UftError(Problem(str(file), "cannot be read as YAML", advice=advice)) from error
    if not isinstance(settings, Mapping):
        raise UftError(Problem(str(file), "holds no configuration"))
    return to_config(settings, str(file))


def to_config(settings: Mapping[str, Any], file: str = "the configuration") -> Config:
    """Resolved settings as dataclasses; keys that came since they were written have their defaults.

    Raises UftError where no request could have had them: `file` was edited or damaged.
    """
    # a reference was put there by hand, and may ask for the environment
    references = [(key, value) for key, value in flat(settings) if "${" in str(value)]
    if references:
        why = "a run's configuration refers to nothing"
        raise UftError(*(Problem(f"{key}={value}", why) for key, value in references))
    return Config(**{**with_defaults(settings, file), "stages": settings.get("stages") or {}})


def with_defaults(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Frozen settings as this version has them, but for their stages. UftError where another version wrote them, or
    they are damaged."""
    draft = Draft.of(settings, file)
    whole, wrong = draft.finish()
    problems = [*draft.problems, *wrong.values()]
    if unknown := next((problem for problem in problems if problem.why.startswith("no such key")), None):
        advice = f"{unknown.what}: {unknown.why}"
        raise UftError(
            Problem(file, "cannot be read by this version of uft", advice=(advice,)),
            footer="See the difference:  uft config --diff RUN",
        )
    if problems:
        raise UftError(*(replace(problem, where=file) for problem in problems))
    return whole


# shown to people

DEFAULT = "default"
WIDEST = 48  # column of the comments, unless a line is longer


def with_origins(settings: Mapping[str, Any], origins: Mapping[str, str], references: Mapping[str, str]) -> str:
    """The configuration as YAML with aligned comments: the command line, a file and its line, or `default`.

    A value that follows another key says so: `${model.lr}`.
    """
    lines = list(_lines(settings, "", 0))
    width = min(max((len(text) for text, key in lines if key), default=0), WIDEST)
    origin_of = {
        key: f"{origins.get(key, DEFAULT)}{', ' + references[key] if key in references else ''}" for _, key in lines
    }
    return "\n".join(f"{text:<{width}}  # {origin_of[key]}" if key else text for text, key in lines)


def _lines(value: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    """(line of YAML, dotted key of the value on it or "" for a heading)."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield f"{'  ' * depth}{yaml.safe_dump({key: 0}).partition(': 0')[0]}:", ""
            yield from _lines(item, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{'  ' * depth}{to_yaml({key: item}).strip()}", f"{prefix}{key}"


SAFE = re.compile(r"[\w/.@:+-]+", re.ASCII)
"""Text that neither Hydra's grammar nor a shell reads as anything but itself."""

BEFORE_QUOTE = re.compile(r'(\\*)("|$)')


def source_overrides(name: str, source: Source) -> list[str]:
    """Overrides that add this source to a mixture: its path, then every key that is not at its default."""
    blank, given = asdict(Source(path="")), asdict(source)
    own = {key: value for key, value in given.items() if value != blank[key]}
    return [override(f"+data.sources.{name}.{leaf}", value) for leaf, value in flat(own)]


def override(key: str, value: Any) -> str:
    """`key=value`, quoted for Hydra and for the shell where the value needs it."""
    if not isinstance(value, str) or re.fullmatch(SAFE, value):
        return f"{key}={written(value)}"
    inside = BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), value)
    return shlex.quote(f'{key}="{inside}"')
