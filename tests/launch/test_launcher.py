"""From a configuration to a run folder and a worker (a stand-in that takes milliseconds)."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path

import program
import pytest
import yaml
from standin import KEY, Standin

from uft.config.compose import compose
from uft.errors import UftError
from uft.launch import launcher
from uft.launch.launcher import commit_of, launch_job, launch_train, single_run_dir
from uft.runs import Run, find_runs

BASE = ("tracking=none", "objective=sft", "train.steps=200")


def train(*overrides, script="ok"):
    cfg = compose([*BASE, f"generate.system={script}", *overrides])
    return launch_train(cfg, list(overrides))


def sittings(run: Run) -> list[str]:
    return (run.path / "sittings").read_text().split()


def test_a_run_folder_holds_what_was_asked(worker, capsys):
    assert train("seed=3", "optim.lr=0.5") == 0
    (run,) = find_runs(worker / "outputs")
    config = run.config()
    assert run.name.startswith("sft-mix-playground-seed3-")
    assert config["run"]["name"] == run.name
    assert (config["seeds"]["data"], config["optim"]["lr"], config["run"]["dir"]) == (3, 0.5, None)
    assert run.overrides() == ["seed=3", "optim.lr=0.5"]
    info = run.info()
    assert info["versions"]["uft"]
    assert info["versions"]["torch"]
    assert info["cwd"] == str(worker)
    assert info["command"]
    assert run.status == "finished"
    assert train("run.dir=here/it/is") == 0
    assert Run(worker / "here/it/is").status == "finished"
    assert train("run.name=mine") == train("run.name=mine") == 0
    assert "finished already" in capsys.readouterr().out
    named, _ = find_runs(worker / "outputs")
    assert (named.name, sittings(named)) == ("mine", ["ok"])


@pytest.mark.slow
def test_every_field_of_run_json_that_something_reads_is_written(tmp_path, uft):
    uft("train", "debug=fast", "objective=sft", "tracking.mode=offline", "run.dir=run")
    info = Run(tmp_path / "run").info()
    read = ("id", "cwd", "versions", "code", "sweep", "total_steps", "data_digest", "device", "torch", "wandb")
    assert set(read) <= info.keys()
    assert info["code"].get("commit") == commit_of(Path(launcher.__file__).parent).get("commit")


@pytest.mark.slow
def test_a_fork_takes_no_folder_of_w_and_b_from_the_next_one(tmp_path, uft):
    """wandb's temporary folders are those of the process that imported it, and go with it."""
    server = Standin()
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    for name in ("one", "two"):
        done = uft("train", "debug=fast", "objective=sft", "tracking.mode=online", f"run.dir={name}", env=online)
        assert "did not take everything" not in done.stdout + done.stderr
        assert Run(tmp_path / name).info()["wandb"]["sent"]
    server.close()


def test_bad_rows_are_told_by_the_real_worker_and_leave_nothing_behind(tmp_path, uft):
    folder = tmp_path / "here"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\nnot json\n')
    words = ("data=files", "+data.sources.mine.path=rows.jsonl", "+data.sources.other.path=nowhere.jsonl")
    err = uft("train", *BASE, *words, "data.holdout=0", "run.dir=some/where", code=2, cwd=folder).stderr
    assert err.startswith("uft: 3 problems in this request\n")
    for part in ("rows.jsonl:2", "rows.jsonl:3", "nowhere.jsonl", "data.bad_rows=drop"):
        assert part in err
    assert list(folder.iterdir()) == [rows]


def test_a_request_that_is_refused_before_step_0_leaves_nothing_behind(worker):
    assert train(script="refuse") == train("run.dir=a/b", script="refuse") == 2
    assert list(worker.iterdir()) == []
    (worker / "mine" / "empty").mkdir(parents=True)
    assert train("run.dir=mine/empty", script="refuse") == train("run.dir=mine/new/x", script="refuse") == 2
    assert list(worker.rglob("*")) == [worker / "mine", worker / "mine" / "empty"]


