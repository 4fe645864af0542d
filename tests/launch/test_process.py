"""GPUs that runs share: never one for two, free again when their holder is gone, and visible to the child alone."""

import json
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from uft.launch.process import gpu_pool

ROOT = Path(__file__).parents[2]
HOLDER = """
import time
from uft.launch.process import gpu_pool
with gpu_pool({"pool": [0, 1], "processes": 1}) as chosen:
    print(chosen["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def waiter(count: int) -> tuple[threading.Thread, list[str]]:
    """A thread that waits for `count` of two GPUs, and which it got."""
    found: list[str] = []

    def wait() -> None:
        with gpu_pool({"pool": [0, 1], "processes": count}) as chosen:
            found.append(chosen["CUDA_VISIBLE_DEVICES"])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(timeout=1)
    return thread, found


def test_a_run_waits_until_as_many_are_free_as_it_needs():
    one = {"pool": [0, 1], "processes": 1}
    with gpu_pool(one) as first:
        with gpu_pool(one) as second:
            assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
            third, found = waiter(1)
            assert not found
        third.join(timeout=300)
        assert found == ["1"]


def test_the_gpu_of_a_process_that_was_killed_is_free():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "0\n"
        both, found = waiter(2)
        assert not found
        holder.kill()
    both.join(timeout=300)
    assert found == ["0,1"]


def test_no_pool_and_a_scheduler_that_chose(monkeypatch):
    with gpu_pool({"pool": None}) as chosen:
        assert chosen == {}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with gpu_pool({"pool": [0]}) as chosen:
        assert chosen == {}


WORKER = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[1])
seen = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "from": time.time()}
time.sleep(1.5)
(run / "seen.json").write_text(json.dumps(seen | {"to": time.time()}))
(run / "result.json").write_text(json.dumps({"status": "finished", "final": {}, "steps": 1}))
"""
SITE = """
import os, sys
if os.environ.get('STAND_IN'):
    sys.path.insert(0, os.environ['STAND_IN_ROOT'])
    from uft.launch import process
    process.COMMAND = (sys.executable, os.environ['STAND_IN'])
"""


@pytest.mark.slow
def test_a_multirun_never_gives_one_gpu_to_two_jobs(tmp_path):
    """Four runs over two pretended GPUs, started by joblib in three processes at a time."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="extra [joblib] is not installed")
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)  # joblib's processes import the task anew
    words = ["train", "hardware=local_pool", "hardware.pool=[0,1]", "hydra.launcher.n_jobs=3", "seed=1,2,3,4"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UFT_", "SLURM_"))}
    environment |= {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "WANDB_MODE": "offline"}
    environment |= {"STAND_IN": str(tmp_path / "worker.py"), "STAND_IN_ROOT": str(ROOT), "TMPDIR": str(tmp_path)}
    environment |= {"UFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "uft", *words, "sweep.name=pool", "hardware.device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("seen.json"))]
    assert len(seen) == 4
    assert {one["gpus"] for one in seen} == {"0", "1"}
    for gpu in "01":
        times = sorted((one["from"], one["to"]) for one in seen if one["gpus"] == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(times))
