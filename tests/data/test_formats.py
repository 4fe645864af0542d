"""Recognising a format by its columns, and saying so when it cannot be."""

import json
import shlex
from decimal import Decimal

import pytest

from uft.config.compose import compose
from uft.config.schema import data_settings
from uft.data.formats import FIELDS, FORMATS, check_mapping, from_text, recognise, rename
from uft.data.messages import Unreadable
from uft.data.rows import Kind
from uft.data.sources import load_sources
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


ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "w", "arguments": {"a": 1}}


def called(**call):
    return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("record", "reply"),
    [
        ({"messages": json.dumps([{"id": 1, **ASKED}, {"id": 2, **SAID}])}, "a"),
        ({"prompt": json.dumps([{"id": 1, **ASKED}]), "completion": json.dumps({"id": 2, **SAID})}, "a"),
        ({"prompt": "q", "completion": '{"role": "user", "name": "Ann"}'}, '{"role": "user", "name": "Ann"}'),
        ({"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": ["a", "b"]}]}, "ab"),
        (called(function=json.dumps(CALL)), CALL),
        (called(function={"name": "w", "arguments": json.dumps(json.dumps({"a": 1}))}), CALL),
        (called(name="w", arguments=""), {"name": "w", "arguments": {}}),
        (called(name="w"), {"name": "w", "arguments": {}}),
        ({"messages": [ASKED, {"role": "tool_call", "content": json.dumps(CALL)}]}, CALL),
        ({"messages": [ASKED, SAID | {"weight": "0.0"}]}, "context"),
        ({"prompt": "q", "completion": '{"a": 1, "a": 2}'}, '{"a": 1, "a": 2}'),
        ({"prompt": "q", "completion": "\u200b", "label": False}, "\u200b"),
        ({"prompt": "q", "completion": "a", "score": "0.5"}, 0.5),
        ({"prompt": "q", "completion": "a", "score": Decimal("0.25")}, 0.25),
    ],
)
def test_values_in_other_forms_are_what_they_say(record, reply):
    row = recognise(rename(record, {})).read(rename(record, {}))
    (turn,) = row.completions[0].turns
    calls = json.loads(turn.extra)["tool_calls"] if turn.extra else [None]
    found = [row.completions[0].score, calls[0] and calls[0].get("function", calls[0])]
    found += ["context" if turn.learned is False else turn.content]
    assert next(one for one in found if one is not None) == reply
    assert [turn.content for turn in row.prompt] == ["q"]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (
            {"prompt": "q", "completion": "\u200b\ufeff "},
            "a turn of the assistant has nothing but invisible characters",
        ),
        ({"prompt": "\u200b", "completion": "a"}, "a turn of the user has nothing but invisible characters"),
        ({"prompt": "q", "chosen": "\u200b", "rejected": "a"}, "a turn of the assistant has nothing but invisible"),
        (called(name="w", arguments='{"a": 1, "a": 2}'), "messages[1].tool_calls names a field twice: 'a'"),
        (
            {"messages": json.dumps([ASKED, SAID]).replace("{", '{"role": "x", ', 1)},
            "messages names a field twice: 'role'",
        ),
        ({"messages": [ASKED | {"content": None}, SAID]}, "messages[0] (user) content is null (fields: role, content)"),
        ({"prompt": '[{"role": "critic", "content": "q"}, {"role": "user", "content": "q"}]'}, "unknown role 'critic'"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}, "chosen is a list of texts (1), and a row has one"),
        (called(name="w", parameters={"a": 1}), "a call with parameters: they are called arguments"),
        (
            {"chosen": [ASKED | {"content": "q "}, SAID], "rejected": [ASKED, SAID]},
            "chosen and rejected share no prompt: their turns number 1 differ in white space",
        ),
        ({"prompt": "q", "completion": "a", "score": "high"}, "score is text, not a number"),
        ({"prompt": "q", "completion": "a", "score": float("inf")}, "score is inf, outside 0 to 1"),
    ],
)
def test_values_that_say_nothing_are_refused_in_words(record, why):
    with pytest.raises(Unreadable) as error:
        recognise(rename(record, {})).read(rename(record, {}))
    assert why in str(error.value)
    assert not any("score_range" in line for line in error.value.advice), "no range holds it"


