"""Advice from finished runs: the specification's worked numbers, its simulation, and what it refuses to say."""

from itertools import combinations, product

import numpy as np
import pytest
from synthetic import loaded

from uft.errors import UftError
from uft.report.advise import Question, advise, contrasts, covered, edges, maximal_cliques, smoother

A = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): 2.0}
B = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): 1.5}
BITS = list(product((0, 1), repeat=3))
ROWS = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0)]


def values(rows):
    return np.array([A[row[:2]] + B[row[1:3]] for row in rows])


def best(rows, y, cliques, levels, ridge=1e-9):
    every = covered(list(product(*map(range, levels))), rows, cliques, levels, 1)
    found = zip((smoother(every, rows, cliques, levels, ridge) @ y).tolist(), every, strict=True)
    return max(found), len(every)


def test_worked_numbers():
    """f = A(x1, x2) + B(x2, x3) on bits, six of eight rows: cliques predict a row that is not there."""
    y = values(ROWS)
    assert y.tolist() == [0, 1, 0.5, 1.5, 2.5, 2.5]
    for cliques, predicted, at, allowed in (
        ([(0, 1), (1, 2)], 3.5, (1, 1, 1), 8),
        ([(0,), (1,), (2,)], 3.333333, (1, 1, 1), 8),
        ([(0, 1, 2)], 2.5, None, 6),
    ):
        (value, config), count = best(ROWS, y, cliques, (2, 2, 2))
        assert (round(value, 6), count) == (predicted, allowed)
        assert at in (None, config)
    assert values([(1, 1, 1)]).tolist() == [3.5]


def test_structure_is_found_where_rectangles_are_complete():
    assert [contrasts(ROWS, values(ROWS), *pair) for pair in combinations(range(3), 2)] == [[0.5], [], [0.0]]
    full = edges(BITS, values(BITS), 0.1)
    assert (full, maximal_cliques(3, full)) == ([(0, 1)], [(0, 1), (2,)])
    some = edges(ROWS, values(ROWS), 0.1)
    assert maximal_cliques(3, some) == [(0, 1), (0, 2)], "what is not known counts as acting together"


def test_what_advice_is_worth_in_a_simulation():
    """Four settings of three levels, truth on {0, 1}, {2}, {3}; 27 of 81 runs, noise .05: mean regret of 100 draws."""
    every, rng = list(product(range(3), repeat=4)), np.random.Generator(np.random.Philox(7))
    regret = {name: [] for name in ("best run", "singletons", "true", "found", "all pairs")}
    for _ in range(100):
        joint, third, fourth = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3)
        truth = {c: joint[c[0], c[1]] + third[c[2]] + fourth[c[3]] for c in every}
        rows = [every[k] for k in rng.permutation(81)[:27]]
        y = np.array([truth[row] + 0.05 * rng.normal() for row in rows])
        rng.integers(81)  # the simulation draws a configuration besides
        top = max(truth.values())
        regret["best run"].append(top - truth[rows[int(y.argmax())]])
        for name, cliques in (
            ("singletons", [(0,), (1,), (2,), (3,)]),
            ("true", [(0, 1), (2,), (3,)]),
            ("found", maximal_cliques(4, edges(rows, y, 0.05))),
            ("all pairs", list(combinations(range(4), 2))),
        ):
            (_, config), _ = best(rows, y, cliques, (3,) * 4, ridge=0.1 + 0.05)
            regret[name].append(top - truth[config])
    assert {name: round(float(np.mean(of)), 6) for name, of in regret.items()} == {
        "best run": 0.353876,
        "singletons": 0.650698,
        "true": 0.013915,
        "found": 0.116988,
        "all pairs": 0.178381,
    }


