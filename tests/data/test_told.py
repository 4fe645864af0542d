"""Nothing that a row says is dropped without being counted and told: feedback, columns, turns, files."""

import json
from types import SimpleNamespace

import pytest

from uft.config.schema import data_settings
from uft.data.chat import Renderer
from uft.data.formats import recognise, rename
from uft.data.messages import Unreadable
from uft.data.mixture import Mixture
from uft.data.report import CONTRADICTED, data_cautions, data_omissions, data_report
from uft.data.rows import Kind
from uft.data.sources import load_sources
from uft.data.tokens import tokenize_all
from uft.errors import UftError, typed

SAID = (("user", "7*6?"), ("assistant", "42"), ("assistant", "13"))
USER, REPLY, WORSE = ({"role": role, "content": content} for role, content in SAID)
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "w", "arguments": {}}}]}
SYSTEM = {"role": "system", "content": "Count well."}
EARLIER = [{"role": "user", "content": "7*5?"}, {"role": "assistant", "content": "35"}]
DIALOGUES = {
    "prompt and completion": {"prompt": "7*6?", "completion": "42"},
    "prompt and response": {"prompt": "7*6?", "response": "42"},
    "alpaca": {"instruction": "7*6?", "input": "", "output": "42"},
    "messages": {"messages": [USER, REPLY]},
    "sharegpt": {"conversations": [{"from": "human", "value": "7*6?"}, {"from": "gpt", "value": "42"}]},
    "question and answer": {"question": "7*6?", "answer": "42"},
    "question and response": {"question": "7*6?", "response": "42"},
}


def read(record):
    fields = rename(record, {})
    return recognise(fields).read(fields)


def turns(row):
    return [(turn.role, turn.content) for turn in row.prompt]


def load(tmp_path, records, **source):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_sources(data_settings({"sources": {"mine": {"path": str(path), **source}}}))[0]


def refused(tmp_path, records, **source):
    with pytest.raises(UftError) as error:
        load(tmp_path, records, **source)
    return str(error.value)


# --- feedback


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_feedback_is_read_beside_every_way_of_writing_a_dialogue(dialogue):
    record = DIALOGUES[dialogue]
    assert read(record).kind is Kind.DEMONSTRATION
    for name, value, label in (("label", False, False), ("kto_tag", True, True), ("label", "Bad", False)):
        row = read(record | {name: value})
        assert (turns(row), row.completions[0].text, row.completions[0].label) == ([("user", "7*6?")], "42", label)
    assert [read(record | {"score": score}).completions[0].score for score in (0, 0.25)] == [0.0, 0.25]
    sampled = read(record | {"negatives": ["13"], "sampled_by": "m"})
    assert [c.sampled_by for c in sampled.completions] == [None, "m"]


def test_grades_under_other_names_are_refused_with_the_lines_that_read_them(tmp_path):
    names = "rating,reward, Label,upvotes,is_correct,isCorrect,userRating,gpt4_score,thumbs-up,is_helpful,kto_label,"
    names += "passed,stars,is_chosen,preferred,verdict,human_label,is_response_safe,accept,win,value,advantage"
    for name in names.split(","):
        records = [record | {name: 1} for record in list(DIALOGUES.values())[:1]]
        said = refused(tmp_path, records)
        assert f"{name} (1 row) may say how good a completion is" in said
        assert typed("data.sources.mine.columns.score", name) in said
        assert typed("data.sources.mine.columns.label", name) in said
        source = load(tmp_path, records, kind="demonstration")
        assert (source.kinds, source.omitted.unread) == ({Kind.DEMONSTRATION: 1}, {name: 1})
        assert load(tmp_path, records, columns={"score": name}).rows[0].completions[0].score == 1.0
    for name in ("rejected", "toxic", "is_rejected", "harmful", "model_rank", "downvoted"):  # true of a bad one
        said = refused(tmp_path, [PLAIN | {name: True}])
        assert f"{name} (1 row) may say how good a completion is" in said
        assert "make a column label of it, which is true where the completion is good" in said
    told = dict.fromkeys(("verdict", "evaluation", "outcome", "target", "result"), "It was read by two people.")
    assert load(tmp_path, [PLAIN | told]).omitted.unread == dict.fromkeys(told, 1)


def test_a_grade_of_few_rows_is_not_dropped_for_the_others(tmp_path):
    records = [{"prompt": f"q{n}", "completion": "a"} for n in range(9)]
    assert "label (1 row)" in refused(tmp_path, [*records, records[0] | {"label": False}])
    assert load(tmp_path, [record | {"label": None} for record in records]).kinds == {Kind.DEMONSTRATION: 9}


