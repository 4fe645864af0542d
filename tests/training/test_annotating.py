"""The job `annotate`: where it writes, what it will not overwrite, and that a mixture reads on as before."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from uft.config.compose import compose
from uft.config.frozen import to_config
from uft.config.schema import Annotate, Config, Source
from uft.data.rows import Row
from uft.data.sources import load_sources
from uft.errors import GOOD, INTERRUPTED, STOPPED, UftError
from uft.model import reference
from uft.sampling import annotate as annotation
from uft.training import making
from uft.training.making import AnnotatedSource, annotated_data, train_command, write_column
from uft.training.setup import Work

Configure = Callable[..., Config]


@pytest.fixture
def job(model_folder):
    """job(config, out, column="baseline_logp")."""

    def run(config: Config, out: Path, column: str = "baseline_logp") -> dict[str, AnnotatedSource]:
        models = [str(model_folder)] if column == "baseline_logp" else []
        asked = replace(config.annotate, column=column, models=models)
        return write_column(Work(replace(config, annotate=asked)), out)

    return run


def bare(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows without their annotations."""
    return tuple(replace(r, completions=tuple(replace(c, annotations={}) for c in r.completions)) for r in rows)


def numbers(rows: tuple[Row, ...], column: str = "baseline_logp") -> list[float | None]:
    return [c.annotations.get(column) for row in rows for c in row.completions]


def test_every_kind_of_row_reads_on_as_the_same_mixture(job, configure, tmp_path):
    config = configure("sft", "data.holdout=0.25", "data.sources.preference.share=3", "data.sources.binary.share=1")
    for name in ("demonstration", "scored", "negatives"):
        config.data.sources[name].share = 1.0
    written = job(config, tmp_path / "rows")
    assert {name: one.rows for name, one in written.items()} == {
        name: tmp_path / "rows" / f"{name}.jsonl" for name in config.data.sources
    }
    assert all(one.without == 0 and one.evaluation is None for one in written.values())
    data = annotated_data(config.data, written)
    assert data.sources["preference"].share == 3.0
    for before, after in zip(load_sources(config.data), load_sources(data), strict=True):
        assert bare(after.rows) == before.rows
        assert bare(after.held_out) == before.held_out
        assert len(after.held_out) > 0
        assert all(number is not None and number < 0 for number in numbers(after.rows + after.held_out))


