"""A named source as it is typed on a command line, so that a command that is shown can be copied."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from uft.config.freeze import flat
from uft.config.schema import Source
from uft.config.suggest import written

SAFE = re.compile(r"[\w/.@:+-]+", re.ASCII)
"""Text that neither Hydra's grammar nor a shell reads as anything but itself."""

BEFORE_QUOTE = re.compile(r'(\\*)("|$)')


def adds(name: str, source: Source) -> list[str]:
    """What adds this source to a mixture: its path, then every key that is not at its default."""
    key = f"+data.sources.{name}"
    return [override(f"{key}.{leaf}", value) for leaf, value in _given(source)]


def override(key: str, value: Any) -> str:
    """`key=value`, quoted for Hydra and for the shell where the value needs it."""
    if not isinstance(value, str) or re.fullmatch(SAFE, value):
        return f"{key}={written(value)}"
    inside = BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), value)
    return shlex.quote(f'{key}="{inside}"')


def _given(source: Source) -> Iterator[tuple[str, Any]]:
    blank = Source(path="")
    given = {f.name: getattr(source, f.name) for f in fields(Source)}
    return flat({name: value for name, value in given.items() if value != getattr(blank, name)})
