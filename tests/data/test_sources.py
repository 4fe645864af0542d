"""Sources as rows: grouping, holding out, and telling everything that is wrong at once."""

import json
import random
import re
from pathlib import Path

import pytest

from uft.config.schema import Data, Source, data_settings
from uft.data.rows import Kind
from uft.data.sources import load_sources
from uft.errors import UftError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def demonstrations(count, start=0):
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(start, start + count)]


def load(sources, **data):
    return load_sources(data_settings({"sources": sources, **data}))


def refused(sources, **data):
    with pytest.raises(UftError) as error:
        load(sources, **data)
    return str(error.value)


@pytest.fixture
def ten(tmp_path):
    return write(tmp_path / "ten.jsonl", demonstrations(10))


def test_sources_come_sorted_with_rows_named_after_them(ten):
    first, second = load({"z": {"path": ten}, "a": {"path": ten, "limit": 3}})
    assert (first.name, second.name, len(second.rows)) == ("a", "z", 10)
    assert [row.id for row in first.rows] == ["a:0", "a:1", "a:2"]
    assert second.kinds == {Kind.DEMONSTRATION: 10}
    schema = load_sources(Data(name="d", sources={"a": Source(path=ten)}))
    assert schema == load({"a": {"path": ten}})


def test_parts_are_disjoint_slices_of_what_is_not_held_out(tmp_path):
    path = write(tmp_path / "many.jsonl", demonstrations(1003))
    parts = [load({"a": {"path": path, "part": f"{n}/5"}})[0] for n in range(1, 6)]
    indices = [[row.index for row in part.rows] for part in parts]
    assert indices == [list(range(start, start + 200)) for start in range(0, 1000, 200)]
    assert parts[0].omitted.unread == {"rows after the last part": 3}
    held = [load({"a": {"path": path, "part": f"{n}/4", "limit": 30}}, holdout=0.1)[0] for n in (1, 2, 3, 4)]
    assert len({tuple(row.id for row in source.held_out) for source in held}) == 1, "the same in all parts"
    trained = [row.index for source in held for row in source.rows]
    assert trained == sorted(set(trained))
    assert len(trained) == 4 * 30, "the limit is of the part"
    assert not {row.index for row in held[0].held_out} & set(trained)
    for part in ("5/4", "0/3", "x", "1/"):
        assert "data.sources.a.part" in refused({"a": {"path": path, "part": part}})
    assert "is no slice r/n of its 1,003 training rows" in refused({"a": {"path": path, "part": "1/2000"}})


def test_columns_are_mapped(tmp_path, ten):
    path = write(tmp_path / "x.jsonl", [{"q": "why", "a": "because", "gold": 7}])
    (source,) = load({"a": {"path": path, "columns": {"prompt": "q", "completion": "a", "answer": "gold"}}})
    (row,) = source.rows
    assert (row.prompt[0].content, row.completions[0].text, row.answer) == ("why", "because", "7")
    for ours in ({"prompt": "q", "response": "a"}, {"question": "q", "output": "a"}, {"question": "q", "answer": "a"}):
        assert load({"a": {"path": path, "columns": ours}})[0].rows[0].completions == row.completions
    said = refused({"a": {"path": path, "columns": {"prompt": "qq", "completion": "a"}}})
    assert "data.sources.a.columns.prompt=qq" in said
    assert "did you mean  q ?" in said


def test_problems_of_several_sources_are_told_together(tmp_path, ten):
    sources = {"a": {"path": str(tmp_path / "no.jsonl")}, "b": {"path": ten, "columns": {"promt": "prompt"}}}
    said = refused({**sources, "c": {"path": ten}})
    assert "2 problems" in said
    assert "data.sources.a.path" in said
    assert "data.sources.b.columns.promt" in said
    assert "+data.sources.mine.path=x.jsonl" in refused({})


