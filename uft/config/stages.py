"""Stages: a run as a list of stages, each with a configuration of its own.

A request writes `stages` (`schema.Stage`): what a stage does, its objective and data by name, and keys for it alone.
What stands in a run's frozen configuration is resolved: under `stages.NAME.config` the top-level nodes in which the
stage differs from the run's own. Everything after composition reads the second form, with the functions here.

Of a run with stages, `objective` and `data` at the top are those of its last fit stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from uft.config.checks import Draft, Setting
from uft.config.frozen import ABSENT, WORK, difference, to_builtins, to_config, with_defaults
from uft.config.schema import Config, value_at
from uft.errors import Problem

STAGES = "stages"
MADE_BY = "stage:"
"""How a source's path names the rows that an earlier stage made, and a model path the model of an earlier stage."""

FILE = "config.yaml of the run"
ROWS = "rows.jsonl"

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage of a run, resolved."""

    name: str  # "" of the only stage of a run without `stages`
    number: int  # 1-based
    do: str  # fit, generate, annotate or select
    reference: str  # start: the model it starts from; initial: the model that the run started from
    config: Config

    @property
    def folder(self) -> str:
        """Its place in the run folder; the only stage of a run without `stages` has the run folder itself."""
        return f"{STAGES}/{self.number}-{self.name}" if self.name else "."


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run in their order; one unnamed fit stage where the request has no `stages`."""
    if not config.stages:
        return [Stage("", 1, "fit", "start", config)]
    whole = expanded(to_builtins(asdict(config)))
    return [
        Stage(name, number, node["do"], node.get("reference", "start"), to_config(whole[name]))
        for number, (name, node) in enumerate(config.stages.items(), 1)
    ]


def expanded(settings: Settings) -> dict[str, dict[str, Any]]:
    """Stage -> its whole configuration, from the resolved one of the run."""
    own = without_stages(settings)
    return {name: {**own, **node["config"]} for name, node in settings.get(STAGES, {}).items()}


def completed(settings: Settings) -> dict[str, Any]:
    """A frozen configuration as this version writes it: keys that came since have their defaults, in stages too.

    Raises UftError for one that another version wrote, with keys that are none here.
    """
    run = to_builtins(with_defaults(settings, FILE))
    stages = {}
    for name, whole in expanded(settings).items():
        stages[name] = {**settings[STAGES][name], "config": differing(to_builtins(with_defaults(whole, FILE)), run)}
    return run | ({STAGES: stages} if stages else {})


def differing(whole: Settings, run: Settings) -> dict[str, Any]:
    """The top-level nodes in which a stage differs from its run."""
    return {key: value for key, value in whole.items() if key != STAGES and value != run.get(key, ABSENT)}


