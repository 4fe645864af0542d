"""What happens before the first step: seconds from the command to it, and how fast rows become tokens.

    python scripts/bench_start.py              about two minutes
    python scripts/bench_start.py --rounds 5

The command is `uft train` on the embedded model and mixture, once without any cache and then with it. Tokens are of
random chats under the same tokenizer, against a loop that renders and tokenises them in batches and keeps nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.setting import chats, save_tokenizer

TYPED = ("train.log_every=1", "train.steps=1", "eval=none", "tracking=none", "objective=sft", "hardware=cpu")
ROWS = 20_000
IN_A_BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="uft-bench-") as folder:
        cold, *warm = (first_step(Path(folder), number) for number in range(rounds + 1))
        print(f"command to first step: {cold:.1f} s without a cache, {statistics.median(warm):.1f} s with it")
        for line in tokens(Path(folder), rounds):
            print(line)


def first_step(folder: Path, number: int) -> float:
    """Seconds until the first line of metrics is in its file."""
    run = folder / f"run-{number}"
    environment = {**os.environ, "UFT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "uft", "train", *TYPED, f"run.dir={run}"]
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        while not (run / "metrics.jsonl").exists():
            if child.poll():
                sys.exit(f"uft train ended with exit code {child.returncode}")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    return seconds


def tokens(folder: Path, rounds: int) -> list[str]:
    from transformers import AutoTokenizer

    from uft.data.chat import Renderer
    from uft.data.rows import Completion, Message, Row
    from uft.data.tokens import tokenize

    save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pairs = chats(ROWS)
    rows = [
        Row("rows", number, (Message("user", prompt),), (Completion((Message("assistant", said),)),))
        for number, (prompt, said) in enumerate(pairs)
    ]
    renderer, caches = Renderer(tokenizer), iter(range(10 * rounds))

    def built() -> None:
        tokenize("rows", rows, renderer, 4096, cache_dir=folder / str(next(caches)))

    def hit() -> None:
        tokenize("rows", rows, renderer, 4096, cache_dir=folder / "hit")

    times: dict[str, list[float]] = {"bare": [], "built": [], "hit": []}
    hit()
    for _ in range(rounds):
        times["bare"].append(seconds(lambda: bare(tokenizer, pairs)))
        times["built"].append(seconds(built))
        times["hit"].append(seconds(hit))
    loop, build, load = (statistics.median(times[name]) for name in ("bare", "built", "hit"))
    return [
        f"{ROWS:,} chats to tokens: {build:.2f} s, a bare loop {loop:.2f} s: {loop / build:.2f} of its speed",
        f"a hit: {1000 * load:.0f} ms, of which the digest of the rows is most",
    ]


def bare(tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    """Render and tokenise, nothing else: no mask, no check, no file."""
    for start in range(0, len(pairs), IN_A_BATCH):
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
            for prompt, said in pairs[start : start + IN_A_BATCH]
        ]
        tokenizer([tokenizer.apply_chat_template(one, tokenize=False) for one in turns], add_special_tokens=False)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