def test_completions_of_one_prompt_meet_in_one_scored_row_where_the_first_stood(tmp_path):
    rows = [{"prompt": p, "completion": c, "score": s} for p, c, s in (("q", "a", 0), ("r", "b", 1), ("q", "c", 0.5))]
    (source,) = load({"a": {"path": write(tmp_path / "x.jsonl", rows)}})
    assert [[c.score for c in row.completions] for row in source.rows] == [[0.0, 0.5], [1.0]]
    assert [row.index for row in source.rows] == [0, 1]
    labelled = [{"prompt": "q", "completion": c, "label": c == "a"} for c in "ab"]
    (source,) = load({"a": {"path": write(tmp_path / "y.jsonl", labelled)}})
    assert [row.completions[0].label for row in source.rows] == [True, False]


def test_every_bad_row_of_every_source_is_told_at_once_with_its_place(tmp_path):
    good = json.dumps({"prompt": "q", "completion": "a"}).encode()
    bad = [
        b'{"prompt": "q"}',
        b'{"prompt": "q", "completion": ""}',
        b'{"prompt": 7, "completion": "a"}',
        b'{"prompt": "q", "completion": ',
        b'{"prompt": "q\xff", "completion": "a"}',
        b"[]",
    ]
    (tmp_path / "one.jsonl").write_bytes(b"\n".join([good, *bad, good, good, good, good, good]))
    write(tmp_path / "two.jsonl", [{"prompt": "q", "completion": "a", "score": 2}])
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two")}
    said = refused(sources)
    reasons = "completion is missing|completion is empty|prompt is a number|broken JSON|not UTF-8|not a JSON"
    for line, why in enumerate(reasons.split("|"), 2):
        assert f"one.jsonl:{line} " in said
        assert why in said
    assert "two.jsonl:1 " in said
    assert "outside 0 to 1" in said
    assert "data.bad_rows=drop" in said
    many = refused({"a": {"path": write(tmp_path / "x.jsonl", [{"prompt": "q", "completion": ""}] * 50)}})
    assert many.count("completion is empty") == 1
    assert "and the same of 19 more" in many
    assert "and 30 more" in many
    rated = [{"prompt": "q", "completion": "a", "score": score} for score in range(2, 7)]
    scores = refused({"a": {"path": write(tmp_path / "s.jsonl", rated)}})
    assert (scores.count("outside 0 to 1"), scores.count("on another scale")) == (1, 1)
    assert "and the same of 4 more" in scores
    kinds = [{"prompt": "q", "completion": "a"}] * 3 + [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    assert "it has the columns of preference" in refused({"a": {"path": write(tmp_path / "k.jsonl", kinds)}})


def test_a_refused_file_hides_no_bad_row_of_its_own_or_of_others(tmp_path):
    row, broken = {"prompt": "q", "completion": "a"}, "{\n"
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", [row | {"rating": 1}, row | {"prompt": "", "rating": 2}])
    (folder / "b.jsonl").write_text(broken + json.dumps({"text": "no known layout"}))
    write(folder / "c.jsonl", [row, {"prompt": "q"}, row])
    (folder / "d.parquet").write_bytes(b"no table")
    unmapped = write(tmp_path / "unmapped.jsonl", [row, [], row])
    evaluated = write(tmp_path / "evaluated.jsonl", [row, row | {"prompt": ""}])
    ending = str(tmp_path / "rows.xyz")
    Path(ending).touch()
    sources = {
        "a": {"path": str(folder), "eval_path": evaluated},
        "b": {"path": unmapped, "columns": {"promt": "prompt"}},
        "c": {"path": ending, "eval_path": evaluated},
        "d": {"path": unmapped, "score_range": [1]},
    }
    said = refused(sources)
    for words in (
        "rating (2 rows) may say how good",
        "a.jsonl:2  prompt is empty",
        "b.jsonl:1  broken JSON",
        "no known row format has the columns text",
        "c.jsonl:2  completion is missing",
        f"data.sources.a.path={folder}  cannot be read",
        "evaluated.jsonl:2  prompt is empty",
        "data.sources.b.columns.promt",
        "unmapped.jsonl:2  not a JSON object",
        "cannot read files of type .xyz",
        "data.sources.d.score_range=[1.0]",
    ):
        assert words in re.sub(" {2,}", "  ", said), words
    assert "11 problems" in said


def test_bad_rows_are_dropped_and_counted_when_asked(tmp_path):
    rows = [*demonstrations(2), {"prompt": "q", "completion": ""}, *demonstrations(2, start=2)]
    (source,) = load({"a": {"path": write(tmp_path / "x.jsonl", rows)}}, bad_rows="drop")
    assert [row.index for row in source.rows] == [0, 1, 2, 3]
    assert [bad.where.rsplit(":", 1)[1] for bad in source.omitted.bad] == ["3"]


def test_a_source_with_nothing_good_left_stops_even_then(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "q", "completion": ""}])
    assert "no row could be used: completion is empty" in refused({"a": {"path": path}}, bad_rows="drop")
    (tmp_path / "empty.jsonl").write_text("")
    said = refused({"a": {"path": path}, "b": {"path": str(tmp_path / "empty.jsonl")}})
    assert "x.jsonl:1" in said
    assert "there are no rows in it" in said


