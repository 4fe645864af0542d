"""The interleave: shares to within a row, orders that are a source's own, exact resumption."""

import json
import random
from collections import Counter

import pytest

from uft.data.mixture import Mixture, Portion, epoch_rows, mixture_weights, portion
from uft.data.rows import Completion, Message, Row
from uft.errors import UftError


def shares(draw, count):
    raw = [draw.random() ** 3 + 1e-3 for _ in range(count)]
    return [value / sum(raw) for value in raw]


def mixture(weights, sizes=None, seed=0, names=None):
    names = names or [f"s{n}" for n in range(len(weights))]
    return Mixture(names, sizes or [7 + 3 * n for n in range(len(weights))], weights, seed)


@pytest.mark.parametrize("sources", [1, 2, 3, 5, 12, 40])
def test_every_prefix_holds_the_shares_to_within_one_row(sources):
    draw = random.Random(sources)
    for _ in range(8):
        weights = shares(draw, sources)
        counts = [0] * sources
        for n, this in enumerate(mixture(weights).take(600), start=1):
            counts[this.source] += 1
            assert all(abs(count - n * weight) < 1 for count, weight in zip(counts, weights, strict=True))


def test_every_window_of_two_sources_holds_the_shares_to_within_one_row():
    draw = random.Random(0)
    for weight in [0.5, 0.1, 2 / 3, *(draw.random() for _ in range(10))]:
        first = [this.source == 0 for this in mixture([weight, 1 - weight]).take(300)]
        sums = [0]
        for taken in first:
            sums.append(sums[-1] + taken)
        for start in range(0, 300, 7):
            for end in range(start + 1, 301):
                assert abs(sums[end] - sums[start] - (end - start) * weight) <= 1 + 1e-9


def test_draws_of_small_mixtures():
    assert [this.source for this in mixture([0.5, 0.5]).take(6)] == [0, 1, 0, 1, 0, 1]
    draws = Mixture(["a", "b", "c"], [5, 0, 5], [0.5, 0.0, 0.5], 0).take(50)
    assert {this.source for this in draws} == {0, 2}, "a share of zero is never drawn"
    same_on_every_machine = [3, 7, 2, 6, 4, 5, 0, 1]
    assert [this.index for this in Mixture(["a"], [8], [1.0], 0).take(8)] == same_on_every_machine
    draws = mixture([0.5, 0.5], [30, 30]).take(60)
    assert order(draws, 0) != order(draws, 1), "two sources of one size have different orders"


def test_the_interleave_knows_no_seed_and_the_order_does():
    weights = [0.6, 0.3, 0.1]
    first, second = (mixture(weights, [50, 50, 50], seed).take(100) for seed in (0, 1))
    assert [this.source for this in first] == [this.source for this in second]
    assert [this.index for this in first] != [this.index for this in second]
    assert mixture(weights, [50, 50, 50], 0).take(100) == first


def order(draws, source):
    return [(this.index, this.visit) for this in draws if this.source == source]


def test_a_share_or_another_source_never_reorders_one():
    alone = order(Mixture(["b"], [20], [1.0], 3).take(60), 0)
    half = order(Mixture(["b", "c"], [20, 5], [0.5, 0.5], 3).take(100), 0)
    third = order(Mixture(["a", "b", "c"], [9, 20, 5], [0.1, 0.3, 0.6], 3).take(100), 1)
    assert half == alone[: len(half)]
    assert third == alone[: len(third)]


def test_a_visit_is_a_pass_over_all_rows_in_a_new_order():
    draws = Mixture(["a"], [25], [1.0], 0).take(75)
    passes = [draws[start : start + 25] for start in (0, 25, 50)]
    for number, one in enumerate(passes):
        assert sorted(this.index for this in one) == list(range(25))
        assert {this.visit for this in one} == {number}
    assert len({tuple(this.index for this in one) for one in passes}) == 3


def test_weights_by_rows_show_every_row_once_in_one_pass():
    draw = random.Random(1)
    for _ in range(20):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 9))]
        names = [f"s{n}" for n in range(len(sizes))]
        weights = mixture_weights([Portion(n, s, None, True) for n, s in zip(names, sizes, strict=True)])
        draws = Mixture(names, sizes, weights, 0).take(epoch_rows(sizes, weights))
        assert Counter((this.source, this.index) for this in draws) == {
            (source, index): 1 for source, size in enumerate(sizes) for index in range(size)
        }


def test_a_resumed_mixture_goes_on_as_if_nothing_had_happened():
    weights, sizes = [0.55, 0.3, 0.15], [11, 6, 4]
    whole = mixture(weights, sizes).take(90)
    for cut in (0, 1, 13, 50):
        first = mixture(weights, sizes)
        head = first.take(cut)
        again = mixture(weights, sizes)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + again.take(90 - cut) == whole
        assert sum(again.counts) == 90


