"""Stages: a run as a list of stages, each with a configuration of its own.

A request writes `stages` (`schema.Stage`): what a stage does, its objective and data by name, and keys for it alone.
What stands in a run's frozen configuration is resolved: under `stages.NAME.config` the top-level nodes in which the
stage differs from the run's own. Everything after composition reads the second form, with the functions here.

Of a run with stages, `objective` and `data` at the top are those of its last fit stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uft.config.frozen import ABSENT, WORK, current, difference, plain, typed
from uft.config.schema import Config

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
        return [Stage(name="", number=1, do="fit", reference="start", config=config)]
    whole = expanded(plain(asdict(config)))
    return [
        Stage(
            name=name,
            number=number,
            do=node["do"],
            reference=node.get("reference", "start"),
            config=typed(whole[name]),
        )
        for number, (name, node) in enumerate(config.stages.items(), 1)
    ]


def expanded(settings: Settings) -> dict[str, dict[str, Any]]:
    """Stage -> its whole configuration, from the resolved one of the run."""
    own = {key: value for key, value in settings.items() if key != STAGES}
    return {name: {**own, **node["config"]} for name, node in settings.get(STAGES, {}).items()}


def completed(settings: Settings) -> dict[str, Any]:
    """A frozen configuration as this version writes it: keys that came since have their defaults, in stages too.

    Raises UftError for one that another version wrote, with keys that are none here.
    """
    run = plain(current(settings, FILE))
    stages = {}
    for name, whole in expanded(settings).items():
        stages[name] = {**settings[STAGES][name], "config": differing(plain(current(whole, FILE)), run)}
    return run | ({STAGES: stages} if stages else {})


def differing(whole: Settings, run: Settings) -> dict[str, Any]:
    """The top-level nodes in which a stage differs from its run."""
    return {key: value for key, value in whole.items() if key != STAGES and value != run.get(key, ABSENT)}


def differences(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """`difference` of two resolved configurations. What differs alike in a run and in a stage of it is told once."""
    changes = difference(without_stages(old), without_stages(new))
    told = set(map(repr, changes))
    before, after = expanded(old), expanded(new)
    if list(before) != list(after):
        changes.append((STAGES, list(before), list(after)))
    for name in [*after, *(name for name in before if name not in after)]:
        prefix = f"{STAGES}.{name}."
        heads = [{STAGES: {name: head(settings, name)}} if head(settings, name) else {} for settings in (old, new)]
        changes += difference(*heads)
        if name in before and name in after:
            for key, was, now in difference(before[name], after[name]):
                own = key.startswith(f"{new[STAGES][name]['do']}.")  # `generate.` of a stage that generates
                if own or (repr((key, was, now)) not in told and not key.startswith(WORK)):
                    changes.append((prefix + key, was, now))
    return changes


def without_stages(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != STAGES}


def head(settings: Settings, name: str) -> dict[str, Any]:
    """What a stage is, without its configuration."""
    node = settings.get(STAGES, {}).get(name, {})
    return {key: value for key, value in node.items() if key != "config"}


def data_nodes(settings: Settings) -> Iterator[dict[str, Any]]:
    """The `data` of the run, or of each of its stages; without the sources whose rows an earlier stage makes."""
    for stage in expanded(settings).values() or [settings]:
        sources = {name: source for name, source in stage["data"]["sources"].items() if not made(source["path"])}
        if sources:
            yield {**stage["data"], "sources": sources}


def made(path: str | None) -> bool:
    """Whether a path names what an earlier stage makes."""
    return str(path or "").startswith(MADE_BY)


def maker(path: str) -> str:
    """The stage that `stage:NAME` names."""
    return path.removeprefix(MADE_BY)


def unready(do: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """(what is not said, what to set) where a stage or verb that makes rows lacks something."""
    sources: Settings = settings["data"]["sources"]
    by, dev = settings["select"]["by"], settings["select"]["dev"]
    if do == "annotate" and settings["annotate"]["column"] is None:
        yield "which column to write is not said", "annotate.column: baseline_logp"
    if do == "generate" and settings["generate"]["score"]:
        for name, source in sources.items():
            if source["share"] != 0 and source["checker"] is None:
                key = f"data.sources.{name}.checker"
                yield f"generate.score asks the checker of a source, and {key} is not set", f"{key}: exact"
    if do == "select" and by in ("active_dpo", "pds") and settings["hardware"]["sharding"] == "full":
        yield f"select.by={by} needs the whole model in one process, and hardware.sharding=full", "select.by: random"
    if do == "select" and by == "pds" and settings["model"]["dtype"] != "float32":
        yield "select.by=pds takes differences that bfloat16 loses", "model.dtype: float32"
    if do == "select" and by is None:
        yield "how rows are chosen is not said", "select.by: random"
    if do == "select" and by == "pds" and dev not in sources:
        names = ", ".join(name for name, source in sources.items() if source["share"] == 0) or "none of the sources"
        yield f"whose loss the kept rows are to lower is not said: a source with share 0 ({names})", "select.dev: NAME"
    elif do == "select" and by == "pds" and sources[dev]["share"] != 0:
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
