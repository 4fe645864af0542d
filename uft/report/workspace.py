"""The comparison as a saved W&B workspace: the same panels over the runs as W&B has them.

A workspace, not a W&B report: it can be made without asking the server for anything, and W&B's own table, grouping and
run comparer work in it. wandb and wandb-workspaces are imported only when it is asked for.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from uft.errors import FAILED, Problem, UftError
from uft.report.load import BROKEN, read_config, read_object
from uft.runs import Run, shown
from uft.tracking.wandb import Choice, Server, choose

HEADLINES = 3  # metrics in the parallel coordinates
CURVES = ("loss", "nll", "grad_norm", "lr")
MOST_LINES = 50
PLAIN = re.compile(r"[A-Za-z0-9._ -]+")  # a group's name that W&B's filters can hold as it is
INSTALL = "pip install 'uft[wandb-views]'"

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Logged:
    """A run as W&B knows it."""

    path: Path
    id: str
    project: str
    entity: str | None
    group: str
    local: tuple[Path, ...]  # logs of offline sittings that nobody has uploaded


def logged(path: Path) -> Logged | None:
    """What a run folder says of its W&B run; None where there is none."""
    run = Run(path)
    try:
        info, config = read_object(path / "run.json"), read_config(run.config_file.read_text(encoding="utf-8"))
        there = info["wandb"]
        if there["mode"] == "disabled":
            return None
        _, entity, project = urlparts(there.get("url")) or ("", config.get("tracking.entity"), None)
        group = config.get("tracking.group") or config.get("sweep.name") or info.get("sweep") or ""
        return Logged(
            path=path,
            id=str(there["id"]),
            project=str(project or config.get("tracking.project") or "uft"),
            entity=None if entity is None else str(entity),
            group=str(group),
            local=tuple(path / name for name in there.get("dirs", ()) if waiting(path / name)),
        )
    except BROKEN:
        return None


def urlparts(url: Any) -> tuple[str, str, str] | None:
    """(host, entity, project) of a run's address at W&B."""
    found = re.match(r"https?://([^/]+)/([^/]+)/([^/]+)/runs/", url) if isinstance(url, str) else None
    return (found[1], found[2], found[3]) if found else None


def waiting(folder: Path) -> bool:
    """Whether a log was written offline and not uploaded since; `wandb sync` leaves a mark."""
    return folder.name.startswith("offline-") and folder.is_dir() and not any(folder.glob("*.synced"))


def save(comparison: Object, paths: Sequence[Path]) -> list[str]:
    """Save the workspace and say where it is, or what it would be and how to have it later.

    Raises UftError where wandb-workspaces is not installed, no run was sent to W&B, or W&B does not take it.
    """
    require()
    runs = [found for path in paths if (found := logged(path)) is not None]
    if not runs:
        raise UftError(Problem("--wandb", "none of these runs was sent to W&B", advice=("train with  tracking=wandb",)))
    choice = connection()
    offline = sorted({found.path for found in runs if found.local})
    upload = [f"Upload {len(offline)} of {len(runs)} runs first:  uft sync {common(offline)}"] if offline else []
    if choice.mode == "offline":
        return [f"W&B is offline ({choice.why}): nothing was saved. {described(comparison, runs)}", *upload, LATER]
    return [f"W&B workspace: {sent(comparison, runs)}", *upload]


LATER = "Later, with a key (wandb login) and a network, give the same command again."


def require() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UftError(Problem("--wandb", "wandb-workspaces is not installed", advice=(INSTALL,))) from error


def connection() -> Choice:
    """Whether W&B can be had now. Never asks for a key, never waits long."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return choose("auto", Server(settings.base_url, settings.api_key))


def common(runs: Sequence[Path]) -> str:
    """The folder that all of them are in; a run alone is its own."""
    return quote(shown(Path(os.path.commonpath([path.resolve() for path in runs]))))


def described(comparison: Object, runs: Sequence[Logged]) -> str:
    sections = ", ".join(f"{section.name} ({len(section.panels)})" for section in sections_of(comparison))
    by = ", ".join(keys(comparison)) or "nothing"
    return f"It would be {title(comparison)!r} in {home(runs).project}: {len(runs)} runs grouped by {by}; {sections}."


def sent(comparison: Object, runs: Sequence[Logged]) -> str:
    """Save it; its address."""
    import wandb

    try:
        space = workspace(comparison, runs, home(runs).entity or str(wandb.Api().default_entity))
        space.save()
        return str(space.url)
    except Exception as error:  # the server's answer, in whatever shape its client gives it
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UftError(Problem("--wandb", f"W&B did not take the workspace: {why}"), code=FAILED) from error


def home(runs: Sequence[Logged]) -> Logged:
    """A run of the project that most runs are in."""
    most = Counter((run.entity, run.project) for run in runs).most_common(1)[0][0]
    return next(run for run in runs if (run.entity, run.project) == most)


def title(comparison: Object) -> str:
    return re.sub(r"[^\w .,-]", "-", f"uft compare {comparison['title']}")  # W&B refuses symbols


def keys(comparison: Object) -> list[str]:
    """The axes that are keys of the configuration, and so known to W&B."""
    return [axis["key"] for axis in comparison["axes"] if "." in axis["key"] or axis["key"] == "seed"]


def workspace(comparison: Object, runs: Sequence[Logged], entity: str) -> Any:
    """The workspace, not yet saved: runs filtered to these, grouped by what was swept, and the page's panels."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=home(runs).project,
        name=title(comparison),
        sections=sections_of(comparison),
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=min(MOST_LINES, max(10, len(comparison["groups"])))),
        runset_settings=ws.RunsetSettings(
            filters=restriction(runs),
            groupby=[ws.Config(key) for key in keys(comparison)],
            pinned_columns=[f"summary:{head['metric']}" for head in comparison["headline"][:HEADLINES]],
        ),
    )


def restriction(runs: Sequence[Logged]) -> str:
    """W&B's filter for the sweep's group, which later runs of the sweep join; for these runs where that is not one."""
    groups = {run.group for run in runs}
    name = groups.pop() if len(groups) == 1 else ""
    if PLAIN.fullmatch(name):
        return f"Metric('Group') == '{name}'"
    return f"Metric('ID') in [{', '.join(repr(run.id) for run in runs)}]"


def sections_of(comparison: Object) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    heads = [head["metric"] for head in comparison["headline"]]
    curves = [metric["name"] for metric in comparison["metrics"] if metric["curve"] and metric["name"] in CURVES]

    def line(metric: str) -> Any:
        return wr.LinePlot(title=metric, x="step", y=[metric], groupby_aggfunc="mean", groupby_rangefunc="stddev")

    made = {
        "Battery": [line(metric) for metric in heads],
        "Sweep": sweep_panels(keys(comparison), heads),
        "Training": [line(metric) for metric in curves],
        "Runs": [wr.RunComparer(diff_only="split")],
    }
    return [ws.Section(name=name, panels=panels, is_open=True) for name, panels in made.items() if panels]


def sweep_panels(axes: Sequence[str], heads: Sequence[str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in axes]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric)) for metric in heads[:HEADLINES]]
    panels: list[Any] = [wr.ParallelCoordinatesPlot(title="what was swept", columns=columns)] if axes else []
    if len(heads) > 1:
        x, y = (wr.SummaryMetric(metric) for metric in heads[:2])
        panels.append(wr.ScatterPlot(title=f"{heads[1]} against {heads[0]}", x=x, y=y))
    if axes and heads:
        panels.append(wr.ParameterImportancePlot(with_respect_to=heads[0]))
    return panels
