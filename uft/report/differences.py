"""What differs between runs: keys of the configuration and the circumstances they ran in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uft.config.frozen import ABSENT
from uft.report.groups import all_keys, is_seed, rank
from uft.report.load import Loaded
from uft.report.versions import frozen
from uft.report.words import as_value

OWN = ("run.", "sweep.")  # a run's name and place differ by nature
VERSIONS = ("uft", "python", "torch", "transformers", "datasets", "peft", "numpy", "platform")


def facts(run: Loaded) -> dict[str, str]:
    """What a run was made with and on: versions, code, device, and digests of what it read."""
    versions, code = part(run.info, "versions"), part(run.info, "code")
    found = {
        "data digest": run.info.get("data_digest"),
        "data contents": run.data.get("digest"),
        "commit": code.get("commit"),
        "uncommitted changes": code.get("dirty"),
        "device": run.info.get("device"),
        **{name: versions.get(name) for name in VERSIONS},
        "torch": run.info.get("torch") or versions.get("torch"),
    }
    return {name: str(value) for name, value in found.items() if value}


def part(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def differences(runs: Sequence[Loaded], seed_keys: Sequence[str]) -> list[tuple[str, list[tuple[Any, list[int]]]]]:
    """(key, [(value, numbers of the runs)]) of everything that is not the same in all runs; seeds and names apart.

    Runs that cannot be read are left out.
    """
    settings = {number: run.config for number, run in enumerate(runs) if run.config}
    keys = [key for key in all_keys(settings.values()) if not key.startswith(OWN) and not is_seed(key, seed_keys)]
    around = {number: facts(run) for number, run in enumerate(runs) if run.info}
    return [*differing(settings, keys), *differing(around, list(all_keys(around.values())))]


def differing(
    tables: Mapping[int, Mapping[str, Any]], keys: Sequence[str]
) -> list[tuple[str, list[tuple[Any, list[int]]]]]:
    found = []
    for key in keys:
        values: dict[Any, tuple[Any, list[int]]] = {}
        for number, table in tables.items():
            value = table.get(key, ABSENT)
            values.setdefault(frozen(value), (value, []))[1].append(number)
        if len(values) > 1:
            pairs = ((as_value(value), numbers) for value, numbers in values.values())
            found.append((key, sorted(pairs, key=lambda pair: rank(pair[0]))))
    return found