def differences(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """`difference` of two resolved configurations. What differs alike in a run and in a stage of it is told once."""
    changes = difference(without_stages(old), without_stages(new))
    of_run = set(map(repr, changes))
    before, after = expanded(old), expanded(new)
    if list(before) != list(after):
        changes.append((STAGES, list(before), list(after)))
    for name in [*after, *(name for name in before if name not in after)]:
        prefix = f"{STAGES}.{name}."
        nodes = (settings.get(STAGES, {}).get(name, {}) for settings in (old, new))
        heads = ({key: value for key, value in node.items() if key != "config"} for node in nodes)
        changes += difference(*({STAGES: {name: one}} if one else {} for one in heads))
        if name in before and name in after:
            for key, was, now in difference(before[name], after[name]):
                own = key.startswith(f"{new[STAGES][name]['do']}.")  # `generate.` of a stage that generates
                if own or (repr((key, was, now)) not in of_run and not key.startswith(WORK)):
                    changes.append((prefix + key, was, now))
    return changes


def without_stages(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != STAGES}


def data_nodes(settings: Settings) -> Iterator[dict[str, Any]]:
    """The `data` of the run, or of each of its stages; without the sources whose rows an earlier stage makes."""
    for stage in expanded(settings).values() or [settings]:
        sources = {name: source for name, source in stage["data"]["sources"].items() if not is_made(source["path"])}
        if sources:
            yield {**stage["data"], "sources": sources}


def is_made(path: str | None) -> bool:
    """Whether a path names what an earlier stage makes."""
    return str(path or "").startswith(MADE_BY)


def maker(path: str) -> str:
    """The stage that `stage:NAME` names."""
    return path.removeprefix(MADE_BY)


def unready(do: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """(what is not said, what to set) where a stage or verb that makes rows lacks something."""
    sources: Settings = settings["data"]["sources"]
    if do == "annotate" and settings["annotate"]["column"] is None:
        yield "which column to write is not said", "annotate.column: baseline_logp"
    if do == "generate" and settings["generate"]["score"]:
        for name, source in sources.items():
            if source["share"] != 0 and source["checker"] is None:
                key = f"data.sources.{name}.checker"
                yield f"generate.score asks the checker of a source, and {key} is not set", f"{key}: exact"
    if do != "select":
        return
    by, dev = settings["select"]["by"], settings["select"]["dev"]
    if by is None:
        yield "how rows are chosen is not said", "select.by: random"
    if by in ("active_dpo", "pds") and settings["hardware"]["sharding"] == "full":
        yield f"select.by={by} needs the whole model in one process, and hardware.sharding=full", "select.by: random"
    if by != "pds":
        return
    if settings["model"]["dtype"] != "float32":
        yield "select.by=pds takes differences that bfloat16 loses", "model.dtype: float32"
    if dev not in sources:
        names = ", ".join(name for name, source in sources.items() if source["share"] == 0) or "none of the sources"
        yield f"whose loss the kept rows are to lower is not said: a source with share 0 ({names})", "select.dev: NAME"
    elif sources[dev]["share"] != 0:
        yield f"rows of select.dev={dev} are no candidates", f"data.sources.{dev}.share: 0"


def rows_of(run: Path, path: str, source: str) -> Path:
    """The file that `stage:NAME` means in a run folder: the stage's only one, or the one of the source of this name.

    KeyError where there is no such stage.
    """
    folders = {folder.name.partition("-")[2]: folder for folder in (run / STAGES).glob("*-*")}
    folder = folders[maker(path)]
    file = folder / "rows" / f"{source}.jsonl"
    if not file.is_file():  # of `stage:NAME@all` the sources are called SOURCE-r
        file = file.with_stem(source.rpartition("-")[0] or source)
    return folder / ROWS if (folder / ROWS).is_file() else file


# --- Rounds: `rounds: N` repeats the stages of a request, round after round, each a stage of its own.
#
# A request is expanded when it is composed and nowhere else: a frozen configuration holds the list that came out. What
# is written, and what it is in round r of N:
#
# | written | in round r |
# |---|---|
# | a stage NAME | NAME-r; NAME where N is 1 |
# | `stage:NAME` | `stage:NAME-r` |
# | `stage:NAME@before` | `stage:NAME-(r-1)`; the first round is without it |
# | `stage:NAME@all` | the rows of NAME-1 to NAME-r: a source for each, which share the share |
# | `part: round` | `r/N`: a slice of the source's rows that no other round has |
# | `by_round: {KEY: [first, second]}` | KEY with the r-th of these values; the last one goes on |


BEFORE, ALL, ROUND = "before", "all", "round"
SOURCES = ("data", "sources")
MODELS, PAST = ("annotate", "models"), ("select", "past")


@dataclass(frozen=True)
class Round:
    """One round of a run, or the whole of a run without rounds."""

    number: int = 1  # 1-based
    count: int | None = None  # `rounds`; None: a run without
    stages: tuple[str, ...] = ()  # as they are written, in their order

    def name(self, stage: str, number: int | None = None) -> str:
        """The stage of this round, or of round `number`, that is written `stage`."""
        return stage if self.count in (None, 1) else f"{stage}-{number or self.number}"

    def value(self, setting: Setting) -> tuple[Setting, Problem | None]:
        """The setting of this round that a list under `by_round` means, or what is wrong with it."""
        values, where = setting.value, setting.where
        if self.count is None:
            return setting, Problem(setting.text, "has a meaning in a run of rounds alone", where, ("rounds=3",))
        if not isinstance(values, list) or not values:
            why = "must be a list: a value for every round, of which the last one goes on"
            return setting, Problem(setting.text, why, where)
        return replace(setting, value=values[min(self.number, len(values)) - 1]), None

    def meant(self, path: str) -> list[tuple[str, str]]:
        """(ending of a name, path) of what `path` means in this round; the path itself where it is no stage's."""
        name, _, which = maker(path).partition("@")
        if not is_made(path) or name not in self.stages or self.count is None or which not in ("", BEFORE, ALL):
            return [("", path)]
        if which == ALL:
            numbers = range(1, self.number + 1)
            return [(f"-{n}" if self.count > 1 else "", MADE_BY + self.name(name, n)) for n in numbers]
        number = self.number - (which == BEFORE)
        return [("", MADE_BY + self.name(name, number))] if number else []

    def settle(self, draft: Draft) -> None:
        """Put what this round means in the place of what is written for all of them."""
        for source, node in list((draft.get(SOURCES) or {}).items()):
            if not isinstance(node, dict):
                continue
            if node.get("part") == ROUND and self.count is not None:
                node["part"] = f"{self.number}/{self.count}"
            meant = self.meant(str(node.get("path") or ""))
            if [ending for ending, _ in meant] == [""]:
                node["path"] = meant[0][1] if node.get("path") else node.get("path")
            else:
                self._replace(draft, source, meant)
        for place in (MODELS, PAST):
            group: dict[str, Any] = value_at(draft.values, place[:1])
            value = group.get(place[1])
            if isinstance(value, list):
                group[place[1]] = [path for one in value for _, path in self.meant(str(one))]
            elif isinstance(value, str):
                group[place[1]] = next((path for _, path in reversed(self.meant(value))), None)

    @staticmethod
    def _replace(draft: Draft, source: str, meant: Sequence[tuple[str, str]]) -> None:
        """Put a source for each of `meant` in the place of one; none in the place of rows that are not there yet."""
        sources = draft.get(SOURCES)
        node, place = sources.pop(source), (*SOURCES, source)
        own = [setting for setting in draft.settings if setting.path[:3] == place]
        for ending, path in meant:
            name, share = f"{source}{ending}", node.get("share")
            sources[name] = {**node, "path": path}
            if isinstance(share, (int, float)):
                sources[name]["share"] = share / len(meant)
            draft.settings += [replace(setting, path=(*SOURCES, name, *setting.path[3:])) for setting in own]


def rounds_of(written: Sequence[object]) -> int | None:
    """The rounds of a request from what is written for them, the last counting; a value that is none is told by the
    schema and counts as one round."""
    value = written[-1] if written else None
    return value if value is None or (type(value) is int and value > 0) else 1
