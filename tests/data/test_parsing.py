"""One record of every format, and what makes a record unusable."""

import math

import pytest

from uft.data.formats import recognise, rename
from uft.data.messages import Unreadable
from uft.data.rows import Kind, Row

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "good"), ("assistant", "bad")))
NAN, HH = float("nan"), "\n\nHuman: q\n\nAssistant:"


def read(record, score_range=None, kind=None):
    form = recognise(rename(record, {}), kind)
    return form.read(rename(record, {}), score_range)


def as_row(fields):
    return Row("s", 0, fields.prompt, fields.completions, fields.answer, fields.task)


@pytest.mark.parametrize(
    ("record", "kind", "prompt", "replies"),
    [
        ({"prompt": "q", "completion": "a"}, Kind.DEMONSTRATION, "q", ["a"]),
        ({"prompt": "q", "response": "a"}, Kind.DEMONSTRATION, "q", ["a"]),
        ({"prompt": [USER], "completion": [GOOD]}, Kind.DEMONSTRATION, "q", ["good"]),
        ({"instruction": "q", "output": "a"}, Kind.DEMONSTRATION, "q", ["a"]),
        ({"instruction": "q", "input": "i", "output": "a"}, Kind.DEMONSTRATION, "q\n\ni", ["a"]),
        ({"instruction": "q", "context": "i", "response": "a"}, Kind.DEMONSTRATION, "q\n\ni", ["a"]),
        ({"question": "q", "answer": "1+1=2\n#### 2"}, Kind.DEMONSTRATION, "q", ["1+1=2\n#### 2"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Kind.PREFERENCE, "q", ["a", "b"]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, Kind.PREFERENCE, "q", ["good", "bad"]),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, Kind.PREFERENCE, "q", ["good", "bad"]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, Kind.PREFERENCE, "q", ["good", "bad"]),
        ({"chosen": f"{HH} a", "rejected": f"{HH} b"}, Kind.PREFERENCE, "q", ["a", "b"]),
    ],
)
def test_every_format_gives_prompt_and_replies(record, kind, prompt, replies):
    row = as_row(read(record))
    assert row.kind is kind
    assert [turn.content for turn in row.prompt] == [prompt]
    assert [completion.text for completion in row.completions] == replies


def test_feedback_is_kept():
    for rejected in ("b", "a"):  # two equal sides are kept as they were graded
        pair = read({"prompt": "q", "chosen": "a", "rejected": rejected}).completions
        assert [(c.text, c.preferred) for c in pair] == [("a", True), (rejected, False)]
    labels = [read({"prompt": "q", "completion": "a", "label": v}).completions[0].label for v in (True, 0, 1)]
    assert labels == [True, False, True]
    record = {"prompt": "q", "response": "a", "negatives": ["x", "y"], "sampled_by": "m"}
    sampled = read(record | {"negative_log_probs": [-1.5, None]}).completions
    assert [(c.sampled_by, c.log_prob) for c in sampled] == [(None, None), ("m", -1.5), ("m", None)]


def test_scores_are_brought_to_zero_and_one():
    def score(record, score_range=None):
        return read(record, score_range).completions[0].score

    record = {"prompt": "q", "completion": "a", "score": 4}
    assert score({**record, "score_min": 1, "score_max": 5}) == 0.75
    assert score(record, (0.0, 8.0)) == 0.5
    assert score({**record, "score_min": 1, "score_max": 5}, (0.0, 8.0)) == 0.5  # the configured range wins


def test_helpsteer2_weighs_its_attributes():
    record = {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 3, "coherence": 2, "verbosity": 1}
    assert read(record).completions[0].score == pytest.approx((0.65 * 4 + 0.8 * 3 + 0.45 * 2) / 7.6)
    best = {**record, "correctness": 4, "coherence": 4}
    assert read(best).completions[0].score == 1.0


def test_ultrafeedback_gives_all_completions_of_a_prompt():
    record = {
        "instruction": "q",
        "models": ["m", "n"],
        "completions": [{"response": "a", "overall_score": 10.0}, {"response": "b", "overall_score": 5.5}],
    }
    assert [(c.text, c.score) for c in read(record).completions] == [("a", 1.0), ("b", 0.5)]
    listed = {"instruction": "q", "completions": [{"response": "a", "overall_score": None}, "b"], "ratings": [1, 10]}
    assert [(c.text, c.score) for c in read(listed).completions] == [("a", 0.0), ("b", 1.0)]


def test_the_gold_answer_and_the_task():
    assert read({"question": "q", "answer": "so\n#### 1,042"}).answer == "1,042"
    assert read({"question": "q", "answer": "Paris"}).answer == "Paris"
    fields = read({"prompt": "q", "response": "a", "answer": 42, "task": "sums"})
    assert (fields.answer, fields.task) == ("42", "sums")
    assert read({"prompt": "q", "response": "a"}).answer is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"completion": None}, "completion is missing"),
        ({"completion": " "}, "completion is empty"),
        ({"prompt": 3}, "prompt is a number"),
        ({"score": "high"}, "score is text, not a number"),
        ({"score": True}, "score is true/false, not a number"),
        ({"score": None}, "score is missing"),
        ({"score": 1.5}, "score is 1.5, outside 0 to 1"),
        ({"score": NAN}, "score is nan, outside"),
        ({"score": math.inf}, "outside"),
        ({"score_min": 1, "score_max": 1}, "is empty"),
        ({"score_max": "5"}, "score_max is '5', not a number"),
    ],
)
def test_a_scored_record_that_cannot_be_used(change, why):
    with pytest.raises(Unreadable) as error:
        read({"prompt": "q", "completion": "a", "score": 0.5, **change}, kind="scored")
    assert why in str(error.value)


@pytest.mark.parametrize("label", [2, -2, 0.5, "maybe", None, NAN, [True]])
def test_a_label_is_good_or_bad(label):
    with pytest.raises(Unreadable, match="label"):
        read({"prompt": "q", "completion": "a", "label": label})


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are the same"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]}, "share no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ({"prompt": "q", "response": "a", "negatives": []}, "negatives is missing, empty"),
        ({"prompt": "q", "response": "a", "negatives": ["x", ""]}, "negatives[1] is empty"),
        ({"prompt": "q", "response": "a", "negatives": ["x"], "negative_log_probs": [0.5]}, "not a list of 1 log-prob"),
        ({"prompt": "q", "response": "a", "negatives": ["x"], "negative_log_probs": []}, "not a list of 1 log-prob"),
        ({"prompt": "q", "response": "a", "helpfulness": 5, "correctness": 1, "coherence": 1}, "outside 0 to 4"),
        ({"instruction": "q", "completions": [{"response": "a"}]}, "completions[0].overall_score is missing"),
    ],
)
def test_a_record_that_cannot_be_used(record, why):
    with pytest.raises(Unreadable) as error:
        read(record)
    assert why in str(error.value)
