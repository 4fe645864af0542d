"""Selection: the worked numbers and invariants of ActiveDPO and PDS, and what needs no model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from uft.config.schema import Model, Select
from uft.data.chat import Renderer
from uft.data.rows import Completion, Message, Row
from uft.errors import UftError
from uft.model.load import load_model, load_tokenizer
from uft.model.policy import Policy
from uft.sampling.select import (
    TAKES,
    CountSketch,
    active_dpo,
    count_of,
    most_uncertain,
    pair_features,
    pair_of,
    pds,
    pds_scores,
    pick,
    random_scores,
    top_scores,
)

SAID = (Message("assistant", "a"),)
SETTINGS = Select(by="pds", seed=0)


def row(index, *completions, prompt="p"):
    return Row("made", index, (Message("user", prompt),), completions or (Completion(SAID),))


# --- Without a model.


def test_random_choices_are_keyed_by_row():
    rows = [row(n) for n in range(50)]
    whole = random_scores(rows, 3)
    assert np.array_equal(random_scores(rows[10:20], 3), whole[10:20]), "other rows reshuffle nothing"
    assert not np.array_equal(random_scores(rows, 4), whole)
    assert len(set(whole)) == 50
    assert pick(whole, 5).places == sorted(range(50), key=lambda n: -whole[n])[:5]


def test_top_scores_are_means_of_scores_and_margins_of_pairs():
    scored = row(0, Completion(SAID, score=0.25), Completion(SAID, score=0.75))
    sides = ((True, 4.0), (False, 1.0))
    pair = row(1, *(Completion(SAID, preferred=chosen, annotations={"score": s}) for chosen, s in sides))
    assert top_scores([scored, pair, row(2, Completion(SAID, label=False))]).tolist() == [0.5, 3.0, 0.0]
    assert pick(np.array([1.0, 2.0, 2.0, 0.0]), 3).places == [1, 2, 0], "of equals the first"
    with pytest.raises(UftError, match="1 rows have none") as caught:
        top_scores([scored, row(7)])
    assert caught.value.problems[0].where == "made:7"


def test_how_many_to_keep():
    assert [count_of(rows, 10) for rows in (0.25, 0.01, 3, 20, 1)] == [2, 1, 3, 10, 1]


def test_what_the_methods_take_of_a_row():
    scores = [Completion(SAID, score=s) for s in (0.2, 0.9, 0.1)]
    assert [part.completion for part in pair_of(row(0, *scores))] == [1, 2]
    assert pair_of(row(0, scores[0], scores[0])) == () == pair_of(row(0))
    assert [part.completion for part in TAKES["pds"](row(0, *scores))] == [1]
    assert TAKES["pds"](row(0, Completion(SAID, label=False))) == ()


# --- ActiveDPO.

PHI, C = np.array([[1.0, 0, 0], [0.95, 0.1, 0], [0, 0.6, 0.2], [0, 0, 0.5]]), 0.1


def primal(phi, chosen, c):
    """sqrt(phi^T V^-1 phi) as it is written, with a matrix of size d x d."""
    v = c * np.eye(phi.shape[1]) + phi[chosen].T @ phi[chosen]
    return np.sqrt(np.einsum("nd,de,ne->n", phi, np.linalg.inv(v), phi))


def test_the_greedy_choice_of_the_worked_example():
    picks, scores = most_uncertain(PHI, C, 3)
    assert picks == [0, 2, 3], "the two longest would have been 0 and 1"
    assert scores[picks] == pytest.approx([3.162278, 2.0, 1.516575], abs=1e-6)
    assert scores[1] == pytest.approx(0.918744, abs=1e-6)
    assert most_uncertain(PHI, C, 1)[1][1:] == pytest.approx([0.959403, 2.0, 1.581139], abs=1e-6)


def test_pivoted_cholesky_is_the_primal_form_and_scores_never_rise():
    phi = np.random.default_rng(0).normal(size=(30, 7))
    before = np.full(30, np.inf)
    for count in range(1, 12):
        picks, scores = most_uncertain(phi, 0.3, count)
        others = [n for n in range(30) if n not in picks]
        assert scores[others] == pytest.approx(primal(phi, picks, 0.3)[others], abs=1e-9)
        assert scores[picks[-1]] == pytest.approx(primal(phi, picks[:-1], 0.3).max(), abs=1e-9)
        assert (scores <= before + 1e-12).all()
        before = scores
    assert most_uncertain(-phi, 0.3, 11)[0] == picks, "which side is which changes nothing"
    assert picks[0] == np.linalg.norm(phi, axis=1).argmax()
    order = np.random.default_rng(1).permutation(30)
    assert [order[n] for n in most_uncertain(phi[order], 0.3, 11)[0]] == picks
    twin = np.concatenate([phi, phi[picks[:1]]])
    assert most_uncertain(twin, 0.3, 1)[1][30] < most_uncertain(phi, 0.3, 1)[1][picks[0]]


def test_earlier_picks_are_remembered():
    phi = np.random.default_rng(2).normal(size=(20, 6))
    settings = replace(SETTINGS, ridge=0.1)
    c = 0.1 * float(np.median((phi[5:] ** 2).sum(1)))
    picked = active_dpo(phi[5:].astype(np.float32), phi[:5].astype(np.float32), settings, 4)
    kept: list[int] = list(range(5))
    for place in picked.places:
        scores = primal(phi, kept, c)
        scores[kept] = -1
        assert place + 5 == scores.argmax()
        kept.append(place + 5)
    assert np.array_equal(picked.features, phi[5:].astype(np.float32)[picked.places])
    with pytest.raises(UftError, match="two completions with the same gradient"):
        active_dpo(np.zeros((3, 6), np.float32), np.zeros((0, 6), np.float32), settings, 1)


def test_a_sketch_keeps_inner_products_in_the_mean():
    """All 64 maps of three coordinates to two places with a sign."""
    u, v = torch.tensor([1.0, 0.5, -0.3]), torch.tensor([0.2, -1.0, 0.7])
    sketches = [CountSketch(2, [torch.tensor(codes)]) for codes in product(range(4), repeat=3)]
    found = np.array([float(sketch([u]) @ sketch([v])) for sketch in sketches])
    assert (found.mean(), found.var()) == pytest.approx((-0.51, 0.821050), abs=1e-6)
    made = CountSketch.of([3, 1000], 64, seed=1)
    assert all(bool(((codes >= 0) & (codes < 128)).all()) for codes in made.maps)
    assert len(made.maps[1].unique()) == 128
    again = CountSketch.of([3, 1000, 5], 64, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(made.maps, again.maps, strict=False))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


MODEL = Model(name="playground", path="builtin:playground")


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model(MODEL, torch.device("cpu"), 0))


@pytest.fixture(scope="module")
def encode(tokenizer):
    renderer = Renderer(tokenizer)
    return lambda prompt, reply: renderer.encode((Message("user", prompt),), (Message("assistant", reply),))


def test_features_are_differences_of_unit_gradients(policy, encode):
    pairs = [(encode("copy : fox", "fox"), encode("copy : fox", reply)) for reply in ("red owl", "fox", "sure ! fox")]
    phi = pair_features(policy, pairs, replace(SETTINGS, dim=1 << 16), lambda: False)
    lengths = np.linalg.norm(phi, axis=1)
    assert lengths[1] == 0, "two equal replies"
    assert 0.1 < lengths[0] <= 2
    assert 0.1 < lengths[2] <= 2
    swapped = pair_features(policy, [pair[::-1] for pair in pairs], replace(SETTINGS, dim=1 << 16), lambda: False)
    assert np.array_equal(swapped, -phi)
    assert all(parameter.grad is None for parameter in policy.module.parameters())


# --- PDS.

X = torch.tensor([[1.0, 0.5], [0.2, -1.0], [-0.7, 0.3], [1.0, 0.5]], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1])  # row 3 has row 0's input and another label
DEV = torch.tensor([[0.9, 0.6], [-0.5, 0.1]], dtype=torch.float64), torch.tensor([0, 2])
W0 = torch.tensor([0.1, 0.0, 0.0, -0.1, 0.0, 0.1], dtype=torch.float64)
EXACT = [1.093385, 0.260566, 0.453481, -0.425456]


def cross_entropy(theta, x, y):
    return torch.nn.functional.cross_entropy(x.to(theta.dtype) @ theta.view(3, 2).T, y, reduction="none")


def gradient_at(theta, x, y):
    leaf = theta.detach().requires_grad_()
    return torch.autograd.grad(cross_entropy(leaf, x, y).mean(), leaf)[0]


def softmax_regression(dtype=torch.float64, noise=0.0, **changes):
    settings = replace(SETTINGS, steps=3, lr=0.5, batch=4, eps=0.01)
    generator = torch.Generator().manual_seed(0)

    def losses(theta, rows):
        found = cross_entropy(theta, X[rows], Y[rows])
        return found + noise * torch.randn(found.shape, generator=generator)

    step, dev = (lambda theta, t: gradient_at(theta, X, Y)), (lambda theta: gradient_at(theta, *DEV))
    return pds_scores(W0.to(dtype), losses, step, dev, replace(settings, **changes))


def test_scores_of_the_worked_example():
    assert softmax_regression() == pytest.approx(EXACT, abs=5e-6)
    assert softmax_regression(torch.float32) == pytest.approx(EXACT, abs=3e-5)
    assert pick(softmax_regression(), 2).places == [0, 2]
    assert softmax_regression(steps=1) == pytest.approx([0.215297, 0.047730, 0.090799, -0.065016], abs=2e-6)


def test_scores_are_the_derivative_of_the_area_under_the_dev_loss():
    def area(weights):
        theta, total = W0, 0.0
        for _ in range(3):
            leaf = theta.detach().requires_grad_()
            theta = theta - 0.5 * torch.autograd.grad((weights * cross_entropy(leaf, X, Y)).sum(), leaf)[0]
            total += float(cross_entropy(theta, *DEV).mean())
        return total

    even, h = torch.full((4,), 0.25, dtype=torch.float64), 1e-5
    moved = [h * torch.eye(4, dtype=torch.float64)[n] for n in range(4)]
    expected = [-(area(even + one) - area(even - one)) / (2 * h) for one in moved]
    assert softmax_regression(eps=0.001) == pytest.approx(expected, abs=1e-6)


def test_the_error_falls_with_the_square_of_the_length():
    far, near = (np.abs(softmax_regression(eps=eps) - EXACT_LIMIT).max() for eps in (0.1, 0.01))
    assert far == pytest.approx(2.8e-4, rel=0.05)
    assert near == pytest.approx(far / 100, rel=0.05)


EXACT_LIMIT = softmax_regression(eps=1e-4)


def test_a_length_that_is_too_long_is_halved_and_noise_is_refused():
    assert softmax_regression(eps=3.0) == pytest.approx(softmax_regression(eps=0.75), abs=1e-12)
    with pytest.raises(UftError, match="disagree, down to") as caught:
        softmax_regression(noise=0.1)
    assert caught.value.problems[0].what == "select.eps"


def test_rows_like_the_dev_rows_score_highest_and_the_policy_is_left_as_it_was(policy, encode):
    words = ("fox", "owl", "red", "cat", "bird", "moon")
    dev = [(encode(f"sort : {word}", word),) for word in words]
    others = [(encode(f"copy : {word}", f"the {word}"),) for word in words]
    before = [parameter.detach().clone() for parameter in policy.module.parameters()]
    scores = pds(policy, [*others, *dev], dev, replace(SETTINGS, steps=2, batch=12), 768, lambda: False)
    assert (scores[6:] > 0).all(), "a dev row among the candidates"
    assert scores[6:].mean() > scores[:6].mean()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))
    split = pds(policy, [*others, *dev], dev, replace(SETTINGS, steps=2, batch=12), 60, lambda: False)
    assert split == pytest.approx(scores, rel=0.02), "batches of other sizes"