def test_failures_keep_their_folder_and_can_be_tried_again(worker, capfd):
    for script, code, status in (("fail", 1, "failed"), ("die", 1, "interrupted"), ("late_refusal", 2, "failed")):
        assert train(f"run.name={script}", script=script) == code
        (run,) = [run for run in find_runs(worker / "outputs") if run.name == script]
        assert run.status == status
        assert ("SIGKILL" in capfd.readouterr().err) == (script == "die")
        assert train(f"run.name={script}") == 0
        assert sittings(run) == [script, "ok"]


def test_a_run_goes_on_under_the_configuration_it_began_with(worker):
    """Another one is refused with the difference, free keys may change, and a key that came with a newer version
    counts with its default. A run at work is not disturbed."""
    train("run.name=x", script="fail")
    (run,) = find_runs(worker / "outputs")
    with pytest.raises(UftError) as caught:
        train("run.name=x", "optim.lr=0.5", "train.steps=7", "tracking=offline")
    assert caught.value.code == 2
    assert {p.what: p.why for p in caught.value.problems} == {"optim.lr": "0.001 -> 0.5", "train.steps": "200 -> 7"}
    assert run.config()["optim"]["lr"] == 0.001
    with run.lock(), pytest.raises(UftError, match="another process"):
        train("run.name=x")
    config = run.config()
    del config["model"]["attention"], config["objective"]["min_score"]
    run.config_file.write_text(yaml.safe_dump(config))
    assert train("run.name=x", "tracking=offline", "train.log_every=3") == 0
    assert (run.config()["tracking"]["mode"], run.config()["train"]["log_every"]) == ("offline", 3)


def test_the_run_of_another_process_that_was_quicker_is_not_taken_away(worker, monkeypatch):
    """Two commands for one folder at once: the second one's worker is refused by the first one's lock."""
    held = ExitStack()
    monkeypatch.setattr(launcher, "run_worker", lambda *given: held.enter_context(Run(Path(given[0][0])).lock()) or 2)
    with held:
        assert train("run.name=x") == 2
        (run,) = find_runs(worker / "outputs")
        assert run.status == "running"


@pytest.fixture
def meanwhile(monkeypatch):
    """meanwhile(*overrides): another process trains these between the launcher's look for the folder and its making."""
    real = launcher.refuse_unwritable

    def other_process(*overrides):
        def refuse_unwritable(folder):
            monkeypatch.setattr(launcher, "refuse_unwritable", real)
            assert train(*overrides) == 0

        monkeypatch.setattr(launcher, "refuse_unwritable", refuse_unwritable)

    return other_process


def test_a_run_that_another_process_made_meanwhile_is_continued_or_refused(worker, meanwhile):
    meanwhile("run.name=x", "optim.lr=0.5")
    with pytest.raises(UftError, match=r"optim\.lr"):
        train("run.name=x", "optim.lr=0.25")
    (run,) = find_runs(worker / "outputs")
    assert (run.config()["optim"]["lr"], sittings(run)) == (0.5, ["ok"])


def test_runs_that_begin_in_the_same_second_do_not_share_a_folder(worker, monkeypatch, meanwhile):
    monkeypatch.setattr(launcher, "single_run_dir", partial(single_run_dir, now=datetime(2026, 1, 1)))
    meanwhile("optim.lr=0.5")
    assert train("optim.lr=0.25") == train("optim.lr=0.125") == 0
    found = {run.config()["optim"]["lr"]: run.config()["run"]["name"] for run in find_runs(worker / "outputs")}
    assert [found[lr] for lr in (0.25, 0.125)] == [f"{found[0.5]}-2", f"{found[0.5]}-3"]