def test_evaluation_rows_of_their_own_place_stay_apart(job, configure, files, tmp_path):
    for name, count in (("train", 5), ("test", 3)):
        lines = (json.dumps({"question asked": f"w{n + 3}", "reply": "w9"}) + "\n" for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = configure("sft", sources={"mine": tmp_path / "train.jsonl", "measured": files["binary"]})
    config.data.sources["mine"].eval_path = str(tmp_path / "test.jsonl")
    config.data.sources["mine"].columns = {"prompt": "question asked", "completion": "reply"}
    config.data.sources["mine"].checker = "exact"
    config.data.sources["measured"].share = 0.0
    written = job(config, tmp_path / "rows.jsonl")
    assert written["mine"].evaluation == tmp_path / "eval" / "rows.jsonl"
    data = annotated_data(config.data, written)
    assert data.sources["measured"] == config.data.sources["measured"]
    _, before = load_sources(config.data)
    _, after = load_sources(data)
    assert (len(after.rows), len(after.held_out)) == (5, 3)
    assert after.held_out == before.held_out
    assert (bare(after.rows), after.checker) == (before.rows, "exact")


def test_the_command_that_is_shown_composes_to_what_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spaced = tmp_path / 'a "b" \\'
    sources = {"mine": Source(path="x", share=0.5, checker="exact", columns={"prompt": "q"}), "other": Source(path="y")}
    data = replace(to_config(compose(["data=mix"])).data, sources=sources)
    written = {
        "mine": AnnotatedSource(Path("r.jsonl"), Path("eval/r.jsonl"), 1, 0),
        "other": AnnotatedSource(spaced, None, 1, 0),
    }
    import shlex

    words = shlex.split(train_command(data, "baseline_logp", written))
    assert words[:2] == ["uft", "train"]
    found = to_config(compose(words[2:]))
    assert found.data.sources == annotated_data(data, written).sources
    assert found.data.sources["other"].path == str(spaced)
    assert found.objective["name"] == "poft"


def refused(call: Callable[[], object]) -> list[str]:
    with pytest.raises(UftError) as error:
        call()
    return [f"{problem.what}: {problem.why} {' '.join(problem.advice)}" for problem in error.value.problems]


def test_what_is_not_ours_is_never_replaced(job, configure, files, tmp_path):
    config = configure("sft", sources={"mine": files["demonstration"]})
    other = tmp_path / "notes.jsonl"
    other.write_text('{"prompt": "mine"}\n')
    (said,) = refused(lambda: job(config, other))
    assert "not written by uft annotate" in said
    assert other.read_text() == '{"prompt": "mine"}\n'
    before = files["demonstration"].read_bytes()
    (said,) = refused(lambda: job(config, files["demonstration"]))
    assert "among the rows it is made from" in said
    assert files["demonstration"].read_bytes() == before
    folder = configure("sft", sources={"mine": files["demonstration"].parent})
    folder.data.sources["mine"].path = str(tmp_path / "some")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.jsonl").write_bytes(before)
    (said,) = refused(lambda: job(folder, tmp_path / "some" / "b.jsonl"))
    assert "among the rows it is made from" in said
    (said,) = refused(lambda: job(config, other / "below"))
    assert "cannot be written" in said
    out = tmp_path / "ours.jsonl"
    first = job(config, out)
    content = out.read_bytes()
    assert job(config, out) == first
    assert out.read_bytes() == content


def test_one_file_holds_one_source_of_one_kind(job, configure, files, tmp_path):
    (said,) = refused(lambda: job(configure("sft"), tmp_path / "rows.jsonl"))
    assert "there are 5" in said
    assert f"annotate.out={tmp_path / 'rows'}" in said
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for kind in ("binary", "preference"):
        (mixed / f"{kind}.jsonl").write_bytes(files[kind].read_bytes())
    (said,) = refused(lambda: job(configure("sft", sources={"mine": mixed}), tmp_path / "rows.jsonl"))
    assert "several kinds (binary, preference)" in said


def test_soft_labels_where_there_are_scores(job, configure, files, tmp_path):
    config = configure("sft", "annotate.temperature=0.5")
    written = job(config, tmp_path / "rows", "soft_label")
    assert {name for name, one in written.items() if one.without < one.completions} == {"scored"}
    lines = [json.loads(line) for line in (tmp_path / "rows" / "scored.jsonl").read_text().splitlines()]
    assert [line["soft_label"] for line in lines[:2]] == pytest.approx([0.731059, 0.268941], abs=1e-6)
    only = configure("sft", sources={"mine": files["preference"]})
    (said,) = refused(lambda: job(only, tmp_path / "none", "soft_label"))
    assert "no row has two scores" in said
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)])
def test_the_verb_stops_when_asked_and_goes_on(
    configure, files, model_folder, tmp_path, monkeypatch, capsys, number, code
):
    monkeypatch.setattr(annotation, "PER_FILE", 4)
    config = configure("sft", f"data.cache={tmp_path / 'cache'}", sources={"mine": files["demonstration"]})
    out = tmp_path / "rows.jsonl"
    config.annotate = Annotate(column="baseline_logp", models=[str(model_folder)], out=str(out), batch_tokens=1)
    real, batches = reference.sequence_batch, []

    def interrupted(*arguments: Any) -> Any:
        batches.append(arguments)
        if len(batches) == 6:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "sequence_batch", interrupted)
        assert making.annotate(config) == code
    assert not out.exists()
    assert len(batches) == 6
    assert making.annotate(config) == GOOD
    said = capsys.readouterr().out
    assert "4 of 12 completions are known from before" in said
    assert "mine: 12 of 12 completions have baseline_logp" in said
    assert f"uft train objective=poft data=files +data.sources.mine.path={out}" in said


def test_the_column_must_be_said(configure):
    assert "which column" in refused(lambda: making.annotate(configure("sft")))[0]
