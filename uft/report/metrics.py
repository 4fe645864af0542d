"""What is known about metrics by their names: which way is better, what they are, what people ask about them."""

from __future__ import annotations

from collections.abc import Iterable

DIRECTIONS = {
    "exact_match": "max",
    "correct": "max",
    "pair_accuracy": "max",
    "reward_accuracy": "max",
    "nll": "min",
    "kl": "min",
}
"""Figures of the battery, over all rows or of one source, for which better has a meaning by itself."""

HEADLINES = ("eval/exact_match", "eval/correct", "eval/nll", "eval/pair_accuracy", "eval/reward_accuracy")
"""Judged by default, in this order, after what the runs chose by (eval.best). Not `kl`: less of it is not better."""

COSTS = ("seconds", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes")
"""Figures of result.json about the run itself."""

CAPTIONS = {
    "eval/nll": (
        "Mean negative log-likelihood per token of good held-out completions: one definition for all objectives."
    ),
    "eval/log_prob": "Summed log-likelihood of whole good completions; long ones weigh more.",
    "eval/kl": (
        "How far the model went from its reference on the data, per token, never negative. It is 0 before training: "
        "less is closer to the start, not better by itself. Read it against what was gained."
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
}

OBJECTIVE_TERM = "A term of the objective's own loss, named by the objective. Not comparable with another one's."


def last_part(name: str) -> str:
    return name.rpartition("/")[2]


def kind(name: str) -> str:
    """eval, cost or train."""
    if name.startswith("eval/"):
        return "eval"
    return "cost" if name in COSTS else "train"


def direction(name: str) -> str | None:
    """min, max, or None where neither is better."""
    return DIRECTIONS.get(last_part(name)) if name.startswith("eval/") else None


def caption(name: str) -> str | None:
    """A line for people; a source's own figure has the one of the whole battery."""
    if name.startswith("objective/"):
        return OBJECTIVE_TERM
    return CAPTIONS.get(name) or (CAPTIONS.get(f"eval/{last_part(name)}") if name.startswith("eval/") else None)


def of_objective(name: str) -> bool:
    """Whether its scale belongs to one objective under one setting: its loss, the terms, the gradient's norm."""
    return name in ("loss", "grad_norm") or name.startswith("objective/")


def ordered(names: Iterable[str], first: Iterable[str] = ()) -> list[str]:
    """`first`, then the battery over all rows, its sources, training, costs; else as they come."""
    known = dict.fromkeys(names)
    head = [name for name in first if name in known]
    rank = {"eval": 0, "train": 2, "cost": 3}
    rest = [name for name in known if name not in head]
    return head + sorted(rest, key=lambda name: rank[kind(name)] + (kind(name) == "eval" and name.count("/") > 1))