def test_invariants():
    table = smoother(ROWS, ROWS, [(0, 1, 2)], (2, 2, 2), 1e-9) @ values(ROWS)
    np.testing.assert_allclose(table, values(ROWS), atol=1e-6, err_msg="one clique is a table of means")
    additive = np.array([row[0] + 2 * row[1] - row[2] for row in BITS], float)
    assert best(BITS, additive, [(0,), (1,), (2,)], (2, 2, 2))[0][1] == (1, 1, 0)
    wider = [(*row, n) for n in (0, 1) for row in BITS]
    with_it = smoother(wider, wider, [(0, 1), (1, 2), (3,)], (2, 2, 2, 2), 1e-6) @ values(wider)
    np.testing.assert_allclose(with_it, values(wider), atol=1e-5, err_msg="an irrelevant setting changes nothing")
    for config in covered(BITS, ROWS, [(0, 1), (1, 2)], (2, 2, 2), 1):
        assert all(any(row[i : i + 2] == config[i : i + 2] for row in ROWS) for i in (0, 1))


BETAS, RATIOS = (0.01, 0.03, 0.1, 0.3), (0.25, 0.5, 0.75)


def runs(noise=0.001, seeds=(1, 2), lacking=(0.3, 0.75)):
    """A grid in which settings add up, without its best configuration, that of dpo."""
    rng, found = np.random.Generator(np.random.Philox(3)), []
    for name, beta, ratio, seed in product(("uft", "dpo"), BETAS, RATIOS, seeds):
        if name == "dpo" and (beta, ratio) == lacking:
            continue
        value = 0.3 + 0.1 * BETAS.index(beta) + 0.05 * RATIOS.index(ratio) + 0.1 * (name == "dpo")
        final = {"eval/exact_match": value + noise * rng.normal(), "eval/nll": -value + noise * rng.normal()}
        found.append(loaded(name, seed, final=final, objective__beta=beta, data__ratio=ratio))
    return found


def test_a_configuration_that_was_not_run_is_proposed_as_a_command_whatever_the_order_of_the_runs():
    said = advise(runs(), Question("exact_match", least=1))
    lines = said.splitlines()
    first = lines[lines.index("predicted, ± from seeds alone:") + 1]
    assert first.startswith("  0.8"), said
    assert first.endswith("not run  uft train objective=dpo objective.beta=0.3 data.ratio=0.75")
    assert "best so far  0.7494" in said
    assert "Nothing better" not in said
    assert advise(runs()[::-1], Question("exact_match", least=1)) == said
    declared = advise(runs(), Question("eval/nll", cliques="objective;beta;ratio"))
    assert "less is better" in declared
    assert "not run  uft train objective=dpo objective.beta=0.3 data.ratio=0.75" in declared


def test_it_says_when_it_does_not_know():
    for noise, lacking in ((0.5, (0.3, 0.75)), (0.001, None)):
        said = advise(runs(noise, lacking=lacking), Question("exact_match"))
        assert "Nothing better than the best run within its noise" in said or "Nothing is advised" in said
    luck = [loaded("uft", 1, final={"eval/nll": float(n * n % 7)}, objective__beta=0.1 * n) for n in range(1, 15)]
    assert "Nothing is advised" in advise(luck, Question("nll", noise=0.1))


def test_what_is_refused_is_told_at_once():
    with pytest.raises(UftError) as refused:
        advise(runs(seeds=(1,))[:11], Question("exact_match"))
    assert [problem.what for problem in refused.value.problems] == ["11 configurations", "one seed each"]
    keys = ("objective__beta", "data__ratio", "optim__lr")
    many = [
        loaded("uft", 1, final={"eval/nll": n}, **dict(zip(keys, (n, n * 7 % 199, n % 3), strict=True)))
        for n in range(200)
    ]
    for found, question, why in (
        (runs(), Question("nosuch"), "no finished run has it"),
        (runs(), Question("exact_match", cliques="objective,speed"), "none of what varies"),
        (many, Question("nll", noise=1.0), "combinations of levels"),
    ):
        with pytest.raises(UftError, match=why):
            advise(found, question)