def test_one_missing_or_stray_key_does_not_change_the_format(tmp_path):
    rows = [*demonstrations(3), {"prompt": "q", "completion": "a", "sampled_by": "m"}]
    (source,) = load({"a": {"path": write(tmp_path / "x.jsonl", rows)}})
    assert source.kinds == {Kind.DEMONSTRATION: 4}
    assert source.omitted.unread == {"sampled_by": 1}


def test_csv_scores_and_labels(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion,score\nq,a,0.25\nr,b,high\n")
    (tmp_path / "y.csv").write_text("prompt,completion,label\nq,a,True\nr,7,0\n")
    scored, labelled = load(
        {"x": {"path": str(tmp_path / "x.csv")}, "y": {"path": str(tmp_path / "y.csv")}}, bad_rows="drop"
    )
    assert scored.rows[0].completions[0].score == 0.25
    assert scored.omitted.bad[0].why == "score is text, not a number"
    assert [row.completions[0].label for row in labelled.rows] == [True, False]
    assert labelled.rows[1].completions[0].text == "7"
    (tmp_path / "z.csv").write_bytes("prompt,completion\nq,caf\xe9\n".encode("latin-1"))
    said = refused({"z": {"path": str(tmp_path / "z.csv")}})
    assert "z.csv:2" in said
    assert "not valid UTF-8" in said


def test_a_score_range_is_two_numbers_in_order(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "q", "completion": "a", "score": 4}])
    (source,) = load({"a": {"path": path, "score_range": [0, 5]}})
    assert source.rows[0].completions[0].score == 0.8
    for wrong in ([5], [5, 0], [0, 1, 2]):
        assert "data.sources.a.score_range" in refused({"a": {"path": path, "score_range": wrong}})


# --- held-out rows


def test_held_out_rows_depend_on_prompts_alone(tmp_path):
    rows = demonstrations(40)
    shuffled = random.Random(1).sample(rows, len(rows))
    sides = []
    for name, order in (("a", rows), ("b", shuffled)):
        (source,) = load({name: {"path": write(tmp_path / f"{name}.jsonl", order), "holdout": 0.25}})
        assert len(source.held_out) == 10
        assert len(source.rows) == 30
        sides.append({row.prompt for row in source.held_out})
        assert not sides[-1] & {row.prompt for row in source.rows}
    assert sides[0] == sides[1]


def test_one_prompt_never_sits_on_both_sides(tmp_path):
    rows = [{"prompt": f"q{n % 7}", "completion": f"a{n}", "label": True} for n in range(70)]
    (source,) = load({"a": {"path": write(tmp_path / "x.jsonl", rows)}}, holdout=0.2)
    train, held = ({row.prompt for row in side} for side in (source.rows, source.held_out))
    assert train
    assert held
    assert not train & held
    assert len(source.rows) + len(source.held_out) == 70


