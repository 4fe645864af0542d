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
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMNS = 112
SHOWN = 42  # lines of an answer, of which a reader needs the first


def terminal(folder: Path, words: list[str]) -> list[str]:
    """The lines that a terminal shows in the end when `uft` has run with these words, with their colours."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, COLUMNS))
    environment = {**os.environ, "TERM": "xterm-256color"}
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
    """An SVG of the command and its lines."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ uft {' '.join(words)}", style="bold"))
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ellipsis")
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
    train, compare = ["train", "objective=ift", "data=mix", "tracking=none"], ["compare", "ratios"]
    said = terminal(folder, train)
    middle = next(n for n, line in enumerate(said) if "evaluation at step 100" in line)
    end = next(n for n, line in enumerate(said) if "evaluation at step 329" in line)
    draw(train, [*said[:middle], "...", *said[end:]], IMAGES / "train.svg")
    draw(compare, [*terminal(folder, compare)[:SHOWN], "..."], IMAGES / "compare.svg")
    (page,) = folder.glob("outputs/*/ratios/compare.html")
    photograph(page, IMAGES / "compare.png")


if __name__ == "__main__":
    main()