def test_grades_within_messages_are_refused_too(tmp_path):
    records = [{"messages": [USER, REPLY | {"rating": 1}]}]
    said = refused(tmp_path, records)
    assert "messages.rating (1 row) may say how good a completion is" in said
    assert "columns.score" not in said
    assert load(tmp_path, records, kind="demonstration").omitted.unread == {"messages.rating": 1}


def test_columns_whose_names_only_hold_such_a_word_are_no_grades(tmp_path):
    record = {"prompt": "q", "completion": "a", "score_function": "x", "topicLabel": "y", "correct_answers": "z"}
    assert load(tmp_path, [record]).kinds == {Kind.DEMONSTRATION: 1}


def test_two_kinds_of_feedback_need_a_word(tmp_path):
    both = [{"messages": [USER, REPLY], "label": False, "score": 0.1}]
    assert "data.sources.mine.kind=binary|scored" in refused(tmp_path, both)
    assert load(tmp_path, both, kind="binary").omitted.unread == {"score": 1}


def test_names_of_classes_are_read_not_their_numbers(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features(prompt=datasets.Value("string"), completion=datasets.Value("string"), label=names)
    rows = datasets.Dataset.from_dict({"prompt": ["p", "q"], "completion": ["a", "b"], "label": [0, 1]}, features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    for path in ("saved", "rows.parquet"):
        (source,) = load_sources(data_settings({"sources": {"mine": {"path": str(tmp_path / path)}}}))
        assert [row.completions[0].label for row in source.rows] == [True, False]


def test_bookkeeping_of_common_data_sets_is_told_only(tmp_path):
    names = "language_score,lid_score,prompt_rating,question_score,url,created_at,idx,source,int_id,quality_class"
    kept = names.split(",")
    nested = {"metadata": {"language_score": 0.9, "url": "x", "stats": {"tokens": 3}}}
    source = load(tmp_path, [{"prompt": "q", "completion": "a", **dict.fromkeys(kept, 1), **nested}])
    assert source.omitted.unread == dict.fromkeys([*kept, "metadata"], 1)


def test_grades_within_objects_are_refused(tmp_path):
    for meta, name in (
        ({"rating": 1}, "metadata.rating"),
        ({"human": {"is_good": False}}, "metadata.human.is_good"),
        ({"passed": False}, "metadata.passed"),
        ({"verdict": "bad"}, "metadata.verdict"),
    ):
        records = [DIALOGUES["messages"] | {"metadata": meta}]
        assert f"{name} (1 row) may say how good a completion is" in refused(tmp_path, records)
        assert load(tmp_path, records, kind="demonstration").omitted.unread == {"metadata": 1, name: 1}


def test_the_other_side_of_a_pair_is_no_bookkeeping(tmp_path):
    for name, ours in (("completion", "prompt"), ("response", "prompt"), ("output", "instruction")):
        records = [{ours: "7*6?", name: "42", "rejected": "13"}]
        assert f"read both as a pair:  data.sources.mine.columns.chosen={name}" in refused(tmp_path, records)
        pair = load(tmp_path, records, columns={"chosen": name}).rows[0]
        assert [(c.text, c.preferred) for c in pair.completions] == [("42", True), ("13", False)]
    said = refused(tmp_path, [DIALOGUES["messages"] | {"rejected": "13"}])
    assert "read both as a pair:  data.sources.mine.columns.chosen=messages" in said
    pair = load(tmp_path, [DIALOGUES["messages"] | {"rejected": "13"}], columns={"chosen": "messages"}).rows[0]
    assert (turns(pair), [c.text for c in pair.completions]) == ([("user", "7*6?")], ["42", "13"])


def test_a_word_about_which_side_is_better_is_not_dropped(tmp_path):
    for name in (
        "label",
        "preference",
        "winner",
        "kto_tag",
        "preferred_side",
        "better_response_id",
        "is_tie",
        "flipped",
    ):
        records = [{"prompt": "7*6?", "chosen": "42", "rejected": "13", name: 1}]
        assert "may say which side is better" in refused(tmp_path, records)
        assert load(tmp_path, records, kind="preference").kinds == {Kind.PREFERENCE: 1}
    graded = {"prompt": "7*6?", "chosen": "42", "rejected": "13", "margin_score": 1, "chosen-rating": 5}
    assert load(tmp_path, [graded]).omitted.unread == {"margin_score": 1, "chosen-rating": 1}


def test_text_that_the_prompt_lacks_is_read_or_refused(tmp_path):
    for record, lines in (
        ({"prompt": "Who?", "response": "a"}, {"instruction": "prompt"}),
        ({"question": "Who?", "answer": "a"}, {"instruction": "question", "completion": "answer"}),
        ({"question": "Who?", "chosen": "a", "rejected": "b"}, {"instruction": "question"}),
    ):
        records = [record | {"context": "Ann ate it."}, record]
        said = refused(tmp_path, records)
        assert "context (1 row) holds text that the prompt lacks" in said
        assert " ".join(f"data.sources.mine.columns.{ours}={theirs}" for ours, theirs in lines.items()) in said
        assert turns(load(tmp_path, records, columns=lines).rows[0]) == [("user", "Who?\n\nAnn ate it.")]
        assert turns(load(tmp_path, records, columns={"context": ""}).rows[0]) == [("user", "Who?")]
    for name in ("passage", "documents", "background_knowledge"):
        for text in ("Ann ate it.", ["Ann ate it."], [{"title": "Ann", "text": "Ann ate it."}]):
            said = refused(tmp_path, [PLAIN | {name: text}])
            assert f"{name} (1 row) holds text that the conversation lacks" in said
            assert f"data.sources.mine.columns.instruction=prompt data.sources.mine.columns.context={name}" in said
        assert load(tmp_path, [PLAIN | {name: text}], kind="demonstration").omitted.unread == {name: 1}
        assert load(tmp_path, [PLAIN | {name: "7*6"}]).omitted.unread == {name: 1}
    lines = {"instruction": "prompt", "context": "passage"}
    read_with = load(tmp_path, [PLAIN | {"passage": "Ann ate it."}], columns=lines)
    assert turns(read_with.rows[0]) == [("user", "7*6?\n\nAnn ate it.")]
    within = {"messages": [USER | {"content": "Ann ate it. Who?"}, REPLY], "input": " Ann ate it.\n", "context": []}
    assert load(tmp_path, [within]).omitted.unread == {"input": 1}


def test_prompts_alone_are_read_and_what_else_they_ask_is_told(tmp_path):
    for record in ({"prompt": "7*6?"}, {"instruction": "7*6?"}, {"messages": [USER]}, {"conversations": [USER]}):
        (row,) = load(tmp_path, [record]).rows
        assert (row.kind, turns(row)) == (Kind.PROMPT, [("user", "7*6?")]), record
        assert "question" in refused(tmp_path, [record | {"question": "7*8?"}])


def test_a_row_of_weight_0_is_not_learned(tmp_path):
    for name, on, off in (("weight", 1.0, 0), ("train", True, False), ("training", 1, 0), ("loss_mask", 1, 0)):
        records = [record | {name: on} for record in DIALOGUES.values() if "prompt" in record]
        assert load(tmp_path, records).omitted.unread == {}
        said = refused(tmp_path, [*records, records[0] | {name: off}])
        assert f"rows.jsonl:3  {name} is {off}: this row is not to be learned" in said
        assert f"leave it unread:  data.sources.mine.columns.{name}=''" in said
        assert load(tmp_path, [*records, records[0] | {name: off}], columns={name: ""}).kinds[Kind.DEMONSTRATION] == 3
    for mark in (0.5, [0, 1], "no"):
        assert "rows are learned whole or not at all" in refused(tmp_path, [records[0] | {"weight": mark}])


def test_labels_of_minus_one_are_bad_unless_zero_is_one_too(tmp_path):
    records = [{"prompt": "7*6?", "completion": f"{n}", "label": n} for n in (1, -1)]
    assert [row.completions[0].label for row in load(tmp_path, records).rows] == [True, False]
    records.append(records[0] | {"label": 0})
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\nq,a,-1\nq,b,0\n")
    with pytest.raises(UftError, match="label is -1 in some rows and 0 in others"):
        load_sources(data_settings({"sources": {"mine": {"path": str(table)}}}))
    line = {"columns": {"score": "label"}, "score_range": [-1, 1]}
    assert "data.sources.mine.columns.score=label data.sources.mine.score_range=[-1,1]" in refused(tmp_path, records)
    assert [c.score for c in load(tmp_path, records, **line).rows[0].completions] == [1.0, 0.0, 0.5]


def test_generations_with_ratings_are_scored_and_those_behind_a_pair_are_told(tmp_path):
    rated = {"instruction": "7*6?", "generations": ["42", "13"], "ratings": [5, 2], "generation_models": ["m", "n"]}
    source = load(tmp_path, [rated])
    assert [(c.text, c.score) for c in source.rows[0].completions] == [("42", 1.0), ("13", 0.25)]
    said = refused(tmp_path, [rated | {"ratings": [9, 2]}])
    assert "on another scale:  data.sources.mine.score_range=[LOWEST,HIGHEST]" in said
    assert "data.bad_rows=drop" not in said, "it would leave no row"
    pair = load(tmp_path, [rated | {"chosen": "42", "rejected": "13"}])
    assert (pair.kinds, sorted(pair.omitted.unread)) == (
        {Kind.PREFERENCE: 1},
        ["generation_models", "generations", "ratings"],
    )


CALL = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}
PLAIN, PAIR = {"prompt": "7*6?", "completion": "42"}, {"prompt": "7*6?", "chosen": "42", "rejected": "13"}
RATED, LABELLED = {"generations": ["42", "13"], "ratings": [5, 1]}, PLAIN | {"label": 1}
READ = [  # records of a file, and the numbers, marks or roles that are read of them
    (
        [
            PLAIN | {"label": label}
            for label in ("-1", " +1", "1.0", "Yes", "no", "👍", "thumbs up", "Thumbs-Down", "neg")
        ],
        [False, True, True, True, False, True, True, False, False],
    ),
    ([RATED | {"prompt": "7*6?"}], [1.0]),
    ([{"instruction": "7*6?", "generations": '["42", "13"]', "ratings": "[5, 1]"}], [1.0]),
    ([{"instruction": "7*6?", "generation": "42"}], [None]),
    ([PLAIN, {"prompt": "7*6?", "completion": None, "response": "42"}], [None, None]),
    (
        [
            {"messages": [USER, REPLY | {name: mark}]}
            for name, mark in (("loss", False), ("train", "false"), ("weight", "1"))
        ],
        ["learned False", "learned False", "learned True"],
    ),
    ([{"messages": [{"role": " User", "content": "7*6?"}, {"role": "ASSISTANT", "content": "42"}]}], [None]),
    ([PLAIN | {"reasoning_content": "six sevens", "train": "true"}], ["thought six sevens"]),
    ([PLAIN | {"image": {"bytes": None, "path": None}}], [None]),
    (
        [{"messages": [USER | {"tool_calls": [], "function_call": None}, REPLY | {"tool_calls": None}], "tools": "[]"}],
        [None],
    ),
    ([PLAIN | {"score": n / 4, "answer": str(n)} for n in (1, 2)], [0.25, 0.5]),
    ([PAIR | {"score_chosen": "9", "score_rejected": "1"}], [9.0]),
    ([PAIR | {"reward_chosen": 9, "rejected_reward": 1}], [9.0]),
    (
        [
            {
                "conversations": [
                    {"from": "human", "value": "7*6?"},
                    {"from": "function_call", "value": json.dumps(CALL["function"])},
                    {"from": "observation", "value": "42"},
                    {"from": "gpt", "value": "42"},
                ],
                "tools": [json.dumps(CALL)],
            }
        ],
        [CALL],
    ),
]
REFUSED = [  # a record, and what is said of it
    ({"messages": [USER | {"tool_calls": [CALL]}, REPLY]}, "messages[0] (user) has tool_calls"),
    ({"messages": [USER | {"function_call": CALL["function"]}, REPLY]}, "messages[0] (user) has function_call"),
    (PLAIN | {"sample_weight": 0.5}, "read it:  data.sources.mine.columns.weight=sample_weight"),
    (
        {"messages": [USER, REPLY | {"train_detail": [{"train": False}]}]},
        "messages.train_detail (1 row) may say how much",
    ),
    (PLAIN | {"loss_mask": [0, 1]}, "loss_mask is [0, 1]: not 0 or 1"),
    (PLAIN | {"thinking": "hm"}, "read it:  data.sources.mine.columns.reasoning_content=thinking"),
    (PLAIN | {"tool_calls": [CALL]}, "tool_calls (1 row) may be a part of the reply"),
    (PAIR | {"reasoning_content": "hm"}, "reasoning_content is of one reply"),
    (
        {"messages": [USER, REPLY], "rejected_messages": [USER, WORSE]},
        "columns.chosen=messages data.sources.mine.columns.rejected=rejected_messages",
    ),
    ({"messages": [USER, REPLY], "prompt": "another"}, "prompt (1 row) holds text that the conversation lacks"),
    (
        {"question": "7*6?", "answer": "42", "instruction": "Count."},
        "leave it unread:  data.sources.mine.columns.instruction=''",
    ),
    (LABELLED | {"kto_tag": 0}, "kto_tag (1 row) says something else than label"),
    (PLAIN | {"response": "13"}, "read it:  data.sources.mine.columns.completion=response"),
    (PLAIN | {"system": "a", "system_prompt": "b"}, "system_prompt (1 row) says something else than system"),
    (PLAIN | {"label": 3}, "data.sources.mine.columns.score=label data.sources.mine.score_range=[LOWEST,HIGHEST]"),
    (RATED | {"prompt": "7*6?", "ratings": [5]}, "ratings is not a list of 2 numbers"),
    (RATED | {"prompt": "7*6?", "ratings": [5, None]}, "ratings[1] is missing"),
    (
        {"prompt": "7*6?", "response": "42", "helpfulness": None, "correctness": 4, "coherence": 4},
        "correctness (1 row) may say",
    ),
    ({"problem": "7*6?", "solution": "42"}, "columns.completion=solution data.sources.mine.columns.prompt=problem"),
    (PLAIN | {"instruction": "7*6?"}, "alpaca:  data.sources.mine.columns.prompt=''"),
    ({"messages": [{"speaker": "user", "text": "7*6?"}]}, "messages[0] has no role"),
    ({"messages": [{"role": "user", "text": "7*6?"}]}, "has neither content nor value (fields: role, text)"),
    ({"messages": [USER, REPLY], "tools": CALL}, "tools is an object, not a list of objects"),
    (
        {"messages": [SYSTEM | {"tools": [CALL]}, USER, REPLY], "tools": [{"name": "v"}]},
        "tools differs from the tools of a message",
    ),
    ({"messages": [USER, REPLY | {"tool_calls": [{"id": "1"}]}]}, "tool_calls has a call without a name"),
    (PLAIN | {"available_tools": [CALL]}, "read it:  data.sources.mine.columns.tools=available_tools"),
    (PLAIN | {"persona": "A pirate."}, "read it:  data.sources.mine.columns.system=persona"),
    (PLAIN | {"previous_turns": [USER, REPLY]}, "read it:  data.sources.mine.columns.history=previous_turns"),
    (PLAIN | {"thought": "hm"}, "read it:  data.sources.mine.columns.reasoning_content=thought"),
    (PLAIN | {"chain_of_thought": "hm"}, "data.sources.mine.columns.reasoning_content=chain_of_thought"),
    (PAIR | {"chosen_reasoning": "hm", "rejected_reasoning": "so"}, "chosen_reasoning (1 row), rejected_reasoning (1"),
    (
        {"messages": [USER, REPLY | {"reasoning_details": [{"text": "hm"}]}]},
        "messages.reasoning_details (1 row) may be",
    ),
    (PLAIN | {"image_path": "a.png"}, "image_path (1 row) may be a part of the conversation"),
    ({"messages": [USER | {"image_url": "a.png"}, REPLY]}, "messages.image_url (1 row) may be a part"),
    ({"messages": [USER, REPLY | {"channel": "analysis"}]}, "messages.channel (1 row) may be a part"),
    (PLAIN | {"bad_response": "13"}, "data.sources.mine.columns.rejected=bad_response"),
    (PLAIN | {"negative": "13"}, "data.sources.mine.columns.rejected=negative"),
    (PLAIN | {"better_answers": ["13"]}, "data.sources.mine.columns.rejected=completion"),
    (PLAIN | {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs (1 row) may be a part"),
    (PLAIN | {"do_not_train": True}, "do_not_train (1 row) may say how much is learned of the reply"),
    (PLAIN | {"is_train": False}, "read it:  data.sources.mine.columns.weight=is_train"),
    ({"messages": [USER, REPLY | {"trainable": False}]}, "messages.trainable (1 row) may say how much is learned"),
    ({"messages": [USER, REPLY | {"ignored": True}]}, "messages.ignored (1 row) may say how much is learned"),
    (
        {"prompt": "7*6?", "response_a": "42", "response_b": "13", "winner": "b"},
        "read them:  data.sources.mine.columns.chosen=response_a data.sources.mine.columns.rejected=response_b",
    ),
    ({"prompt": "7*6?", "responses": ["42", "13"], "scores": [1, 0]}, "responses (1 row) may hold replies"),
]


def test_variants_are_read_as_what_they_say(tmp_path):
    for records, expected in READ:
        found = []
        for row in load(tmp_path, records).rows:
            first = row.completions[0]
            extra, mark = json.loads(first.turns[0].extra or "{}"), first.turns[0].learned
            thought = extra.get("reasoning_content")
            values = [first.label, first.score, first.annotations.get("score"), extra.get("tool_calls", [None])[0]]
            values += [thought and f"thought {thought}", mark if mark is None else f"learned {mark}"]
            found.append(next((value for value in values if value is not None), None))
            assert (turns(row), first.text) == ([("user", "7*6?")], "42")
        assert found == expected, records


def test_variants_that_say_more_than_is_read_are_refused_with_the_line_to_type(tmp_path):
    for record, words in REFUSED:
        assert words in refused(tmp_path, [record]), record


def test_what_a_pair_says_besides_its_sides_is_told(tmp_path):
    whole = PAIR | {"chosen": [USER, REPLY], "rejected": [USER, WORSE]}
    assert load(tmp_path, [whole | {"messages": [USER, REPLY]}]).omitted.unread == {}
    odd = whole | {"messages": [USER, WORSE], "score_chosen": "best"}
    assert load(tmp_path, [odd]).omitted.unread == {"messages": 1, "score_chosen": 1}


def test_prompts_that_were_rendered_before_are_told(tmp_path):
    headers = "<|im_start|>assistant\n,<|start_header_id|>assistant<|end_header_id|>\n,[/INST],<start_of_turn>model\n"
    ends = [*headers.split(","), " ASSISTANT:", "<｜Assistant｜>", "<|assistant|>\n", "\n### Response:\n"]
    records = [PLAIN | {"prompt": f"7*6?{end}"} for end in ends]
    assert load(tmp_path, records).omitted.oddities["rendered_prompts"] == len(records)
    assert load(tmp_path, [PLAIN, PLAIN | {"prompt": "Who is an assistant: you?"}]).omitted.oddities == {}
    marked = [
        PLAIN | {"completion": f"42{mark}"}
        for mark in ("<|im_end|>", "<｜end▁of▁sentence｜>", "[TOOL_CALLS]", "<image>")
    ]
    assert load(tmp_path, marked).omitted.oddities == {"template_marks": 4}


def test_advice_about_a_row_names_its_source(tmp_path):
    said = refused(tmp_path, [{"prompt": "q", "completion": "a", "label": "sports"}])
    assert "leave it unread:  data.sources.mine.kind=demonstration" in said


# --- columns, files, pairs and labels, in the report


def test_columns_that_are_not_read_are_counted_also_from_the_cache(tmp_path, monkeypatch):
    from uft.data import sources

    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "CACHED_BYTES", 0)
    shown = {"row": "x:1", "prompt": "q", "completion": "a"}
    records = [shown | {"id": n, "note": "" if n else "x"} for n in range(3)]
    for _ in range(2):
        assert load(tmp_path, records).omitted.unread == {"id": 3, "note": 1}
    named = {"messages": [USER | {"name": "Ann", "mood": ""}, REPLY, USER | {"name": "Ben"}, REPLY]}
    assert load(tmp_path, [named]).omitted.unread == {"messages.name": 1}
    marked = {"messages": [USER | {"train": 1}, REPLY | {"train": 1}, USER | {"train": 0}, REPLY | {"train": 0}]}
    assert load(tmp_path, [marked]).omitted.unread == {"messages.train": 1}  # of the user's turn that is not learned
    rated = {"response": "42", "overall_score": 7, "principle": "truth", "critique": None}
    assert load(tmp_path, [{"instruction": "7*6?", "completions": [rated]}]).omitted.unread == {
        "completions.principle": 1
    }
    negatives = [{"prompt": "q", "response": "a", "negatives": ["b"]}]
    assert load(tmp_path, negatives, kind="demonstration").omitted.unread == {"negatives": 1}


def test_all_of_it_stands_in_the_report(tmp_path, tokenizer):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    pair = {"prompt": "q", "chosen": "a", "rejected": "a", "\x1b[1mnote\ud800": "x"}
    note = "\\x1b[1mnote\\ud800"
    for name, rows in {"train-0": [pair, pair | {"rejected": "b"}], "test": [pair], "other": [pair]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "test.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "twin" / "notes.txt").write_text("not rows")
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(DIALOGUES["messages"] | {"label": n > 0}) + "\n" for n in range(12)))

    def report(**paths):
        loaded = load_sources(data_settings({"sources": {name: {"path": str(path)} for name, path in paths.items()}}))
        tokenized = tokenize_all({s.name: s.rows for s in loaded}, Renderer(tokenizer), 100, "error", None)
        sizes = [len(source.rows) for source in loaded]
        return data_report(loaded, tokenized, Mixture([*paths], sizes, [1 / len(paths)] * len(paths), 0), 4)

    found = report(labels=labels, pairs=folder)
    pairs = found["sources"]["pairs"]
    assert (pairs["unread"], pairs["equal_pairs"], pairs["template_marks"]) == ({note: 2}, 1, 0)
    assert pairs["left_out"] == ["more", "other.jsonl", "test.jsonl"]
    both = {"path": str(folder), "eval_split": "test"}
    (source,) = load_sources(data_settings({"sources": {"pairs": both}}))
    assert (source.omitted.files, source.omitted.unread.total()) == (["more", "other.jsonl"], 3)
    (source,) = load_sources(data_settings({"sources": {"pairs": both | {"eval_path": str(folder.parent / "twin")}}}))
    assert source.omitted.files == ["more", "other.jsonl", "test.jsonl", "notes.txt"]
    assert found["sources"]["labels"]["labels"] == {"good": 11, "bad": 1}
    assert data_omissions(found["sources"]) == [f"pairs: {note} (2 rows)", "pairs: files more, other.jsonl, test.jsonl"]
    assert data_cautions(found) == [
        "pairs: in 1 of its rows both sides of the pair are the same: they teach nothing",
        f"rows contradict each other in 1 case: {CONTRADICTED}",
        "10 of the training rows repeat another one, prompt and completions",
        "labels are uneven: 11 good, 1 bad",
    ]
    labels.write_text("".join(json.dumps(DIALOGUES["alpaca"] | {"label": False}) + "\n" for n in range(3)))
    assert data_cautions(report(labels=labels)) == [
        "2 of the training rows repeat another one, prompt and completions",
        "every labelled row is bad: nothing tells good completions from bad ones",
    ]


def test_jobs_that_write_rows_tell_the_columns_that_their_files_will_lack(tmp_path):
    from uft.training.making import drawn_sources

    load(tmp_path, [{"prompt": "q", "completion": "a", "id": 3}])
    source, heard = {"path": str(tmp_path / "rows.jsonl")}, []
    config = SimpleNamespace(data=data_settings({"sources": {"mine": source, "other": source | {"share": 0}}}))
    assert [source.name for source in drawn_sources(config, heard.append)] == ["mine"]
    assert heard == ["not read: mine: id (1 row)"]


def test_texts_that_may_be_meant_otherwise_are_counted(tmp_path):
    asked = "How many legs has a spider?"
    records = [
        {"prompt": asked, "chosen": f"{asked} Eight.", "rejected": f"{asked} Six."},
        {"prompt": asked, "chosen": f"{asked} Eight.", "rejected": "Six."},
        {"prompt": f"<|im_start|>user\n{asked}", "chosen": "Eight.</s>", "rejected": "Six."},
        {"prompt": f"### Instruction:\n{asked}", "chosen": "Eight.", "rejected": "<s>Six."},
        {"prompt": "1 <s 2 and [INSTALL] | <|> a|>", "chosen": "Eight", "rejected": "Six"},
        {"prompt": "hi", "chosen": "hi there", "rejected": "hi!", "chosen_score": 2, "rejected_score": 3},
        {"prompt": "hi", "chosen": "hi there", "rejected": "hi!", "score_chosen": 3, "score_rejected": 3},
        {"prompt": "hi", "chosen": "hi there", "rejected": "hi!", "chosen_rating": -1},
    ]
    joined = {"function": {"name": "w", "arguments": {"city": "Oslo", "day": None}}}
    records += [
        PAIR | {"chosen": "None"},
        PAIR | {"rejected": "nan"},
        PAIR | {"tools": [joined], "chosen": "none of it"},
        *(PAIR | {"chosen": text} for text in ("42\n###", "42 END", "42 [EOS]", "The end", "C#")),
        *(PAIR | {"rejected": text} for text in ("Assistant: 42", "42\n\nHuman: 6*6?", "The assistant: 42")),
        PAIR | {"chosen": [REPLY | {"content": "<think>6*7</think>42", "reasoning_content": "6*7"}]},
        *(PAIR | {"chosen": [CALLS, {"role": "tool", "tool_call_id": name, "content": "42"}, REPLY]} for name in "ab"),
    ]
    expected = {"repeated_prompts": 1, "template_marks": 2, "contrary_scores": 1, "void_replies": 2, "null_fields": 1}
    expected |= {"written_stops": 3, "written_speakers": 2, "repeated_reasoning": 1, "stray_results": 1}
    source = load(tmp_path, records)
    assert (source.omitted.oddities, source.omitted.unread) == (expected, {})


# --- prompts


def test_a_prompt_keeps_the_turns_that_a_pair_does_not_repeat(tmp_path):
    sides = {"chosen": [USER, REPLY], "rejected": [USER, WORSE]}
    for asked in ([SYSTEM, USER], [*EARLIER, USER], [SYSTEM, *EARLIER, USER]):
        row = read({"prompt": asked, **sides})
        assert turns(row) == [(turn["role"], turn["content"]) for turn in asked]
        assert [c.text for c in row.completions] == ["42", "13"]
    longer = {name: [SYSTEM, *EARLIER, *side] for name, side in sides.items()}
    later = {name: [*EARLIER, *side] for name, side in sides.items()}
    assert turns(read({"prompt": [SYSTEM, EARLIER[0]], **later})) == turns(read({"prompt": [USER], **longer}))
    for asked in ("7*6?", " 7*5?\n", [USER], [*EARLIER, USER]):
        assert len(turns(read({"prompt": asked, **longer}))) == 4
    for asked in ("8*6?", [USER, *EARLIER, {**USER, "content": "8*6?"}]):
        with pytest.raises(Unreadable, match="prompt differs from the prompt in chosen and rejected"):
            read({"prompt": asked, **sides})
    lines = [{"prompt": "8*6?", **sides}]
    assert "columns.prompt=''" in refused(tmp_path, lines)
    assert turns(load(tmp_path, lines, columns={"prompt": ""}).rows[0]) == [("user", "7*6?")]
    twins = read({"prompt": [SYSTEM, USER], "chosen": [USER, REPLY], "rejected": [USER, REPLY]})
    assert ([c.text for c in twins.completions], len(twins.prompt)) == (["42", "42"], 2)


def test_systems_and_histories_of_any_format_stand_before_the_prompt():
    for record in DIALOGUES.values():
        for system, history in (("system_prompt", "history"), ("system_message", "chat_history")):
            row = read(record | {system: "Count well.", history: '[["7*5?", "35"]]'})
            assert turns(row) == [("system", "Count well."), ("user", "7*5?"), ("assistant", "35"), ("user", "7*6?")]
        for empty in ([], "[]", None, " "):
            assert turns(read(record | {"system": "", "history": empty})) == [("user", "7*6?")]
    assert len(read(DIALOGUES["alpaca"] | {"history": [["7*5?", "35"], ["7*4?", "28"]]}).prompt) == 5
    for history in ("7*5?", [["7*5?"]], [["7*5?", ""]], [["7*5?", "35", "x"]], [{"role": "nobody", "content": "x"}]):
        with pytest.raises(Unreadable, match="history"):
            read(DIALOGUES["alpaca"] | {"history": history})
    with pytest.raises(Unreadable, match="system differs from the system turn of the prompt"):
        read({"messages": [SYSTEM, USER, REPLY], "system": "Be rude."})


def test_pairs_beside_other_prompts():
    pair = {"chosen": "42", "rejected": "13"}
    ask = [{"from": "human", "value": "7*6?"}]
    for prompt in ({"question": "7*6?"}, {"instruction": "7*6?"}, {"input": "7*6?"}, {"conversations": ask}):
        row = read(prompt | pair | {"system": "Count well."})
        assert (row.kind, [c.text for c in row.completions]) == (Kind.PREFERENCE, ["42", "13"])
        assert turns(row) == [("system", "Count well."), ("user", "7*6?")]
    assert turns(read({"instruction": "Multiply.", "input": "7*6", **pair})) == [("user", "Multiply.\n\n7*6")]
    single = {"chosen": {"from": "gpt", "value": "42"}, "rejected": {"from": "gpt", "value": "13"}}
    assert [c.text for c in read({"conversations": ask, **single}).completions] == ["42", "13"]
    responses = {"instruction": "7*6?", "chosen_response": "42", "rejected_response": "13"}
    assert [c.preferred for c in read(responses).completions] == [True, False]


def test_instruction_input_and_context_are_all_read():
    assert turns(read({"instruction": "a", "input": None, "context": "c", "response": "r"})) == [("user", "a\n\nc")]
    assert turns(read({"instruction": "a", "input": "b", "context": "c", "output": "r"})) == [("user", "a\n\nb\n\nc")]


def test_transcripts_are_conversations_as_prompts_and_beside_them():
    asked = "\n\nHuman: 7*5?\n\nAssistant: 35\n\nHuman: 7*6?\n\nAssistant:"
    expected = [("user", "7*5?"), ("assistant", "35"), ("user", "7*6?")]
    for sides in ({"chosen": "42", "rejected": "13"}, {"chosen": f"{asked} 42", "rejected": f"{asked} 13"}):
        row = read({"prompt": asked, **sides})
        assert (turns(row), [c.text for c in row.completions]) == (expected, ["42", "13"])
    assert len(turns(read({"prompt": asked.removesuffix("Assistant:"), "completion": "a"}))) == 3
    assert turns(read({"prompt": "Human: hi", "completion": "a"})) == [("user", "Human: hi")]


# --- messages


def test_messages_as_text_are_messages():
    for write in (json.dumps, str):
        row = read({"messages": write([SYSTEM, USER, REPLY])})
        assert (len(row.prompt), row.completions[0].text) == (2, "42")
        row = read({"prompt": write([USER]), "chosen": write([REPLY]), "rejected": write([USER, WORSE][1:])})
        assert (turns(row), [c.text for c in row.completions]) == ([("user", "7*6?")], ["42", "13"])
    for text in ('[{"role": "user"', "[{'content': 1}]", '[{"role": "wizard", "content": "x"}]', "[1]"):
        assert turns(read({"prompt": text, "completion": "a"})) == [("user", text)]
        with pytest.raises(Unreadable, match="messages is text"):
            read({"messages": text})


def test_of_two_names_of_a_field_the_one_that_is_set_counts():
    empty = {"role": None, "content": None, "from": None, "value": None}
    union = [empty | {"from": "human", "value": "7*6?"}, empty | {"role": "assistant", "content": "42"}]
    assert turns(read({"messages": union})) == [("user", "7*6?")]
