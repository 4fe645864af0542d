"""The comparison as a saved W&B workspace: the same panels over the runs as W&B has them.

A workspace, not a W&B report: it can be built without a request to the server, and W&B's own table, grouping and run
comparer work in it. wandb and wandb-workspaces are imported only when it is asked for.
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

from uft.errors import FAILED, Problem, UftError, first_line
from uft.report.runs import BROKEN, read_config, read_object
from uft.runs import Run, shown
from uft.tracking.wandb import obstacle, panel, unsent, wandb_server

HEADLINES = 3  # metrics in the parallel coordinates
CURVES = ("loss", "nll", "grad_norm", "lr")
MOST_LINES = 50
PLAIN = re.compile(r"[A-Za-z0-9._ -]+")  # a group's name that W&B's filters can hold as it is
URL = re.compile(r"https?://[^/]+/([^/]+)/([^/]+)/[^/]+/")  # entity, project

Object = Mapping[str, Any]


@dataclass(frozen=True)
class LoggedRun:
    """A run as W&B knows it."""

    path: Path
    id: str
    project: str
    entity: str | None
    group: str
    offline: bool  # not all of it has been uploaded


def require() -> None:
    """Raises UftError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        advice = ("pip install 'uft-lm[wandb-views]'",)
        raise UftError(Problem("--wandb", "wandb-workspaces is not installed", advice=advice)) from error


def save(comparison: Object, paths: Sequence[Path]) -> list[str]:
    """Save the workspace and return lines with its address; offline, its description and how to save it later.

    Raises UftError where wandb-workspaces is not installed, no run was sent to W&B, or W&B does not take it.
    """
    require()
    import wandb

    runs = [found for path in paths if (found := logged_run(path)) is not None]
    if not runs:
        raise UftError(Problem("--wandb", "none of these runs was sent to W&B", advice=("train with  tracking=wandb",)))
    why = obstacle("auto", wandb_server())  # never asks for a key, never waits long
    upload = []
    if offline := sorted({run.path.resolve() for run in runs if run.offline}):
        common = quote(shown(Path(os.path.commonpath(offline))))
        upload.append(f"Upload {len(offline)} of {len(runs)} runs first:  uft sync {common}")
    (entity, project), _ = Counter((run.entity, run.project) for run in runs).most_common(1)[0]
    if why:
        sections = ", ".join(f"{section.name} ({len(section.panels)})" for section in sections_of(comparison))
        would = f"{title(comparison)!r} in {project}: {len(runs)} runs grouped by"
        return [
            f"W&B is offline ({why}): nothing was saved. It would be {would} "
            f"{', '.join(config_axes(comparison)) or 'nothing'}; {sections}.",
            *upload,
            "Later, with a key (wandb login) and a network, give the same command again.",
        ]
    try:
        space = workspace(comparison, runs, entity or str(wandb.Api().default_entity), project)
        space.save()
        return [f"W&B workspace: {space.url}", *upload]
    except Exception as error:  # the server's answer, in whatever shape its client gives it
        why = f"W&B did not take the workspace: {first_line(error)}"
        raise UftError(Problem("--wandb", why), code=FAILED) from error


def logged_run(path: Path) -> LoggedRun | None:
    """The W&B run of a run folder; None where it has none."""
    try:
        info, config = read_object(path / "run.json"), read_config(path / "config.yaml")
        logged = info["wandb"]
        if logged["mode"] == "disabled":
            return None
        url = URL.match(logged["url"]) if isinstance(logged.get("url"), str) else None
        entity, project = url.groups() if url else (config.get("tracking.entity"), None)
        sweep = config.get("sweep.name") or info.get("sweep")
        return LoggedRun(
            path=path,
            id=str(logged["id"]),
            project=str(project or config.get("tracking.project") or "uft"),
            entity=None if entity is None else str(entity),
            group=str(logged.get("group") or config.get("tracking.group") or sweep or ""),
            offline=unsent(Run(path)),
        )
    except BROKEN:
        return None


def title(comparison: Object) -> str:
    return re.sub(r"[^\w .,-]", "-", f"uft compare {comparison['title']}")  # W&B refuses symbols


def config_axes(comparison: Object) -> list[str]:
    """The axes that are keys of the configuration, and so known to W&B."""
    return [axis["key"] for axis in comparison["axes"] if "." in axis["key"] or axis["key"] == "seed"]


def workspace(comparison: Object, runs: Sequence[LoggedRun], entity: str, project: str) -> Any:
    """The workspace, not yet saved: runs filtered to these, grouped by the swept keys, and the page's panels."""
    import wandb_workspaces.workspaces as ws

    groups = {run.group for run in runs}
    if len(groups) == 1 and PLAIN.fullmatch(group := groups.pop()):
        filters = f"Metric('Group') == '{group}'"  # later runs of the sweep join
    else:
        filters = f"Metric('ID') in [{', '.join(repr(run.id) for run in runs)}]"
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title(comparison),
        sections=sections_of(comparison),
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=min(MOST_LINES, max(10, len(comparison["groups"])))),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            groupby=[ws.Config(key) for key in config_axes(comparison)],
            pinned_columns=[f"summary:{panel(head['metric'])}" for head in comparison["headline"][:HEADLINES]],
        ),
    )


def sections_of(comparison: Object) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    axes, heads = config_axes(comparison), [head["metric"] for head in comparison["headline"]]
    curves = [metric["name"] for metric in comparison["metrics"] if metric["curve"] and metric["name"] in CURVES]

    def line(name: str) -> Any:
        return wr.LinePlot(title=name, x="step", y=[panel(name)], groupby_aggfunc="mean", groupby_rangefunc="stddev")

    sweep: list[Any] = []
    if axes:
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in axes]
        columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(panel(metric))) for metric in heads[:HEADLINES]]
        sweep.append(wr.ParallelCoordinatesPlot(title="what was swept", columns=columns))
    if len(heads) > 1:
        x, y = (wr.SummaryMetric(panel(metric)) for metric in heads[:2])
        sweep.append(wr.ScatterPlot(title=f"{heads[1]} against {heads[0]}", x=x, y=y))
    if axes and heads:
        sweep.append(wr.ParameterImportancePlot(with_respect_to=panel(heads[0])))
    sections = {
        "Evaluation": [line(metric) for metric in heads],
        "Sweep": sweep,
        "Training": [line(metric) for metric in curves],
        "Runs": [wr.RunComparer(diff_only="split")],
    }
    return [ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels]
