"""GPUs that runs share out: never one for two, free again when their holder is gone, and told to the child alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from uft.launch.slots import slots

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from uft.launch.slots import slots
with slots({"pool": [0, 1], "processes": int(sys.argv[1])}) as chosen:
    print(chosen["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def holder(count: int) -> tuple[subprocess.Popen[str], str]:
    """A process that holds `count` GPUs, and which."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(count)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_two_of_two_then_none_until_one_dies() -> None:
    first, one = holder(1)
    second, other = holder(1)
    found: list[str] = []

    def third() -> None:
        with slots({"pool": [0, 1], "processes": 1}) as chosen:
            found.append(chosen["CUDA_VISIBLE_DEVICES"])

    waiting = threading.Thread(target=third)
    try:
        assert {one, other} == {"0", "1"}
        waiting.start()
        time.sleep(1.5)
        assert not found
        second.send_signal(signal.SIGKILL)
        waiting.join(timeout=300)
        assert found == [other]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_run_of_several_takes_all_or_waits() -> None:
    process, held = holder(2)
    try:
        assert held == "0,1"
        done: list[str] = []

        def both() -> None:
            with slots({"pool": [0, 1], "processes": 2}) as chosen:
                done.append(chosen["CUDA_VISIBLE_DEVICES"])

        waiting = threading.Thread(target=both)
        waiting.start()
        time.sleep(1)
        assert not done
    finally:
        process.kill()
        process.communicate()
    waiting.join(timeout=300)
    assert done == ["0,1"]


def test_no_pool_and_a_scheduler_that_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    with slots({"pool": None}) as chosen:
        assert chosen == {}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with slots({"pool": [0]}) as chosen:
        assert chosen == {}


WORKER = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[1])
(run / "seen.json").write_text(json.dumps({"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "from": time.time()}))
time.sleep(1.5)
seen = json.loads((run / "seen.json").read_text())
(run / "seen.json").write_text(json.dumps(seen | {"to": time.time()}))
(run / "result.json").write_text(json.dumps({"status": "finished", "final": {}, "steps": 1}))
"""


@pytest.mark.slow
def test_a_multirun_never_gives_one_gpu_to_two_jobs(tmp_path: Path) -> None:
    """Four runs over two pretended GPUs, started by joblib in three processes at a time."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="extra [joblib] is not installed")
    (tmp_path / "worker.py").write_text(WORKER)
    # joblib's processes import the task anew: the stand-in must be there for them too
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('STAND_IN'):\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    from uft.launch import process\n"
        f"    process.COMMAND = (sys.executable, {str(tmp_path / 'worker.py')!r})\n"
    )
    words = ["train", "hardware=local_pool", "hardware.pool=[0,1]", "hydra.launcher.n_jobs=3", "seed=1,2,3,4"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UFT_", "SLURM_"))}
    environment |= {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "STAND_IN": "1", "WANDB_MODE": "offline"}
    environment |= {"TMPDIR": str(tmp_path), "UFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "uft", *words, "sweep.name=pool", "hardware.device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("seen.json"))]
    assert len(seen) == 4
    assert {one["gpus"] for one in seen} == {"0", "1"}
    for gpu in "01":
        times = sorted((one["from"], one["to"]) for one in seen if one["gpus"] == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(times))
