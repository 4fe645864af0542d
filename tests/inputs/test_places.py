"""Where things are read from and written to: names that would escape, links, files that change meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from uft.cli import main
from uft.config.schema import Data, Source
from uft.data import sources
from uft.data.sources import load_sources
from uft.environment import keep_others_out
from uft.errors import UftError
from uft.model import checkpoint
from uft.runs import Run, create_run, planned

ROW = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
NAMES = [
    "..",
    "a/b",
    "a\x1bb",
    "../../x",
    "a\\b",
    "\u202egnp",
    "x" * 300,
    "a\nb",
    "half\udcff",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("UFT_CONF", raising=False)
    return folder


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@pytest.mark.parametrize("name", [*NAMES[:3], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[3:])], ids=ascii)
@pytest.mark.parametrize("key", ["run.name", pytest.param("sweep.name", marks=pytest.mark.slow)])
def test_names_that_are_no_folder_s_are_refused(here, tmp_path, capsys, key, name):
    before = everything(tmp_path)
    words = ["train", f"{key}={quoted(name)}", *(["seed=1,2", "-m"] if key == "sweep.name" else [])]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "out/a\x1bb/c"], ids=ascii)
def test_a_folder_that_cannot_be_made_is_refused(here, capsys, name):
    assert main(["train", f"run.dir={quoted(name)}"]) == 2
    assert "run.dir" in capsys.readouterr().err
    assert everything(here) == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "x" * 300, "a\x1bb"], ids=ascii)
def test_names_of_sources_are_refused_alike(here, capsys, name):
    (here / "rows.jsonl").write_text(ROW * 4)
    (here / "conf-user" / "data").mkdir(parents=True)
    content = {"name": "mine", "sources": {name: {"path": "rows.jsonl"}}}
    (here / "conf-user" / "data" / "mine.yaml").write_text(f"# mine\n{json.dumps(content)}\n")
    assert main(["train", "objective=sft", "data=mine"]) == 2
    assert "data.sources." in capsys.readouterr().err
    assert not (here / "outputs").exists()


def test_a_planned_job_is_a_folder_of_its_sweep(tmp_path):
    """A received sweep folder names no place outside of itself."""
    jobs = [{"name": name} for name in ("good", "../../evil", "/etc", "/", "a/b", "", "..", ".", None)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert [run.path for run in planned(tmp_path)] == [tmp_path / "good"]


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_the_umask_is_respected_and_nothing_is_for_everybody_to_write(tmp_path, mask):
    before = os.umask(mask)
    try:
        keep_others_out()
        run = create_run(tmp_path / "run", "a: 1\n", ["b=2"])
    finally:
        os.umask(before)
    for path in (run.path, *run.path.iterdir()):
        mode = path.stat().st_mode & 0o777
        assert mode & (mask | 0o002) == 0
        assert mode & 0o600 == 0o600


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_have_the_mode_that_the_umask_leaves_too(tmp_path, mask):
    """safetensors gives its files to their owner alone."""
    before = os.umask(mask)
    try:
        run = create_run(tmp_path / "run", "a: 1\n", [])
        saved = checkpoint.publish(run, checkpoint.begin(run, 3, {"w": torch.zeros(2)}, {"progress": {}}))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~mask}


# --- links


def test_a_run_folder_that_is_a_link_into_foreign_files_is_refused(here, capsys):
    foreign = here / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("ten years")
    (here / "outputs").mkdir()
    (here / "outputs" / "mine").symlink_to(foreign, target_is_directory=True)
    (here / "rows.jsonl").write_text(ROW * 4)
    words = ["train", "objective=sft", "data=files", "+data.sources.a.path=rows.jsonl", "run.dir=outputs/mine"]
    assert main(words) == 2
    assert "not empty and is not a run" in capsys.readouterr().err
    assert everything(foreign) == [str(foreign / "thesis.tex")]


def test_files_are_replaced_and_not_written_through_a_link(tmp_path):
    """A received run folder whose records are links to files of ours."""
    ours = tmp_path / "ours.json"
    ours.write_text("{}")
    run = create_run(tmp_path / "run", "a: 1\n", [])
    (run.path / "run.json").unlink()
    (run.path / "run.json").symlink_to(ours)
    run.update_info(more=1)
    assert ours.read_text() == "{}"
    assert not (run.path / "run.json").is_symlink()


def test_links_to_data_are_followed_and_circles_are_said(tmp_path):
    (tmp_path / "real.jsonl").write_text(ROW * 3)
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    assert len(read(tmp_path / "link.jsonl")) == 3
    (tmp_path / "one.jsonl").symlink_to("two.jsonl")
    (tmp_path / "two.jsonl").symlink_to("one.jsonl")
    (tmp_path / "lost.jsonl").symlink_to("nowhere.jsonl")
    for name in ("one.jsonl", "two.jsonl", "lost.jsonl"):
        with pytest.raises(UftError, match="leads nowhere, or in a circle"):
            read(tmp_path / name)


def test_a_folder_with_a_link_to_itself(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(ROW)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "circle.jsonl").symlink_to("circle.jsonl")
    assert len(read(folder)) == 1


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UftError, match="neither a file nor a folder"):
        read(tmp_path / "rows.jsonl")


def test_a_list_of_runs_does_not_walk_in_circles(tmp_path, capsys):
    create_run(tmp_path / "runs" / "one", "a: 1\n", [])
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert main(["ls", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.count("one") >= 1


# --- files that change


def read(path: Path):
    (source,) = load_sources(Data(name="d", sources={"mine": Source(path=str(path))}))
    return source.rows


@pytest.mark.parametrize("change", ["appended", "replaced", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_said(tmp_path, monkeypatch, change):
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW * 10)
    other = tmp_path / "other"
    other.write_text(ROW * 10)

    def changing(path):
        for number, found in enumerate(slow(path)):
            if number == 5:
                CHANGES[change](file, other)
            yield found

    slow = sources.READERS[".jsonl"]
    monkeypatch.setitem(sources.READERS, ".jsonl", changing)
    with pytest.raises(UftError, match="changed while it was read"):
        read(file)
    monkeypatch.setitem(sources.READERS, ".jsonl", slow)
    assert len(read(file)) >= 10


def appended(file: Path, other: Path) -> None:
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(ROW)


def rewritten(file: Path, other: Path) -> None:
    file.write_text(ROW * 10)  # the same, at another time
    os.utime(file, ns=(1, 1))


CHANGES = {"appended": appended, "replaced": lambda file, other: os.replace(other, file), "rewritten": rewritten}


@pytest.mark.slow
def test_rows_of_ten_megabytes(tmp_path):
    long = "wörter und noch mehr davon " * 370_000
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW + json.dumps({"prompt": "q", "completion": long}, ensure_ascii=False) + "\n" + ROW)
    assert file.stat().st_size > 10_000_000
    assert read(file)[1].completions[0].text == long


def test_the_length_policy_decides_about_endless_rows(tmp_path, byte_level):
    from uft.data.chat import Renderer
    from uft.data.tokens import tokenize

    file = tmp_path / "rows.jsonl"
    file.write_text(ROW + json.dumps({"prompt": "q", "completion": "word " * 50_000}) + "\n" + ROW)
    rows = read(file)
    with pytest.raises(UftError, match=r"1 of 3 rows are longer than train\.max_length=1024") as error:
        tokenize("mine", rows, Renderer(byte_level), 1024)
    assert len(str(error.value)) < 1000
    kept = tokenize("mine", rows, Renderer(byte_level), 1024, "drop")
    assert kept.report.dropped == 1
    assert len(kept.rows) == 2


def test_whether_a_run_is_there_survives_odd_paths():
    for path in ("a\0b", "x" * 5000):
        assert not Run(Path(path)).exists
