"""Metrics by their names: which direction is better, captions, and the headline metrics that a comparison judges."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.config.messages import written
from uft.errors import Problem, raise_problems
from uft.report.runs import COSTS, EVALS, LoadedRun

DIRECTIONS = {
    **dict.fromkeys(("exact_match", "correct", "pair_accuracy", "reward_accuracy", "acc", "acc_norm", "mean"), "max"),
    **dict.fromkeys(
        (f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")), "max"
    ),
    **dict.fromkeys((f"pass@{2**power}" for power in range(11)), "max"),
    **dict.fromkeys(("nll", "kl"), "min"),
}
"""Evaluation metrics, over all rows or of one source, of which one direction is better by itself."""

SHARES = {name for name, better in DIRECTIONS.items() if better == "max"} | {"plain", "answered"}
"""Metrics between 0 and 1."""

LIKELIHOOD = "eval/nll"
HEADLINES = ("eval/exact_match", "eval/correct", "eval/pair_accuracy", "eval/reward_accuracy", LIKELIHOOD)
"""Judged by default, in this order: what a checker says, which of two answers is preferred, likelihood, which does not
rank what people want. A metric of `eval.best` that is not the likelihood comes first, figures of `uft eval` that
several runs have come last. Not `log_ratio`: more of it is not better."""

CAPTIONS = {
    "eval/nll": (
        "Mean negative log-likelihood per token of good held-out completions: one definition for all objectives."
    ),
    "eval/log_prob": "Summed log-likelihood of whole good completions; long ones weigh more.",
    "eval/log_ratio": (
        "log pi - log pi_ref per token of good completions: 0 before training, below it where they have become less "
        "likely. Neither more nor less is better by itself."
    ),
    "eval/kl": (
        "Of earlier versions: an estimate of the distance from the reference on the data, which a few tokens decide."
    ),
    "eval/pair_accuracy": "How often the better completion of a pair is the likelier one, whole sequences compared.",
    "eval/reward_accuracy": (
        "How often the better completion has the higher implicit reward; 0.5 before the first step."
    ),
    "eval/margin": (
        "Implicit reward of the better completion minus that of the worse (beta = 1). Its size depends on how long "
        "one trains, so it is no measure of quality: reward_accuracy is."
    ),
    "eval/chosen_reward": (
        "log pi - log pi_ref of good completions. It often falls while the margin grows: the objective sees only the "
        "difference, and pushing the rejected side down pulls similar text down with it. It is a worry when nll or "
        "exact_match get worse too; a likelihood term (sft_weight, or demonstrations in the mixture) holds it up."
    ),
    "eval/rejected_reward": "log pi - log pi_ref of the other completions. It should fall faster than the chosen one.",
    "eval/completion_length": (
        "Tokens of greedy answers. A rise beside better preferences may be the preference for length."
    ),
    "eval/exact_match": "Share of greedy answers that the checker takes as they are.",
    "eval/correct": "Share of greedy answers with the right result, whatever is said around it.",
    "eval/plain": "Share of greedy answers without chatter.",
    "loss": (
        "What the objective minimises. Another objective, or another beta, minimises another quantity: the curves "
        "show whether a run is healthy, never which one is better."
    ),
    "nll": (
        "Negative log-likelihood per supervised token of the good completions the objective took, on the rows it "
        "trained on. The same definition everywhere, but rows the objective leaves out are not in it."
    ),
    "grad_norm": "Norm of the gradient before clipping; its scale follows the loss.",
    "lr": "Learning rate of the step.",
    "tokens_per_second": "Speed between two lines; only runs on the same machine can be compared.",
    "mfu": "Share of what the device multiplies at best that went into the model's own products, attention left out.",
}
OBJECTIVE_TERM = "A term of the objective's own loss, named by the objective. Not comparable with another one's."


def kind(name: str) -> str:
    """eval, cost or train."""
    return "eval" if name.startswith(("eval/", EVALS)) else "cost" if name in (*COSTS, "mfu") else "train"


def direction(name: str) -> str | None:
    """min, max, or None where neither is better."""
    return DIRECTIONS.get(last_part(name)) if kind(name) == "eval" else None


def last_part(name: str) -> str:
    """`exact_match` of `evals/gsm8k/exact_match,strict-match`."""
    return name.rpartition("/")[2].partition(",")[0]


def is_share(name: str) -> bool:
    return kind(name) == "eval" and last_part(name) in SHARES


def possible(name: str) -> tuple[float | None, float | None]:
    """The least and the most that a metric can be; None where there is no such bound."""
    if is_share(name):
        return 0.0, 1.0
    return (0.0 if last_part(name) in ("nll", "kl", "grad_norm", "lr", "completion_length") else None), None


def caption(name: str) -> str | None:
    """A line for people; a source's own metric has the caption of the metric over all rows."""
    if name.startswith("objective/"):
        return OBJECTIVE_TERM
    return CAPTIONS.get(name) or (CAPTIONS.get(f"eval/{last_part(name)}") if kind(name) == "eval" else None)