def test_a_holdout_is_a_share_or_a_count_and_the_source_s_own_wins(ten):
    (source,) = load({"a": {"path": ten, "holdout": 3}}, holdout=0.5)
    assert len(source.held_out) == 3
    (source,) = load({"a": {"path": ten, "holdout": 0}}, holdout=0.5)
    assert source.held_out == ()
    (source,) = load({"a": {"path": ten}}, holdout=0.01)
    assert len(source.held_out) == 1
    assert "leaves no row to train on" in refused({"a": {"path": ten, "holdout": 10}})
    few, more = ({row.index for row in load({"a": {"path": ten}}, holdout=n)[0].held_out} for n in (2, 5))
    assert few < more, "what is held out of fewer rows is held out of more"
    (source,) = load({"a": {"path": ten, "limit": 4, "holdout": 0.5}})
    assert {row.index for row in (*source.rows, *source.held_out)} == {0, 1, 2, 3}, "the limit comes first"


def test_evaluation_rows_of_their_own(tmp_path, ten):
    other = write(tmp_path / "eval.jsonl", demonstrations(3, start=100))
    (source,) = load({"a": {"path": ten, "eval_path": other, "limit": 2}}, holdout=0.5)
    assert (len(source.rows), len(source.held_out)) == (2, 3)
    assert source.held_out[0].prompt[0].content == "question 100"
    said = refused({"a": {"path": ten, "eval_path": str(tmp_path / "evol.jsonl")}})
    assert "data.sources.a.eval_path" in said


def test_an_evaluation_split_of_the_same_folder(tmp_path):
    write(tmp_path / "train.jsonl", demonstrations(4))
    write(tmp_path / "test.jsonl", demonstrations(2, start=50))
    (source,) = load({"a": {"path": str(tmp_path), "eval_split": "test"}})
    assert (len(source.rows), len(source.held_out)) == (4, 2)


@pytest.mark.parametrize("second", ["a.jsonl.gz", "A.parquet"])
def test_one_name_in_two_formats_may_be_the_same_rows(tmp_path, second):
    write(tmp_path / "a.jsonl", demonstrations(4))
    (tmp_path / second).write_bytes(b"not read")
    said = refused({"a": {"path": str(tmp_path)}})
    assert f"a.jsonl and {second}" in said or f"{second} and a.jsonl" in said
    assert f"data.sources.a.path={tmp_path}/" in said


def test_builtin_sources_bring_their_test_rows():
    from uft.playground import world

    (source,) = load({"a": {"path": "builtin:playground/instruct", "checker": "playground"}}, holdout=0.5)
    assert len(source.held_out) == len(world.records("instruct", "test"))
    assert source.checker == "playground"
    (source,) = load({"a": {"path": "builtin:playground/instruct", "holdout": 5}})
    assert len(source.held_out) == 5


# --- digest


def test_the_digest_is_of_the_content_in_its_order(tmp_path):
    paths = [
        write(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((demonstrations(3), demonstrations(3)[::-1]))
    ]
    first, second = (load({"a": {"path": path}})[0].digest for path in paths)
    assert first != second
    assert first == load({"another_name": {"path": paths[0]}})[0].digest
    assert len(first) == 64


# --- real rows


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows lie beside a working copy, not in the repository")
def test_real_rows_load_whole():
    """A pair of twins among them: it teaches nothing, but annotators do grade equal answers differently."""
    demonstrations = {"instruction": 2639, "instruction_messages": 76, "gsm8k_test": 500}
    counts = {name: {Kind.DEMONSTRATION: count} for name, count in demonstrations.items()}
    counts |= {name: {Kind.PREFERENCE: n} for name, n in {"preference_messages": 227, "preference": 2589}.items()}
    counts["binary"] = {Kind.BINARY: 1047}
    found = {name: load({"a": {"path": str(SHARED / f"{name}.jsonl")}})[0].kinds for name in counts}
    assert found == counts
    (source,) = load({"a": {"path": str(SHARED / "scored.jsonl")}})
    scores = [c.score for row in source.rows for c in row.completions]
    assert len(scores) == 924
    assert 0 <= min(scores) < max(scores) <= 1
    assert len(source.rows) == len({row.prompt for row in source.rows}) < 924
