"""The papers' claims against runs of the playground: `python scripts/claims.py outputs/DATE/playground ...`.

Every claim is one comparison of two arms in one figure, seed by seed, written down with its verdict's rule before the
runs were made:

* "A beats B" holds where the adjusted p (paired t over seeds, Holm over all claims of the table) is below 0.05 and A is
  ahead, does not hold where B is ahead by as much, and is inside noise otherwise;
* "A is as good as B" holds where the 95 % interval of A - B lies above -0.05, does not hold where it lies below, and
  cannot be told otherwise.

An arm is what the runs of a sweep are named without their seed. Claims without finished runs say so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from playground_table import COLUMNS, measured
from scipy.stats import spearmanr

from uft.report.verdict import Difference, difference_of, holm, spread
from uft.runs import find_runs

MARGIN = 0.05  # of "as good as", in shares of right answers
ALPHA = 0.05
Arms = Mapping[str, Mapping[int, Mapping[str, float]]]
"""arm -> seed -> last metrics"""


@dataclass(frozen=True)
class Claim:
    """`text` says that arm `a` is ahead of arm `b` in `column` of docs/playground.md (or as good as it)."""

    text: str
    paper: str  # arXiv
    a: str
    b: str
    column: str
    as_good: bool = False

    @property
    def less_is_better(self) -> bool:
        return self.column.startswith("nll")


CLAIMS = (
    Claim("UFT on demonstrations alone beats SFT on them", "2410.21438", "uft_alone", "sft_alone", "new"),
    Claim("... and keeps more of what the model could", "2410.21438", "uft_alone", "sft_alone", "skill"),
    Claim("One stage keeps what SFT, then UNA loses", "2410.21438", "sft_with_una", "sft_then_una", "skill"),
    Claim("... and has learnt the demonstrations as well", "2410.21438", "sft_with_una", "sft_then_una", "new", True),
    Claim("One stage keeps what SFT, then DPO loses", "2410.21438", "sft_with_dpo", "sft_then_dpo", "skill"),
    Claim("IFT on SFT's rows is as good as SFT, then DPO: new", "2405.11870", "ift_alone", "sft_then_dpo", "new", True),
    Claim("... and in style", "2405.11870", "ift_alone", "sft_then_dpo", "style", True),
    Claim("IFT beats SFT on the same rows", "2405.11870", "ift_alone", "sft_alone", "new"),
    Claim("DFT on demonstrations and wrong answers beats SFT", "2502.18679", "dft_alone", "sft_alone", "new"),
    Claim("... and is as good as SFT, then DPO, in style", "2502.18679", "dft_alone", "sft_then_dpo", "style", True),
    Claim(
        "A lower rate of SFT leaves more for DPO after it", "2507.00018", "slow_sft_then_dpo", "sft_then_dpo", "style"
    ),
    Claim("Dynamic FT generalises better than SFT", "2508.05629", "dynamic_ft", "sft", "new"),
    Claim("... and forgets less", "2508.05629", "dynamic_ft", "sft", "skill"),
    Claim("Soft labels help DPO", "2409.06691", "gdpo_soft", "dpo_sft", "style"),
    Claim("DPOP stops the fall of the chosen likelihood", "2402.13228", "dpop_pairs", "dpo", "nll chosen"),
    Claim("RPO slows the fall of the chosen likelihood", "2405.16436", "rpo_pairs", "dpo_weak", "nll chosen"),
    Claim("Six rounds of SPIN beat one long round", "2401.01335", "spin", "spin_once", "new"),
    Claim("SPIN beats SFT in as many updates", "2401.01335", "spin", "sft_alone", "new"),
    Claim("DPO on own samples beats DPO on the file's pairs", "2404.14367", "online_dpo", "dpo_150", "style"),
    Claim("ActiveDPO beats a random pick", "2505.19241", "active_dpo", "random_pairs", "style"),
    Claim("PDS beats a random half", "2410.07064", "pds", "random_half", "style"),
)


def arms_of(folders: Sequence[Path]) -> Arms:
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for folder in folders:
        for name, seeds in measured(find_runs(folder)).items():
            if twice := seeds.keys() & found.setdefault(name, {}).keys():
                sys.exit(f"{name} has seeds {sorted(twice)} in {folder} and in a folder before it: which is meant?")
            found[name].update(seeds)
    return found


def difference(claim: Claim, arms: Arms) -> Difference | None:
    """Of a - b over the seeds that both have; positive where `a` is ahead."""
    first, second = (
        dict[Hashable, float]((seed, metrics[COLUMNS[claim.column]]) for seed, metrics in arms.get(arm, {}).items())
        for arm in ((claim.b, claim.a) if claim.less_is_better else (claim.a, claim.b))
    )
    return difference_of(first, second) if first and second else None


def verdict(claim: Claim, found: Difference | None, p: float | None) -> str:
    if found is None or found.low is None or found.high is None:
        return "not measured" if found is None else found.method
    if claim.as_good:
        told = {found.low > -MARGIN: "**holds**", found.high < -MARGIN: "does not hold"}
        return told.get(True, "cannot be told")
    if p is None or p >= ALPHA:
        return "inside noise"
    return "**holds**" if found.difference > 0 else "does not hold"


def ranking(arms: Arms) -> str:
    """How far the likelihood of chosen answers ranks the arms as their style does: Spearman's correlation by seed."""
    by_seed = {}
    for seed in sorted({seed for seeds in arms.values() for seed in seeds}):
        pairs = [
            [seeds[seed][COLUMNS[name]] for name in ("nll chosen", "style")] for seeds in arms.values() if seed in seeds
        ]
        if len(pairs) > 2:
            nll, style = zip(*pairs, strict=True)
            by_seed[seed] = float(spearmanr([-value for value in nll], style).statistic)
    found = spread([*by_seed.values()]) if by_seed else None
    if found is None or found.low is None:
        return "Rank correlation of likelihood and style: not measured"
    between = f"[{found.low:+.2f}, {found.high:+.2f}] over {found.n} seeds"
    return f"Rank correlation of likelihood (nll chosen) and style over {len(arms)} arms: {found.mean:+.2f} {between}"


def mean(claim: Claim, arm: str, arms: Arms) -> str:
    values = [metrics[COLUMNS[claim.column]] for metrics in arms.get(arm, {}).values()]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def table(arms: Arms) -> str:
    differences = [difference(claim, arms) for claim in CLAIMS]
    ps = holm([None if claim.as_good or not d else d.p for claim, d in zip(CLAIMS, differences, strict=True)])
    lines = ["| claim | paper | figure | A | B | A ahead by | seeds | verdict |", "|---" * 8 + "|"]
    for claim, found, p in zip(CLAIMS, differences, ps, strict=True):
        ahead = "" if found is None else f"{found.difference:+.2f}"
        if found is not None and found.low is not None and found.high is not None:
            ahead += f" [{found.low:+.2f}, {found.high:+.2f}]"
        sides = [f"`{arm}` {mean(claim, arm, arms)}" for arm in (claim.a, claim.b)]
        cells = (claim.text, claim.paper, claim.column, *sides, ahead, str(found.n if found else 0))
        lines.append(f"| {' | '.join((*cells, verdict(claim, found, p)))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of sweeps")
    arms = arms_of(parser.parse_args().folders)
    print(table(arms), "", ranking(arms), sep="\n")


if __name__ == "__main__":
    main()