def test_another_mixture_s_state_is_refused():
    with pytest.raises(AssertionError, match="other sources"):
        mixture([1.0]).load_state_dict(mixture([0.5, 0.5]).state_dict())
    with pytest.raises(AssertionError, match="data seed"):
        mixture([1.0], seed=1).load_state_dict(mixture([1.0], seed=2).state_dict())


# --- shares


def demo(name, rows=10, share=None):
    return Portion(name, rows, share, True)


def pairs(name, rows=10, share=None):
    return Portion(name, rows, share, False)


def test_shares_are_those_asked_for_else_by_rows():
    assert mixture_weights([demo("a", 30), pairs("b", 10)]) == [0.75, 0.25]
    assert mixture_weights([demo("a", 30, 1), pairs("b", 10, 4)]) == [0.2, 0.8]
    assert mixture_weights([demo("a", 0, 0), demo("b", 5, 1)]) == [0.0, 1.0]
    for portions in ([], [demo("a", 10, 0), demo("b", 10, 0)], [demo("a", 0), demo("b", 5)], [demo("a", 0, 1.0)]):
        with pytest.raises(UftError):
            mixture_weights(portions)
    with pytest.raises(UftError) as error:
        mixture_weights([demo("a", 10, 0.5), pairs("b"), pairs("c")])
    assert [p.what for p in error.value.problems] == ["data.sources.b.share", "data.sources.c.share"]


def test_a_ratio_is_given_to_demonstrations_together_and_keeps_proportions():
    weights = mixture_weights([demo("a", 30), pairs("b", 10), demo("c", 10), pairs("d", 30)], 0.2)
    assert weights == pytest.approx([0.15, 0.2, 0.05, 0.6])
    assert mixture_weights([demo("a", 9, 3), pairs("b", 9, 1)], 0.5) == pytest.approx([0.5, 0.5])
    for ratio in (1.0, 0.0):  # the other side is left out
        assert mixture_weights([demo("a"), pairs("b")], ratio) == [ratio, 1 - ratio]
        assert mixture_weights([demo("a") if ratio else pairs("a")], ratio) == [1.0]
    for portions, lacking in (([pairs("a")], "no demonstrations"), ([demo("a")], "no rows with feedback")):
        with pytest.raises(UftError, match=lacking):
            mixture_weights(portions, 0.5)


def test_a_source_of_several_kinds_is_what_most_of_its_rows_are():
    prompt, turns = (Message("user", "q"),), (Message("assistant", "a"),)
    shown = Row("s", 0, prompt, (Completion(turns),))
    labelled = Row("s", 1, prompt, (Completion(turns, label=True),))
    assert portion("s", [shown, shown, labelled], None) == Portion("s", 3, None, True)
    assert not portion("s", [shown, labelled], None).demonstration
    against = Row("s", 2, prompt, (Completion(turns), Completion(turns, sampled_by="model")))
    assert portion("s", [against, against], None).demonstration


# --- epochs


def test_an_epoch_by_the_exhaustion_policy():
    sizes, weights = [10, 30], [0.5, 0.5]
    assert epoch_rows(sizes, weights, "repeat") == 40
    assert epoch_rows(sizes, weights, "first") == 20
    assert epoch_rows(sizes, weights, "all") == 60
    assert epoch_rows([10, 99], [1.0, 0.0], "all") == 10


def test_first_never_repeats_a_row_and_all_shows_every_row():
    draw = random.Random(2)
    for _ in range(60):
        sizes = [draw.randint(1, 50) for _ in range(draw.randint(1, 6))]
        weights = shares(draw, len(sizes))
        first = mixture(weights, sizes).take(epoch_rows(sizes, weights, "first"))
        assert max(Counter((this.source, this.index) for this in first).values()) == 1
        every = mixture(weights, sizes).take(min(epoch_rows(sizes, weights, "all"), 5000))
        if len(every) < 5000:
            assert len({(this.source, this.index) for this in every}) == sum(sizes)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.25, 0.25], [0.9, 0.0, 0.1], [0.01, 0.98, 0.01]])
def test_after_the_first_pass_every_row_that_is_drawn_was_there(weights):
    drawn = mixture(weights, sizes=[7, 5, 11][: len(weights)])
    seen = {(draw.source, draw.index) for draw in drawn.take(drawn.first_pass)}
    assert len(seen) == sum(size for size, weight in zip(drawn.sizes, weights, strict=True) if weight)