def of_objective(name: str) -> bool:
    """Whether its scale belongs to one objective under one setting: its loss, the terms, the gradient's norm."""
    return name in ("loss", "grad_norm") or name.startswith("objective/")


def ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """`first`, evaluation over all rows, evaluation by source, training, costs; else as they come."""
    known = dict.fromkeys(names)
    rank = {"eval": 0, "train": 2, "cost": 3}
    rest = [name for name in known if name not in first]
    rest.sort(key=lambda name: rank[kind(name)] + (kind(name) == "eval" and name.count("/") > 1))
    return [name for name in first if name in known] + rest


@dataclass(frozen=True)
class Headline:
    """A metric that the comparison judges."""

    metric: str
    direction: str  # min or max

    @property
    def sign(self) -> int:
        return 1 if self.direction == "max" else -1


def headlines(
    runs: Sequence[LoadedRun], known: Collection[str], wanted: Sequence[str], comparable: bool
) -> list[Headline]:
    """The metrics to judge: `wanted` ones, those the runs chose their best step by, and HEADLINES.

    `known`: metrics that some run has. `comparable`: all runs have one objective under one setting, so that even its
    loss may be judged. Raises UftError that lists every wanted metric that cannot be judged.
    """
    problems: list[Problem] = []
    order: list[Headline] = []
    for word in wanted if known else ():  # `eval/nll`, `exact_match`, `eval/margin:max`
        name, _, asked = word.rpartition(":") if word.endswith((":min", ":max")) else (word, "", "")
        metric = next((full for full in (f"eval/{name}", name) if full in known), "")
        better = asked or direction(metric) or ("min" if metric in ("loss", "nll") else "")
        advice = ""
        if not metric:
            why = "no run has this figure"
        elif of_objective(metric) and not comparable:
            why = "the runs minimise different quantities, which cannot be compared"
            advice = "a lower one is not a better model; compare them by the evaluation:  --metric eval/nll"
        elif not better:
            why, advice = "neither more nor less of it is better by itself", f"say which:  {word}:max"
        else:
            order.append(Headline(metric, better))
            continue
        problems.append(Problem(f"--metric {word}", why, advice=(advice,) if advice else ()))
    raise_problems(problems, footer="Figures there are:  " + listed([*known], 40))
    chosen = Counter((str(run.config.get("eval.best")), str(run.config.get("eval.best_mode"))) for run in runs)
    chosen.pop((LIKELIHOOD, "min"), None)  # the default, which has its place among HEADLINES
    order += [Headline(*pair) for pair, _ in chosen.most_common() if comparable or not of_objective(pair[0])]
    order += [Headline(name, DIRECTIONS[name.removeprefix("eval/")]) for name in HEADLINES]
    of_evals = [name for name in known if name.startswith(EVALS) and name.count("/") == 2 and last_part(name) != "kl"]
    shared = [name for name in of_evals if len(runs) == 1 or sum(name in run.evals for run in runs) > 1]
    order += [Headline(name, str(direction(name))) for name in shared]
    by_metric: dict[str, Headline] = {}
    for headline in order:
        if headline.metric in known and headline.direction in ("min", "max"):
            by_metric.setdefault(headline.metric, headline)
    return list(by_metric.values())


# --- Numbers and lists in sentences, and values as JSON takes them.


DIGITS = 6  # significant, in compare.json


def plural(count: int, noun: str) -> str:
    """`one seed`, `3 seeds`."""
    return f"one {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def truncated(text: str, most: int) -> str:
    """The text, cut with a note that says how much is missing."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"


def encodable(text: str) -> str:
    """Without lone surrogates (half an emoji), which UTF-8 does not encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def places(values: Iterable[Any]) -> int:
    """Decimals for a column of figures: as many as give the usual one three or four digits."""
    sizes = [abs(value) for value in values if isinstance(value, (int, float)) and value and math.isfinite(value)]
    power = math.floor(math.log10(statistics.median(sizes))) if sizes else 0
    return min(8, max(0, 2 - power if power < -1 else 3 - max(0, power)))


def fixed(value: float | str, decimals: int) -> str:
    """`value` with these decimals; what would be too long has powers of ten, text stays."""
    if isinstance(value, str):
        return value
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.2e}"


def rounded(value: float) -> float | str:
    """Six significant digits; a value that is not finite as metrics.jsonl writes it."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def jsonable(value: Any) -> Any:
    """`value` in terms of JSON: floats rounded, non-finite ones as text, no lone surrogates, keys as text."""
    if isinstance(value, float):
        return rounded(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {encodable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return encodable(str(value))


def config_value(value: Any) -> Any:
    """A configuration's value for a cell: numbers, booleans and text as they are, lists as they are typed."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else encodable(written(value))
