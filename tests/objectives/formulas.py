"""The formula of every objective, written anew in numpy from the papers, for test_formulas.py.

A formula sees answers, in rows of one good and several bad ones, and the objective's keys k.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    row: int
    good: bool
    x: np.ndarray  # (n,) log-probs of its tokens under the policy
    c: np.ndarray  # the same numbers as constants: no slope goes through them
    r: np.ndarray  # under the reference
    target: float  # explicit reward; NaN: none
    soft: float  # how likely it is the better one of its pair
    baseline: float  # mean log-prob under other models


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def ls(v):
    return np.log(sigmoid(v))


def total(answer):
    return answer.x.sum()


def mu(answer):
    return answer.x.mean()


def ratio(answer):
    return answer.x.sum() - answer.r.sum()


def odds(answer):
    p = np.exp(mu(answer))
    return np.log(p / (1 - p))


def margin(won, lost):
    return ratio(won) - ratio(lost)


def pairs(answers):
    return [(won, lost) for won in answers for lost in answers if won.row == lost.row and won.good and not lost.good]


def over_pairs(f):
    """Mean over pairs, and `sft_weight` times the mean over good answers of their mean NLL."""

    def formula(answers, k):
        likelihood = np.mean([-mu(a) for a in answers if a.good])
        return np.mean([f(won, lost, k) for won, lost in pairs(answers)]) + k.sft_weight * likelihood

    return formula


def over_answers(f):
    return lambda answers, k: np.mean([f(a, k) for a in answers])


# --- likelihood ------------------------------------------------------------------------------------------------------


def sft(answers, k):
    if k.reduction == "sequence":
        return np.mean([-mu(a) for a in answers])
    return -sum(total(a) for a in answers) / sum(len(a.x) for a in answers)


def dynamic_ft(answers, k):
    if k.reduction == "sequence":
        return np.mean([np.mean(-np.exp(a.c) * a.x) for a in answers])
    return -sum(np.sum(np.exp(a.c) * a.x) for a in answers) / sum(len(a.x) for a in answers)


PHI = {
    "total_variation": lambda r: r,
    "pearson": lambda r: r - r**2 / 4,
    "hellinger": lambda r: r / (1 + r),
    "reverse_kl": lambda r: 1 - np.exp(-r),
    "forward_kl": lambda r: np.log(1 + r),
    "jensen_shannon": lambda r: np.log(2 - np.exp(-r)),
}


def f_sft(a, k):
    return -PHI[k.f](k.beta * (ratio(a) if k.ratio == "sum" else ratio(a) / len(a.x)))


def poft(a, k):
    return -ls(k.beta * (mu(a) - a.baseline) + k.gamma)


def ift(a, k):
    losses = -a.x
    sums = [sum(k.gamma ** (i - t) * losses[i] for i in range(t, len(losses))) for t in range(len(losses))]
    return np.dot(losses, sums) / np.sum(sums)


# --- pairs -----------------------------------------------------------------------------------------------------------


def dpo(won, lost, k):
    return -ls(k.beta * margin(won, lost))


def cdpo(won, lost, k):
    h, e = k.beta * margin(won, lost), k.label_smoothing
    return -(1 - e) * ls(h) - e * ls(-h)


def robust_dpo(won, lost, k):
    h, e = k.beta * margin(won, lost), k.label_smoothing
    return (-(1 - e) * ls(h) + e * ls(-h)) / (1 - 2 * e)


def hinge(won, lost, k):
    return max(0.0, 1 - k.beta * margin(won, lost))


def ipo(won, lost, k):
    h = margin(won, lost) if k.length == "sum" else ratio(won) / len(won.x) - ratio(lost) / len(lost.x)
    return (h - 1 / (2 * k.tau)) ** 2


def irft(won, lost, k):
    m = k.beta * margin(won, lost)
    return {"sigmoid": -ls(m), "hinge": max(0.0, 1 - m), "linear": -m}[k.link]


def rpo(won, lost, k):
    likelihood = -k.beta * total(won) if k.nll_norm == "sum" else -mu(won)
    return -ls(k.beta * margin(won, lost)) + k.eta * likelihood


def dpop(won, lost, k):
    return -ls(k.beta * (margin(won, lost) - k.lam * max(0.0, -ratio(won))))


def nca(won, lost, k):
    return -ls(k.beta * ratio(won)) - 0.5 * ls(-k.beta * ratio(won)) - 0.5 * ls(-k.beta * ratio(lost))


def rdpo_length(won, lost, k):
    return -ls(k.beta * margin(won, lost) + k.alpha * (len(won.x) - len(lost.x)))


def ld_dpo(won, lost, k):
    shared = min(len(won.x), len(lost.x))
    discounted = [(a.x - a.r)[:shared].sum() + k.alpha * (a.x - a.r)[shared:].sum() for a in (won, lost)]
    return -ls(k.beta * (discounted[0] - discounted[1]))


def gdpo_soft(won, lost, k):
    return -ls(k.beta * (2 * won.soft - 1) * margin(won, lost))


def gipo_soft(won, lost, k):
    certainty, h = 2 * won.soft - 1, margin(won, lost)
    if k.form == "substitute":
        return (certainty * h - 1 / (2 * k.beta)) ** 2
    return certainty**2 * (h - 1 / (2 * k.beta)) ** 2


def gropo_soft(won, lost, k):
    m = k.beta * (2 * won.soft - 1) * margin(won, lost)
    return 4 * k.alpha / (1 + k.alpha) ** 2 * (-ls(m) + k.alpha * sigmoid(-m))


def asft(won, lost, k):
    return -mu(won) * k.alpha + k.lam * (-ls(k.beta * odds(won)) - ls(-k.beta * odds(lost)))


def orpo(won, lost, k):
    return -mu(won) * k.alpha - k.lam * ls(odds(won) - odds(lost))


def simpo(won, lost, k):
    m, e = k.beta * (mu(won) - mu(lost)) - k.gamma, k.label_smoothing
    return -(1 - e) * ls(m) - e * ls(-m)


def cpo(won, lost, k):
    m, e = k.beta * (total(won) - total(lost)), k.label_smoothing
    return -(1 - e) * ls(m) - e * ls(-m) - k.alpha * mu(won)


# --- points ----------------------------------------------------------------------------------------------------------


def kto(a, k):
    z = max(0.0, k.z)
    if a.good:
        return k.desirable_weight * (1 - sigmoid(k.beta * (ratio(a) - z)))
    return k.undesirable_weight * (1 - sigmoid(k.beta * (z - ratio(a))))


def uft(answers, k):
    def implicit(a):
        return k.beta * (ratio(a) / len(a.x) if k.length_normalize else ratio(a))

    def distance(a):
        s = sigmoid(implicit(a))
        return (s - a.target) ** 2 if k.loss == "mse" else -a.target * np.log(s) - (1 - a.target) * np.log(1 - s)

    points = [distance(a) for a in answers if not np.isnan(a.target)]
    compared = [-ls(implicit(won) - implicit(lost)) for won, lost in pairs(answers) if np.isnan(won.target)]
    return np.mean(points + compared)


def dft(answers, k):
    """The surrogate on the first visit: u was exp(u_init) everywhere, and the weights are constants."""
    join = mu if k.length_normalize else total
    losses = []
    for positive in (a for a in answers if a.good):
        against = [a for a in answers if a.row == positive.row and not a.good]
        grown = [a.c.mean() / k.tau if k.length_normalize else a.c.sum() / k.tau - a.r.sum() for a in against]
        u = (1 - k.gamma) * np.exp(k.u_init) + k.gamma * np.mean(np.exp(grown))
        losses.append(-join(positive) + np.mean([np.exp(g) / u * join(a) for g, a in zip(grown, against, strict=True)]))
    return np.mean(losses)


LIKELIHOOD = {
    "sft": sft,
    "dynamic_ft": dynamic_ft,
    **{f.__name__: over_answers(f) for f in (f_sft, poft, ift)},
}
PAIRS = (dpo, cdpo, robust_dpo, hinge, ipo, irft, rpo, dpop, nca, rdpo_length, ld_dpo, gdpo_soft, gipo_soft, gropo_soft)
FORMULAS = {
    **LIKELIHOOD,
    **{f.__name__: over_pairs(f) for f in (*PAIRS, asft, orpo, simpo, cpo)},
    **{"kto": over_answers(kto), "uft": uft, "una": uft, "dft": dft, "dft2": dft},
}
