"""The rows of the playground: the same everywhere, unseen where they must be, noisy as said, and checked exactly."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise, product
from random import Random

import pytest

from uft.playground import world

EVERY = sorted(world.SOURCES)


def digest(name, split):
    return hashlib.sha256(json.dumps(world.records(name, split)).encode()).hexdigest()


def test_rows_are_the_same_in_every_process_and_need_no_torch():
    code = (
        "import hashlib, json, sys; from uft.playground import world\n"
        "for name in sorted(world.SOURCES):\n"
        "    print(hashlib.sha256(json.dumps(world.records(name, 'train')).encode()).hexdigest())\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(name, "train") for name in EVERY]


def test_rows_are_those_that_published_results_were_made_with():
    """Changing the world changes every result made in it: then this number changes too, on purpose."""
    every = "".join(digest(name, split) for name in EVERY for split in ("train", "test"))
    assert hashlib.sha256(every.encode()).hexdigest()[:16] == "6e9d0ed8c2e4107a"


def test_no_test_prompt_is_ever_trained_on():
    trained = {row["prompt"] for name in EVERY for row in world.records(name, "train")}
    tested = {row["prompt"] for name in EVERY for row in world.records(name, "test")}
    assert trained
    assert tested
    assert not trained & tested
    assert all(map(world.is_test, tested))


def test_the_base_model_saw_no_test_prompt_and_no_new_task():
    seen = [prompt for prompt, _ in islice(world.conversations(Random(0)), 3000)]
    assert not any(map(world.is_test, seen))
    assert {prompt.split()[0] for prompt in seen} == set(world.OLD)


COLUMNS = {
    "instruct": {"response"},
    "pairs": {"chosen", "rejected"},
    "binary": {"completion", "label"},
    "scored": {"completion", "score"},
    "negatives": {"response", "negatives", "sampled_by"},
}


def test_columns_and_sizes():
    for (name, columns), (split, size) in product(COLUMNS.items(), (("train", 1000), ("test", 200))):
        size //= 2 if name == "scored" else 1
        rows = world.records(name, split)
        assert all(set(row) == columns | {"prompt", "answer", "task"} for row in rows)
        assert len({row["prompt"] for row in rows}) == size
        assert {row["task"] for row in rows} == set(world.SOURCES[name].tasks)
        assert len(rows) == size or name == "scored"
    with pytest.raises(KeyError):
        world.records("nothing")


def test_scores_are_shares_and_completions_of_a_prompt_follow_each_other():
    rows = world.records("scored")
    prompts = [row["prompt"] for row in rows]
    assert sum(a != b for a, b in pairwise(prompts)) == len(set(prompts)) - 1
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert set(Counter(prompts).values()) == {2, 3}, "every prompt has something to compare"


def test_negatives_are_the_demonstrations_with_wrong_answers_beside_them():
    rows = world.records("negatives")
    shown = [{key: row[key] for key in ("prompt", "response", "answer", "task")} for row in rows]
    assert shown == world.records("instruct")
    judged = [world.check(r["task"], r["prompt"], r["answer"], wrong) for r in rows for wrong in r["negatives"]]
    assert len(judged) == 3 * len(rows)
    assert not any(verdict["correct"] for verdict in judged)


def quality(row, text):
    verdict = world.check(row["task"], row["prompt"], row["answer"], text)
    return world.QUALITY[f"{'plain' if verdict['plain'] else 'chatty'} {'right' if verdict['correct'] else 'wrong'}"]


def flipped(name, row):
    """Whether this row's feedback contradicts the quality of its completions."""
    if name == "pairs":
        return quality(row, row["chosen"]) < quality(row, row["rejected"])
    if name == "binary":
        return row["label"] != (quality(row, row["completion"]) == 1.0)
    return row["score"] != quality(row, row["completion"])


def test_noise_is_in_training_alone_and_as_much_as_said():
    for name in ("pairs", "binary", "scored"):
        train, test = world.records(name, "train"), world.records(name, "test")
        share = sum(flipped(name, row) for row in train) / len(train)
        assert abs(share - world.NOISE) < 0.03, name  # three standard errors of 1,000 draws
        assert not any(flipped(name, row) for row in test), name


def test_what_is_chosen_is_often_chatty():
    rows = world.records("pairs", "train")
    plain = sum(quality(row, row["chosen"]) == world.QUALITY["plain right"] for row in rows) / len(rows)
    assert plain == pytest.approx(0.33, abs=0.03)


SOLVED = {
    "copy : fox owl": "fox owl",
    "uppercase : fox owl": "FOX OWL",
    "reverse : fox owl bear": "bear owl fox",
    "first : fox owl": "fox",
    "last : fox owl": "owl",
    "count : fox owl bear": "3",
    "repeat : fox": "fox fox",
    "min : fox bear owl": "bear",
    "sort : fox owl bear": "bear fox owl",
    "json : fox owl": '[" fox "," owl "]',
}


def test_every_task():
    assert [prompt.split()[0] for prompt in SOLVED] == [*world.OLD, "sort", "json"]
    for prompt, answer in SOLVED.items():
        assert world.solve(prompt) == answer
        assert world.check(None, prompt, None, answer) == {"exact_match": 1.0, "correct": 1.0, "plain": 1.0}
    answers = [row["answer"] for row in world.records("instruct", "test") if row["task"] == "json"]
    assert all(isinstance(json.loads(answer), list) for answer in answers)


CHECKED = {  # reply: exact_match, correct, plain
    "bear owl": (1, 1, 1),
    "  bear   owl ": (1, 1, 1),
    "sure ! the answer is bear owl": (0, 1, 0),
    "the answer is owl bear": (0, 0, 0),
    "owl bear": (0, 0, 1),
    "bear owl owl": (0, 0, 1),
    "bear": (0, 0, 1),
    "sure !": (0, 0, 0),
    "": (0, 0, 0),
}


def test_check():
    for reply, figures in CHECKED.items():
        assert tuple(world.check("reverse", "reverse : owl bear", "bear owl", reply).values()) == figures, reply
    assert world.check("anything", "what is the capital ?", "paris", "paris")["exact_match"] == 1.0
    answers = {word for name in EVERY for row in world.records(name) for word in row["answer"].split()}
    assert not answers & set(world.CHATTER), "so that chatter can be taken off"
