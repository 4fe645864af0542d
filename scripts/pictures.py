"""The pictures of the README: commands as a terminal shows them, and the page of a comparison.

    python scripts/pictures.py FOLDER

`FOLDER` is where the README's sweep `ratios` was trained; its run of `objective=ift data=mix` is made there too.
Writes docs/images/train.svg, compare.svg and, where Chromium is installed, compare.png.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMNS = 100
SHOWN_STEPS = 3  # the first lines of steps, and the last ones


def terminal(folder: Path, words: list[str]) -> list[str]:
    """The lines that a terminal shows in the end when `uft` has run with these words, with their colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "uft", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs, text=True)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0, said.decode()
    lines = said.decode().replace("\r\n", "\n").split("\n")
    drawn = [re.split(r"\r(?:\x1b\[K)?|\x1b\[2K", line)[-1] for line in lines]  # a line that was drawn over
    return [line for line, raw in zip(drawn, lines, strict=True) if line or not raw]


def draw(words: list[str], lines: list[str], file: Path) -> None:
    """An SVG of the command and its lines; of many steps the first and the last."""
    steps = [number for number, line in enumerate(lines) if re.match(r"(\x1b\[[\d;]*m)*step +\d", line)]
    left_out = set(steps[SHOWN_STEPS:-SHOWN_STEPS])
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ uft {' '.join(words)}", style="bold"))
    for number, line in enumerate(lines):
        if number in left_out and number - 1 not in left_out:
            console.print("...")
        if number not in left_out:
            console.print(Text.from_ansi(line), soft_wrap=True)
    console.save_svg(str(file), title="uft")


def photograph(page: Path, file: Path) -> None:
    """The first screen of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("compare.png is left as it is: no Chromium here")
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    subprocess.run([browser, *flags, "--window-size=1280,800", f"--screenshot={file}", page.as_uri()], check=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for name, words in {"train": ["train", "objective=ift", "data=mix"], "compare": ["compare", "ratios"]}.items():
        draw(words, terminal(folder, words), IMAGES / f"{name}.svg")
    (page,) = folder.glob("outputs/*/ratios/compare.html")
    photograph(page, IMAGES / "compare.png")


if __name__ == "__main__":
    main()
