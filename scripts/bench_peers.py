"""uft against TRL on the same rows, uft under every objective, and uft with each of its levers off.

    python scripts/bench_peers.py                            a small model, TRL at its best; ten minutes on two cores
    python scripts/bench_peers.py --size full --rounds 3     SmolLM2's size, every setting of TRL's, compiled; hours
    python scripts/bench_peers.py --ladder                   what each lever brings
    python scripts/bench_peers.py --arms 30m/sft/trl 30m/sft/uft --rounds 1 --out figures.json

Every figure is of a process of its own, since a process never gives its peak memory back. Processes take turns, so that
a busy machine is busy for all of them. The first step of each warms up and is not measured. With `--out`, what earlier
calls left in that file counts too. TRL comes with  pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench import ours, theirs
from bench.figures import Arm, Figures, Found, read, table, write
from bench.setting import KINDS, Place, furnish

WARM_UP = 1


def plan(size: str, ladder: bool) -> list[Arm]:
    """What is measured when nobody names arms."""
    sizes = ["30m"] if size == "quick" else ["30m", "135m"]
    if ladder:
        return [Arm(s, objective, way) for s in sizes for objective in theirs.WAYS for way in ["uft", *ours.LADDER]]
    if size == "quick":
        of_kind = {objective: "30m-history" if kind == "demonstrations" else "30m" for objective, kind in KINDS.items()}
        peers = [Arm(of_kind[objective], objective, way) for objective, way in theirs.BEST.items()]
        return peers + [Arm(s, objective, "uft") for objective, s in of_kind.items()]
    every = {objective: [*ways, *ours.WAYS] for objective, ways in theirs.WAYS.items()}
    peers = [Arm(s, objective, way) for s in sizes for objective, ways in every.items() for way in ways]
    peers += [Arm("30m-history", "sft", way) for way in every["sft"]]
    return peers + [Arm(s, objective, "uft") for s in sizes for objective in KINDS if objective not in theirs.WAYS]


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(asdict(in_this_process(Arm.of(options.one), Place.at(Path(options.place)), options.threads))))
        return
    arms = [Arm.of(text) for text in options.arms] or plan(options.size, options.ladder)
    out = Path(options.out) if options.out else None
    found: Found = read(out)
    with tempfile.TemporaryDirectory(prefix="uft-bench-") as folder:
        places = {pair: place_of(Path(folder), *pair, options.steps) for pair in dict.fromkeys(map(_pair, arms))}
        for arm in arms * options.rounds:
            print(f"{arm} ...", file=sys.stderr, flush=True)
            found.setdefault(arm, []).append(in_a_process(arm, places[_pair(arm)], options.threads))
            if out:
                write(out, found)
    for line in table(found):
        print(line)


def _pair(arm: Arm) -> tuple[str, str]:
    return arm.size, KINDS[arm.objective]


def place_of(folder: Path, size: str, kind: str, steps: int) -> Place:
    inside = folder / f"{size}-{kind}"
    inside.mkdir()
    return furnish(inside, size, kind, WARM_UP + steps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("quick", "full"), default="quick")
    parser.add_argument("--ladder", action="store_true", help="uft with each lever off, instead of peers")
    parser.add_argument("--arms", nargs="+", default=[], metavar="SIZE/OBJECTIVE/WAY", help="these alone")
    parser.add_argument("--rounds", type=int, default=1, help="processes per arm")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file of figures; the table is of all that is in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--place", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(arm: Arm, place: Place, threads: int) -> Figures:
    command = [sys.executable, __file__, "--one", str(arm), "--place", str(place.folder), "--threads", str(threads)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{arm} failed with exit code {done.returncode}; what it said stands above")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def in_this_process(arm: Arm, place: Place, threads: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="run-", dir=place.folder) as own:
        if arm.way in theirs.WAYS.get(arm.objective, ()):
            return theirs.measure(arm.objective, arm.way, place, Path(own), WARM_UP)
        return ours.measure(arm.objective, arm.way, place, Path(own), WARM_UP, threads)


if __name__ == "__main__":
    main()
