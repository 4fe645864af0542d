"""The run folder from outside: what is whole, what is locked, what state it is in."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from uft.errors import UftError
from uft.runs import (
    Run,
    create_run,
    find_runs,
    newest_weights,
    no_runs,
    open_run,
    read_json,
    summary,
    write_atomically,
    write_json,
)

ROOT = Path(__file__).parents[1]
HOLD = "import sys, time; from pathlib import Path; from uft.runs import Run\nwith Run(Path(sys.argv[1])).lock():\n"
HOLD += "    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "run", "seed: 3\n", ["seed=3", "run.name='a b'"], commit="abc")


def holder(run: Run, through: str = "") -> subprocess.Popen[str]:
    """A process that holds the run's lock; `through` starts it as a grandchild."""
    script = through or HOLD
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_new_run_holds_its_config_what_was_typed_and_an_id(run: Run):
    assert run.config() == {"seed": 3}
    assert (run.path / "overrides.yaml").read_text() == '- "seed=3"\n- "run.name=\'a b\'"\n'
    info = run.info()
    assert info["commit"] == "abc"
    assert len(info["id"]) == 10
    run.update_info(device="cpu")
    assert run.info() == {**info, "device": "cpu"}


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.json"
    write_atomically(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_damaged_files_are_told_of_and_what_was_typed_is_done_without(run: Run):
    assert read_json(run.path / "absent.json") == {}
    for content in (b"", b"{", b'{"a": 1', b"[]", b"\xff\xfe", b"\0" * 40):
        (run.path / "result.json").write_bytes(content)
        with pytest.raises(UftError, match=r"result\.json .*is damaged"):
            run.result()
    for content in (b"", b"a: [", b"- 1", b"\xff\xfe", b"\0" * 40, b"{" * 1000):
        run.config_file.write_bytes(content)
        (run.path / "overrides.yaml").write_bytes(content)
        with pytest.raises(UftError, match=r"config\.yaml .*is damaged"):
            run.config()
        assert all(isinstance(word, str) for word in run.overrides())


def test_only_whole_checkpoints_count_and_they_are_in_order(run: Run):
    for name in ("step-000200", "step-000030", ".step-000300.tmp", "step-1000000", "notes"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    assert [step for step, _ in run.checkpoints()] == [30, 200, 1000000]


def test_runs_are_found_below_a_folder_and_not_within_runs(run: Run, tmp_path: Path):
    create_run(tmp_path / "sweep" / "job", "{}\n", [])
    create_run(run.path / "inside", "{}\n", [])
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 0\n")  # another program's, and no run
    assert [found.path for found in find_runs(tmp_path)] == [run.path, tmp_path / "sweep" / "job"]
    with pytest.raises(UftError, match="no such folder"):
        open_run(tmp_path / "absent")
    with pytest.raises(UftError, match=r"no config\.yaml"):
        open_run(tmp_path)


def test_a_name_that_is_none_suggests_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert no_runs(Path("lst")).problems[0].advice == (), "there is no run yet"
    create_run(tmp_path / "outputs" / "day" / "betas" / "ift-seed1", "{}\n", [])
    write_json(tmp_path / "outputs" / "day" / "betas" / "sweep.json", {"jobs": []})
    meant = {"lst": "last", "ift-sed1": "ift-seed1", "beta": "betas"}
    assert {word: no_runs(Path(word)).problems[0].advice for word in (*meant, "x")} == {
        word: (f"did you mean  {name} ?",) for word, name in meant.items()
    } | {"x": ()}


def test_the_newest_weights_are_those_of_the_newest_run_that_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for number, (name, files) in enumerate({"old": 1, "new": 2, "waits": 0, "damaged": 3}.items()):
        run = create_run(tmp_path / "outputs" / "day" / name, "model: {}\n", [])
        for step in range(files):
            (run.checkpoints_dir / f"step-00000{step}").mkdir(parents=True)
        for file in run.path.iterdir():
            os.utime(file, (number, number))
    (run.path / "result.json").write_text("{")
    assert newest_weights().name == "new@1"
    monkeypatch.chdir(tmp_path / "outputs" / "day")
    with pytest.raises(UftError, match="no run here has a model or a checkpoint"):
        newest_weights()


def test_status_follows_the_result_and_the_lock(run: Run):
    assert run.status == "interrupted"
    write_json(run.path / "result.json", {"status": "finished", "steps": 7, "final": {"eval/nll": 0.5}})
    assert run.status == "finished"
    known = {"name": "run", "path": str(run.path), "status": "finished", "steps": 7, "eval/nll": 0.5}
    assert dict(summary(run)) == known
    process = holder(run)
    try:
        assert run.status == "running"
        with pytest.raises(UftError, match="another process"), run.lock():
            pass
    finally:
        process.kill()
        process.wait()
    assert run.status == "finished"  # the lock of a dead process holds nothing
    with run.lock():
        assert run.locked()


def test_asking_whether_a_run_is_held_does_not_hold_it(run: Run):
    """`uft ls` in a loop beside a sweep must not make any of its jobs fail."""
    with run.lock():
        pass
    looking = threading.Event()
    watcher = threading.Thread(target=lambda: [run.locked() for _ in iter(looking.is_set, True)])
    watcher.start()
    try:
        for _ in range(100):
            with run.lock():
                pass
    finally:
        looking.set()
        watcher.join()


@pytest.mark.skipif(sys.platform != "linux", reason="who the parent of a process is now is read from /proc")
def test_a_holder_whose_launcher_died_is_an_orphan(run: Run):
    through = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', " + repr(HOLD) + ", sys.argv[1]]).wait()"
    launcher = holder(run, through)
    try:
        assert run.locked()
        assert not run.orphaned()
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 5
        while not run.orphaned() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert run.locked()
        assert run.orphaned()
    finally:
        os.kill(int((run.path / ".lock").read_text().split()[0]), signal.SIGKILL)