def test_the_folder_of_a_run(worker):
    """`run.dir`, the run of a name that was chosen, or a new folder named by what is trained and when."""
    config = {"run": {"name": None, "dir": None}, "objective": {"name": "ift"}, "data": {"name": "mix"}}
    config |= {"model": {"name": "play/ground"}, "seed": 3}
    now = datetime(2026, 11, 21, 9, 8, 7)
    folder = single_run_dir(config, now)
    assert folder == Path("outputs/2026-11-21/ift-mix-play-ground-seed3-090807")
    folder.mkdir(parents=True)
    assert single_run_dir(config, now).name == f"{folder.name}-2"
    assert single_run_dir({**config, "run": {"name": folder.name, "dir": None}}, now) == folder
    assert single_run_dir({**config, "run": {"name": None, "dir": "a/b"}}, now) == Path("a/b")
    assert single_run_dir({**config, "stages": {"sft": {}, "dpo": {}}}, now).name.startswith("sft-then-dpo-play-ground")
    rounds = {"rounds": 2, "stages": {f"{stage}-{number}": {} for number in (1, 2) for stage in ("ask", "fit")}}
    assert single_run_dir({**config, **rounds}, now).name.startswith("ask-then-fit-2rounds-play-ground")


def test_a_folder_with_other_things_in_it_is_refused_and_a_half_made_one_made_anew(worker):
    for name, file in (("papers", "thesis.tex"), ("half", "run.json")):
        (worker / name).mkdir()
        (worker / name / file).write_text("{}")
    with pytest.raises(UftError, match="not empty and is not a run"):
        train("run.dir=papers")
    assert [path.name for path in (worker / "papers").iterdir()] == ["thesis.tex"]
    assert train("run.dir=half") == 0


def test_jobs_without_a_run_leave_nothing(worker, capfd):
    assert launch_job("check", compose([*BASE, "model.path=org/name"])) == 0
    assert "worker check" in (out := capfd.readouterr().out)
    assert "org/name" in out
    assert list(worker.iterdir()) == []


@pytest.fixture
def start(worker, environment):
    """start(*words): `uft WORDS` with the stand-in, once its worker waits; (process, run)."""
    started = []

    def start(*words):
        script = Path(__file__).with_name("uft_with_fake_worker.py")
        started.append(program.Popen([sys.executable, script, *words], cwd=worker, env=environment))
        for _ in range(2000):
            found = list((worker / "outputs").rglob("waiting"))
            if found and found[0].read_text():
                return started[-1], Run(found[0].parent)
            time.sleep(0.01)
        raise AssertionError("the worker did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_signal_reaches_the_worker_and_its_exit_code_passes(start):
    parent, run = start("train", *BASE, "generate.system=wait")
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(20) == 75
    assert run.status == "stopped"
    assert run.checkpoints()


def test_a_worker_that_a_signal_ends_at_once_counts_as_stopped(start):
    parent, run = start("train", *BASE, "generate.system=wait_raw")
    parent.send_signal(signal.SIGINT)
    assert parent.wait(20) == 130
    assert run.status == "interrupted"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_sweep_with_the_job(start, capfd, number, code):
    parent, run = start("train", "-m", *BASE, "generate.system=wait", "seed=1,2", "sweep.name=S")
    parent.send_signal(number)
    assert parent.wait(20) == code
    assert [r.name for r in find_runs(run.path.parent)] == ["sft-seed1"]
    said = capfd.readouterr().err
    assert "the sweep was stopped" in said
    assert ("stopping at the next safe point" in said) == (number == signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_worker_does_not_outlive_its_parent(start):
    parent, run = start("train", *BASE, "generate.system=wait_child")
    child = int((run.path / "waiting").read_text())
    parent.kill()
    parent.wait(20)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run.status == "stopped"
    assert run.checkpoints(), "SIGTERM, so a checkpoint, not SIGKILL"


def test_the_real_worker_is_found_from_anywhere(tmp_path):
    """The command line of the real worker, in a folder that has a module of a library's name in it."""
    (tmp_path / "transformers.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "empty").mkdir()
    code = "from uft.launch.process import run_worker; raise SystemExit(run_worker(['empty']))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no config.yaml and run.json in this folder: it is not a run" in done.stderr
