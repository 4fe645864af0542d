"""Curves are thinned without losing what one looks for in them; samples stand side by side."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from random import Random

from synthetic import loaded

from uft.report import compare as module
from uft.report.compare import curves, fitting, samples, thinned


def lines(count, **metrics):
    return tuple(
        {"step": n, "tokens": 10 * n, "seconds": n / 3, **{k: f(n) for k, f in metrics.items()}} for n in range(count)
    )


def test_a_short_curve_is_as_it_was_written():
    run = loaded(lines=({"step": 0, "tokens": 0, "eval/nll": 3.0}, *lines(4, loss=lambda n: n / 7)[1:]))
    found = curves([run])
    assert list(found) == ["loss"], "a single point is no curve, nor are step, tokens and seconds"
    assert found["loss"][0]["step"] == [1, 2, 3]
    assert found["loss"][0]["value"] == [0.142857, 0.285714, 0.428571], "six digits"
    assert found["loss"][0]["seconds"] == [0.333333, 0.666667, 1.0]


def test_an_evaluation_line_without_time_has_the_time_before_it():
    training = {"step": 5, "seconds": 2.5, "tokens": 50, "loss": 1}
    found = curves([loaded(lines=({"step": 0, "eval/nll": 3}, training, {"step": 7, "eval/nll": 2}))])["eval/nll"][0]
    assert found == {"step": [0, 7], "tokens": [None, 50], "seconds": [0, 2.5], "value": [3, 2]}


def test_values_that_are_not_finite_are_kept_as_text_and_text_is_no_point():
    values = [1.0, "nan", "inf", "odd", None, True, "-inf", 2]
    found = curves([loaded(lines=tuple({"step": n, "loss": value, "stage": "dpo"} for n, value in enumerate(values)))])
    assert list(found) == ["loss"]
    assert found["loss"][0]["value"] == [1.0, "nan", "inf", "-inf", 2]
    assert found["loss"][0]["step"] == [0, 1, 2, 6, 7]
    json.dumps(found, allow_nan=False)


def test_thinning_keeps_ends_and_extremes():
    for count, limit in product((3, 501, 9_999), (4, 20, 100, 500)):
        noise = Random(count)
        values = [noise.gauss(0, 1) for _ in range(count)]
        kept = thinned(values, limit)
        assert kept == (list(range(count)) if count <= limit else sorted(set(kept)))
        assert len(kept) <= limit
        assert {0, count - 1} <= set(kept)
        chosen = [values[place] for place in kept]
        assert (min(chosen), max(chosen)) == (min(values), max(values))


def test_every_stretch_keeps_its_spikes_and_a_flat_curve_is_spread_over_its_length():
    values = [0.0] * 5000
    spikes = {777: 9.0, 778: -9.0, 2500: math.nan, 4998: 5.0}
    for place, value in spikes.items():
        values[place] = value
    assert spikes.keys() <= set(thinned(values, 500))
    assert max(b - a for a, b in pairwise(thinned([1.0] * 10_000, 100))) < 400


def test_many_curves_share_a_budget(monkeypatch):
    main, other = [(True, 500)] * 300, [(False, 500)] * 1000
    monkeypatch.setattr(module, "CURVE_BUDGET", 200_000)
    limits = fitting([*main, *other])
    assert sum(min(count, limits[0] if is_main else limits[1]) for is_main, count in [*main, *other]) <= 200_000
    assert limits == (500, 40)
    assert fitting(main[:10]) == (500, 500)
    assert fitting(main * 1000) == (40, 0), "past all limits only main curves are left"
    monkeypatch.setattr(module, "CURVE_BUDGET", 130)
    assert curves([loaded(lines=lines(300, loss=math.sqrt, lr=math.sqrt))] * 3).keys() == {"loss"}


def sample(step=5, source="pairs", row="pairs:0", prompt="2 + 2", reply="4", **more):
    return {"step": step, "source": source, "row": row, "prompt": prompt, "reply": reply, **more}


def test_answers_to_one_prompt_stand_together():
    first = loaded(samples=(sample(answer="4", verdict={"exact_match": 1.0, "plain": 0.5}), sample(row="pairs:1")))
    second = loaded(samples=(sample(step=7, reply="five", verdict={}),))
    other = loaded(samples=(sample(prompt="2 + 3"),))
    together, alone, another = samples([loaded(samples=()), first, second, other])
    assert together == {
        "source": "pairs",
        "row": "pairs:0",
        "prompt": "2 + 2",
        "reference": "4",
        "answers": [
            {"run": "r1", "step": 5, "text": "4", "verdict": "exact_match 1, plain 0.5"},
            {"run": "r2", "step": 7, "text": "five", "verdict": None},
        ],
    }
    assert [answer["run"] for answer in alone["answers"]] == ["r1"]
    assert (another["row"], another["prompt"], len(another["answers"])) == ("pairs:0", "2 + 3", 1), "of the same row"


def test_sources_take_turns_and_there_is_an_end():
    many = tuple(sample(source=s, row=f"{s}:{n}", prompt=str(n)) for s in ("a", "b") for n in range(50))
    found = samples([loaded(samples=many)])
    assert [each["source"] for each in found[:4]] == ["a", "b", "a", "b"]
    assert len(found) == 24


def test_long_texts_are_cut_with_a_note():
    found = samples([loaded(samples=(sample(reply="x" * 1_000_000),))])[0]["answers"][0]["text"]
    assert len(found) < 4100
    assert found.endswith("x [... 996,000 more characters]")
    crowd = samples([loaded(samples=tuple(sample(row=str(n), reply="x" * 5000) for n in range(24)))] * 1000)
    assert sum(len(answer["text"]) for each in crowd for answer in each["answers"]) < 2_300_000


def test_samples_of_any_shape_become_text():
    odd = {"step": 3, "source": None, "row": 7, "prompt": ["a"], "reply": {"x": 1}, "answer": 5, "verdict": {"ok": "?"}}
    lone = sample(reply="half \ud83d", prompt="\ud83d")
    found = samples([loaded(samples=(odd, lone, {"step": 3}))])
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    assert (found[0]["prompt"], found[0]["reference"]) == ("['a']", "5")
