"""`uft compare [RUNS | SWEEP | pattern ...]`: runs side by side, in the terminal, as a page and as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uft.errors import GOOD, Problem, UftError

ABOUT = """\
Runs that differ in their seed alone are one configuration: its figures are means over seeds. Only finished runs count;
all others are shown with what went wrong. compare.html is one file that opens without a network, compare.json holds
the same for programs. What the statistics mean: docs/compare.md.

  uft compare                                   the newest sweep
  uft compare outputs/2026-11-21/beta-sweep     that sweep
  uft compare beta-sweep 'outputs/*/ift-*'      by name, by pattern, together
  uft compare --metric instruct/exact_match     judged by this first
  uft compare --baseline 'dpo beta=0.1'         the margin over this one"""


def main(arguments: list[str]) -> int:
    parsed = parser().parse_args(arguments)
    from uft.report.compare import Options, as_json, compare, write
    from uft.report.runs import select
    from uft.report.table import show
    from uft.report.workspace import require, save
    from uft.runs import shown

    if parsed.wandb:
        require()
    selection = select(parsed.runs)
    options = Options(tuple(parsed.metric), parsed.baseline, tuple(parsed.seed_key))
    comparison = compare(selection, options)
    if parsed.json:
        print(as_json(comparison), end="")
    else:
        show(comparison)
    out = sys.stderr if parsed.json else sys.stdout
    try:
        files = write(comparison, parsed.out or selection.folder)
    except OSError as error:
        where = str(parsed.out or selection.folder)
        raise UftError(
            Problem(where, f"cannot write there: {error.strerror}", advice=("choose:  --out DIR",))
        ) from error
    print(f"\n  {'  '.join(shown(path.resolve()) for path in files)}", file=out)
    if parsed.wandb:
        print("\n".join(f"  {line}" for line in save(comparison, selection.runs)), file=out)
    if parsed.open:
        import webbrowser

        webbrowser.open(files[-1].resolve().as_uri())
    return GOOD


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="uft compare",
        description="Runs side by side: which is best, by how much, and is it more than seed noise.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="runs, sweeps or patterns; the newest sweep in outputs")
    made.add_argument(
        "--metric", action="append", default=[], metavar="NAME[:min|max]", help="judge by this first; may be repeated"
    )
    made.add_argument("--baseline", metavar="NAME", help="a configuration or key=value; objective=sft, else the first")
    made.add_argument(
        "--seed-key", action="append", default=[], metavar="KEY", help="a key that is a seed; seed and seeds.*"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="where the files go; the sweep's folder")
    made.add_argument("--json", action="store_true", help="print compare.json instead of the table")
    made.add_argument("--open", action="store_true", help="open the page in a browser")
    made.add_argument("--wandb", action="store_true", help="save a W&B workspace with the same panels")
    return made
