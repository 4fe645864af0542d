"""Files that the disk changed: each is known by its checksum, it is said, and the run goes on with what is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from evidence import same, written
from planting import Fault
from sessions import SINGLE

from uft.report.runs import load
from uft.runs import Run
from uft.tracking.metrics import read_metrics

OFTEN = (*SINGLE, "train.checkpoint_every=2", "train.keep_last=3")


def flip(file: Path, place: float = 0.5) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    """As after a loss of power: the name is there, the content never came."""
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed") / "run"


@pytest.fixture
def run(bench, new_run, place, tmp_path) -> Run:
    """A run that was killed after its last step, with its last three checkpoints."""
    run = Run(tmp_path / "killed")
    if place.is_dir():
        new_run("rows", *OFTEN)
        shutil.copytree(place, run.path)
        return run
    new_run("killed", *OFTEN)
    bench.sit(run.path, fault=Fault(do="kill", name="before export.plain_model"), code=-9)
    assert [step for step, _ in run.checkpoints()] == [4, 6, 7]
    shutil.copytree(run.path, place)
    return run


def test_the_newest_whole_checkpoint_is_used(run, undisturbed, bench):
    flip(run.checkpoints_dir / "step-000007" / "tensors.safetensors", 0.9)
    cut(run.checkpoints_dir / "step-000006" / "state.json")
    said = bench.sit(run.path, code=0).said
    assert "step-000007 is damaged (tensors.safetensors does not have its checksum)" in said
    assert "step-000006 is damaged (state.json does not have its checksum)" in said
    assert "resumed at step 4" in said
    same(run.path, undisturbed(*OFTEN))  # and nothing is left of the damaged ones


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", [flip, cut, emptied, Path.unlink])
def test_every_damage_of_every_file(run, undisturbed, bench, file: str, damage: Callable[[Path], None]):
    damage(run.checkpoints_dir / "step-000007" / file)
    said = bench.sit(run.path).said
    assert "step-000007 is damaged" in said
    assert "resumed at step 6" in said
    same(run.path, undisturbed(*OFTEN))


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_nothing_is_begun_again(run, undisturbed, bench):
    lines = run.metrics_file.read_bytes()
    for _, folder in run.checkpoints():
        flip(folder / "tensors.safetensors")
    for _ in range(2):  # it is no accident of the first time
        said = bench.sit(run.path, code=1).said
        assert "none of the run's checkpoints is what was written into it" in said
        assert "Traceback" not in said
        assert run.status == "failed"
        assert run.metrics_file.read_bytes() == lines
    shutil.rmtree(run.checkpoints_dir)  # as the message says
    bench.sit(run.path, code=0)
    same(run.path, undisturbed(*OFTEN))


@pytest.mark.slow
def test_caches_are_made_again(bench, new_run, tmp_path):
    whole, again = new_run("whole", *SINGLE), new_run("again", *SINGLE)
    bench.sit(whole.path, code=0)
    shards = sorted((tmp_path / "cache" / "tokens").glob("*/table.arrow"))
    for number, shard in enumerate(shards):
        (flip, cut, emptied)[number % 3](shard)
    columns = sorted((tmp_path / "cache" / "reference").glob("*/*.safetensors"))
    for column in columns:
        flip(column)
    said = bench.sit(again.path, code=0).said
    assert said.count("is corrupt (table.arrow is not what was written): tokenising again") == len(shards) > 4
    assert said.count("is damaged (checksum): computing its log-probs again") >= len(columns) > 0
    log = (again.path / "console.log").read_text()
    assert "tokenising again" in log
    assert "computing its log-probs again" in log
    same(again.path, written(whole.path))
    third = new_run("third", *SINGLE)
    assert "again" not in bench.sit(third.path).said.partition("status")[0]  # what was made again is whole


def test_a_line_that_the_disk_changed_is_left_out_and_said(run, undisturbed, bench):
    text = run.metrics_file.read_text()
    line = next(line for line in text.splitlines() if line.startswith('{"step": 2,'))
    changed = line.replace('"rows": 8', '"rows": 9')
    assert changed != line
    run.metrics_file.write_text(text.replace(line, changed))
    found = load(run.path)
    assert found.error is not None
    assert "metrics.jsonl: what was written at step 2 is damaged or lost" in found.error
    assert 2 not in [entry["step"] for entry in found.lines]
    assert 2 not in [entry["step"] for entry in read_metrics(run)]
    assert "metrics.jsonl: what was written at step 2 is damaged or lost" in bench.sit(run.path, code=0).said
    ours, theirs = written(run.path), undisturbed(*OFTEN)
    assert ours["curve"] == [line for line in theirs["curve"] if line[0] != ("step", 2)]
    assert ours["tensors"] == theirs["tensors"]
    assert load(run.path).error is None  # what was left out is told of once, by the session that did so
