"""The comparison page: one HTML file that opens from disk, asks the network for nothing and runs no script but its own.

`page/` holds its parts: a template, a style sheet and scripts that share one scope and are read in the order below.
Whatever a run, a model or a config wrote is text there. It travels as JSON, and the Content-Security-Policy names the
page's two scripts by their digests, so that nothing that slipped through as markup could run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from uft.report.table import FORMS, as_text
from uft.tracking.console import printable_lines, shorten

FOLDER = files("uft.report") / "page"
ORDER = (
    *("data", "text", "state", "look", "numbers", "limits", "take", "legend", "headline", "lines", "curves"),
    *("plots", "scatter", "heatmap", "parallel", "runs", "filter", "differences", "samples", "main"),
)
SCRIPTS = tuple(f"{name}.js" for name in ORDER)
PAGE_TEXT = 20_000  # characters of one text; compare.json has the rest
CURVES = 9_000_000  # characters of encoded curves; with Plotly's 4.8 MB the page stays under 15 MB
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")  # what could end a script element, a JS line or the encoding
AXES = ("step", "tokens", "seconds", "value")


def render(comparison: Mapping[str, Any], folder: Path | None = None) -> str:
    """The page of a comparison (compare.json, format 1), as text that UTF-8 can hold.

    `folder`: where the page will lie, so that its runs have links to their folders.
    """
    parts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "page.html", "page.css")}
    body = "\n".join(f"// {name}\n{parts[name]}" for name in SCRIPTS)
    scripts = [get_plotlyjs(), f'(() => {{\n"use strict";\n{body}\n}})();\n']
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (  # these scripts run, and nothing is loaded or sent
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    templates = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters["shown"] = lambda text, longest=300: shorten(printable_lines(str(text)), longest)
    curves = pack(comparison["curves"])
    rest = {key: value for key, value in comparison.items() if key != "curves"}
    html = templates.from_string(parts["page.html"]).render(
        comparison=comparison,
        groups={group["id"]: group["name"] for group in comparison["groups"]},
        policy=policy,
        style=parts["page.css"],
        scripts=scripts,
        data=script_json(
            {
                **plain(rest),
                "curves": curves,
                "folders": {} if folder is None else {run["id"]: link(folder, run["path"]) for run in rest["runs"]},
                "tables": {form: as_text(comparison, form) for form in FORMS},
            }
        ),
        captions=comparison["captions"],
        thinned=curves["every"],
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def link(folder: Path, run: str) -> str:
    """The relative address of a run's folder on a page in `folder`. It begins with a dot: no name can be a scheme."""
    place = os.path.relpath(os.path.abspath(run), os.path.realpath(folder))
    return f"./{quote(Path(place).as_posix())}/"


def script_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plain(value: Any) -> Any:
    """`value` with overlong texts cut and numbers that JSON lacks as strings."""
    if isinstance(value, str):
        if len(value) <= PAGE_TEXT:
            return value
        return f"{value[:PAGE_TEXT]} ... ({len(value) - PAGE_TEXT} more characters are in compare.json)"
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def pack(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]], every: int = 1) -> dict[str, Any]:
    """Curves as base64 of little-endian float32; most runs share their steps, so each array is kept once.

    `runs`: {metric: {run: places in `arrays` of step, tokens, seconds, value; null: not there}}; `every`: 1, or n where
    only every n-th point fits in CURVES characters.
    """
    places: dict[str, int] = {}

    def place(values: Sequence[Any] | None) -> int | None:
        """Of the numbers, None, "nan", "inf" and "-inf"."""
        if not values:
            return None
        kept = values if every == 1 else [*values[:-1:every], values[-1]]
        with np.errstate(over="ignore"):
            array = np.array(kept, dtype=float).astype("<f4")
        return places.setdefault(base64.b64encode(array.tobytes()).decode(), len(places))

    runs = {
        metric: {run: [place(columns.get(axis)) for axis in AXES] for run, columns in of_metric.items()}
        for metric, of_metric in curves.items()
    }
    size = sum(map(len, places))
    if size > CURVES and every == 1:
        return pack(curves, math.ceil(size / CURVES))
    return {"arrays": list(places), "runs": runs, "every": every}
