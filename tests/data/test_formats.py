"""Recognising a format by its columns, and saying so when it cannot be."""

import pytest

from uft.data.formats import FIELDS, FORMATS, check_mapping, from_text, recognise, rename
from uft.data.rows import Kind
from uft.errors import UftError

KNOWN = {
    "prompt prompt_id chosen rejected messages score_chosen score_rejected": "preference",  # binarized UltraFeedback
    "source instruction models completions correct_answers incorrect_answers": "ultrafeedback",
    "prompt response helpfulness correctness coherence complexity verbosity": "helpsteer2",
    "instruction input output text": "alpaca",
    "instruction context response category": "alpaca",  # Dolly
    "prompt prompt_id messages": "messages",  # UltraChat
    "chosen rejected": "preference, prompt inside",  # HH-RLHF
    "question answer": "question and answer",
}


def test_every_format_is_recognised_by_its_own_columns_and_strangers_do_not_matter():
    for form in FORMATS:
        assert recognise(form.required) is form
        assert recognise({*form.columns, "source", "prompt_id"}) is form
    assert {columns: recognise(columns.split()).name for columns in KNOWN} == KNOWN


def test_unknown_columns_name_what_was_found_what_is_near_and_how_to_map():
    with pytest.raises(UftError) as error:
        recognise(["prompt", "chosen", "worse"], source="mine")
    said = str(error.value)
    assert "chosen, prompt, worse" in said
    assert "preference lacks rejected" in said
    assert "data.sources.mine.columns." in said
    with pytest.raises(UftError, match="no known binary format") as error:
        recognise(["prompt", "completion"], kind="binary", source="mine")
    assert "binary lacks label" in str(error.value)
    with pytest.raises(UftError) as error:
        recognise(["frage", "antwort"], source="mine")
    (advice,) = error.value.problems[0].advice
    both = "data.sources.mine.columns.prompt=THEIR_COLUMN data.sources.mine.columns.completion=THEIR_COLUMN"
    assert advice == f"map them:  {both}   or   data.sources.mine.columns.messages=THEIR_COLUMN"
    with pytest.raises(UftError, match="divided by commas here, not by ';'"):
        recognise(["prompt;response"], source="mine")


def test_two_formats_at_once_are_ambiguous_until_a_kind_is_given():
    columns = ["prompt", "completion", "label", "score"]
    with pytest.raises(UftError) as error:
        recognise(columns, source="mine")
    assert "binary" in str(error.value)
    assert "data.sources.mine.kind=binary|scored" in str(error.value)
    assert recognise(columns, kind="scored").name == "scored"
    assert recognise(columns, kind="demonstration").name == "prompt and completion"


def test_columns_the_user_named_decide():
    columns = ["prompt", "chosen", "rejected", "messages", "conversations"]
    with pytest.raises(UftError):
        recognise(columns)
    assert recognise(columns, mapped=["conversations"]).name == "preference, conversations"


def test_mapping_renames_and_takes_the_old_name_away():
    assert rename({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}) == {
        "prompt": "q",
        "completion": "a",
    }
    assert rename({"answer": "a", "q": 1}, {"completion": "answer", "answer": "answer"}) == {
        "q": 1,
        "completion": "a",
        "answer": "a",
    }
    assert rename({"response": "r"}, {}) == {"completion": "r"}
    assert rename({"response": "r", "completion": "c"}, {})["completion"] == "c"
    assert rename({"reply": "r"}, {"response": "reply"}) == {"completion": "r"}


def test_a_mapping_to_no_field_of_ours_is_told_with_the_nearest():
    problems = check_mapping({"promt": "q", "completion": "a"}, "mine")
    assert len(problems) == 1
    assert problems[0].what == "data.sources.mine.columns.promt"
    assert "data.sources.mine.columns.prompt" in problems[0].advice[0]
    assert {"prompt", "response", "answer", "negatives"} <= FIELDS


def test_text_cells_become_numbers_only_where_numbers_are_expected():
    assert from_text({"prompt": "42", "score": "0.5", "label": "True", "completion": ""}) == {
        "prompt": "42",
        "score": 0.5,
        "label": True,
        "completion": None,
    }
    assert from_text({"score": "high"}) == {"score": "high"}


def test_an_answer_beside_a_prompt_is_its_reply_unless_there_is_another():
    asked = {"prompt": "two and two", "answer": "4"}
    for record, kind, replies, answer in (
        (asked, Kind.DEMONSTRATION, ["4"], None),
        ({**asked, "completion": "It is 4."}, Kind.DEMONSTRATION, ["It is 4."], "4"),
        ({**asked, "chosen": "4", "rejected": "5"}, Kind.PREFERENCE, ["4", "5"], "4"),
    ):
        form = recognise(record)
        row = form.read(rename(record, {}), None)
        assert (row.kind, [one.text for one in row.completions], row.answer) == (kind, replies, answer)