PLAIN, CONVERSATION = {"prompt": "q", "completion": "a"}, {"messages": [ASKED, SAID]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        *((PLAIN | {name: "rejected"}, f"columns.label={name}") for name in ("status", "review", "emoji")),
        *(
            (PLAIN | {name: 0}, f"columns.label={name}")
            for name in ("is_valid_answer", "rlhf_label", "answer_ok", "keep")
        ),
        *((PLAIN | {name: 1}, "make a column label of it") for name in ("num_thumbs_down", "unsafe_label", "discard")),
        (PLAIN | {"annotations": [{"label": "bad"}]}, "annotations.label (1 row) may say how good"),
        (PLAIN | {"meta": '{"rating": 1}'}, "meta.rating (1 row) may say how good"),
        ({"messages": json.dumps([ASKED, SAID | {"rating": 1}])}, "messages.rating (1 row) may say how good"),
        ({"messages": [ASKED, SAID | {"is_trainable": False}]}, "call it weight in the messages"),
        ({"messages": [ASKED, SAID | {"skip_loss": True}]}, "messages.skip_loss (1 row) may say how much is learned"),
        (
            {"messages": [ASKED, SAID | {"content": [{"type": "text", "text": "a", "weight": 0}]}]},
            "messages.content.weight (1 row) may say how much is learned",
        ),
        (PLAIN | {"train_on_input": True}, "learned of the reply\n      leave it unread:  data.sources.mine.kind="),
        (PLAIN | {"Complex_CoT": "hm"}, "columns.reasoning_content=Complex_CoT"),
        (PLAIN | {"thought_process": "hm"}, "columns.reasoning_content=thought_process"),
        (PLAIN | {"options": ["x", "y"]}, "options (1 row) holds text that the conversation lacks"),
        (CONVERSATION | {"response": "b"}, "follows the conversation:  data.sources.mine.columns.prompt=messages"),
        ({"messages": [ASKED], "output": "b"}, "leave it unread:  data.sources.mine.columns.output=''"),
        ({"prompt": "q", "response_a": "yes", "response_b": "no"}, "columns.rejected=response_b"),
        (PAIR | {"margin": -1.5}, "margin (1 row) may say that the rejected side is the better one"),
        (PAIR | {"chosen-avg-rating": 2.0, "rejected-avg-rating": 4.0}, "chosen-avg-rating (1 row) may say that the"),
        (PAIR | {"score_difference": -1}, "score_difference (1 row) may say that the rejected side"),
        (PLAIN | {"rating_1_to_5": "1"}, "columns.score=rating_1_to_5"),
        (PLAIN | {"tests_passed": 0}, "tests_passed (1 row) may say how good"),
        (PLAIN | {"is_refusal": True}, "is_refusal (1 row) may say how good"),
        (PLAIN | {"llm_judge": "❌"}, "columns.label=llm_judge"),
        (PLAIN | {"user.rating": 1}, "columns.score=user.rating"),
        (PLAIN | {"corrected_response": "b"}, "columns.chosen=corrected_response data.sources.mine.columns.rejected="),
        (PLAIN | {"hard_negatives": ["b"]}, "read a list of them:  data.sources.mine.columns.negatives=hard_negatives"),
        (
            {"messages": [ASKED, SAID | {"content": [{"type": "text", "text": "a", "train": False}]}]},
            "messages.content.train (1 row) may say how much is learned",
        ),
        (PLAIN | {"context_messages": [ASKED, SAID]}, "columns.history=context_messages"),
        (CONVERSATION | {"history": [["q", "a"]]}, "history holds the turns that the conversation begins with"),
        (CONVERSATION | {"history": [["q", "a"]]}, "leave it unread:  data.sources.mine.columns.history=''"),
        (PLAIN | {"train_on_turns": [1]}, "train_on_turns (1 row) may say how much is learned"),
        (CONVERSATION | {"model_response": "b"}, "leave it unread:  data.sources.mine.kind=demonstration"),
        (PAIR | {"chosen_rank": 2, "rejected_rank": 1}, "chosen_rank (1 row) may say that the rejected side"),
    ],
)
def test_names_and_values_that_change_a_row_s_meaning_are_refused(tmp_path, record, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UftError) as error:
        load_sources(data_settings({"sources": {"mine": {"path": str(path)}}, "holdout": 0}))
    assert words in str(error.value)


def test_bookkeeping_beside_rows_is_told_only(tmp_path):
    kept = {
        "reasoning_effort": "high",
        "reasoning_tokens": 7,
        "margin": 0.3,
        "loss": 2.5,
        "train_id": 1,
        "table_id": "x",
    }
    kept |= {"quality_class": 1, "rating_id": 7, "best_of_n": 4, "edited_at": "today", "in_gsm8k_train": False}
    kept |= {"correct_option": 2, "grade_level": 3, "repo_stars": 120, "page_rank": 0.2, "score_threshold": 0.5}
    kept |= {"topic_label": 1, "response": "a", "type": "code", "correct_answer": "42", "options": ["q"]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CONVERSATION | kept) + "\n")
    (source,) = load_sources(data_settings({"sources": {"mine": {"path": str(path)}}, "holdout": 0}))
    assert sorted(source.omitted.unread) == sorted({*kept, "completion"} - {"response"})


@pytest.mark.parametrize(
    "name", ["user rating", "user's rating", 'a "rating"', "$rating", "rating\\", "rating [1-5]", "rating:1"]
)
def test_advice_about_a_column_of_any_name_can_be_typed(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "q", "completion": str(score), name: score}) + "\n" for score in (0, 1))
    )
    with pytest.raises(UftError) as error:
        load_sources(data_settings({"sources": {"mine": {"path": str(path)}}, "holdout": 0}))
    (line,) = (line for line in str(error.value).splitlines() if "read it as good or bad:" in line)
    words = shlex.split(line.partition(":  ")[2])
    settings = compose(
        ["objective=kto", "data=files", f"+data.sources.mine.path={path}", "data.holdout=0", f"+{words[0]}"]
    )
    assert len(words) == 1
    assert load_sources(data_settings(settings["data"]))[0].kinds == {Kind.BINARY: 2}


def test_a_file_of_a_folder_that_is_refused_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(CONVERSATION | {"response": "b"}) + "\n")
    with pytest.raises(UftError, match="these lines are for all files of the folder") as error:
        load_sources(data_settings({"sources": {"mine": {"path": str(tmp_path)}}, "holdout": 0}))
    assert f"({tmp_path / 'b.jsonl'})" in str(error.value)
