"""A W&B server in trouble: training does not wait for it, the local files are whole, and `uft sync` sends the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from evidence import written
from requests_of import SINGLE
from sessions import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
from standin import KEY, Standin

from uft.runs import Run
from uft.tracking.metrics import read_metrics
from uft.tracking.wandb import unsent

NewRun = Callable[..., Run]
STEPS = 60
WORDS = (*SINGLE, f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=30")


@pytest.fixture
def server() -> Iterator[Standin]:
    standin = Standin()
    yield standin
    standin.broken = True
    standin.close()


def variables(server: Standin, environment: dict[str, str]) -> dict[str, str]:
    return environment | {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "WANDB__DISABLE_STATS": "true",
        "WANDB_DISABLE_GIT": "true",
    }


def logged(run: Run) -> int:
    return max((line["step"] for line in read_metrics(run)), default=-1)


def steps_on(server: Standin, run: Run) -> list[int]:
    return sorted({row["step"] for row in server.history.get(run.info()["id"], []) if "step" in row})


def break_(server: Standin) -> None:
    server.broken = True


def slow_down(server: Standin) -> None:
    server.slow = 2.0


def kill(server: Standin) -> None:
    server.broken = True
    server.close()


def nothing(server: Standin) -> None:
    """It never gets well."""


def mend(server: Standin) -> None:
    server.broken = False


TROUBLES: dict[str, tuple[Callable[[Standin], None], Callable[[Standin], None]]] = {
    "500 for a while": (break_, mend),
    "slow": (slow_down, nothing),
    "dead": (kill, nothing),
}
"""What happens in the middle, and once the last step was logged."""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble(
    bench: Bench, new_run: NewRun, server: Standin, environment: dict[str, str], tmp_path: Path, trouble: str
) -> None:
    begin, end = TROUBLES[trouble]
    plain, run = new_run("plain", *WORDS), new_run("run", *WORDS, "tracking.mode=online")
    assert bench.sit(plain.path).code == 0
    session = bench.start(run.path, **variables(server, environment))
    wait_until(lambda: logged(run) >= STEPS // 3)
    begin(server)
    wait_until(lambda: logged(run) >= STEPS)
    end(server)
    ended = session.wait()
    assert ended.code == 0, ended.said
    result = run.result()
    assert result["seconds"] < 3 * plain.result()["seconds"] + 5  # of training: it did not wait
    ours, theirs = written(run.path), written(plain.path)
    assert (ours["curve"], ours["samples"], ours["models"]) == (theirs["curve"], theirs["samples"], theirs["models"])
    if trouble == "dead":
        assert unsent(run)
        assert "uft sync" in ended.said
        server = Standin()
        synced = sync(run, variables(server, environment))
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert "arrived" in synced.stdout
    assert steps_on(server, run) == list(range(STEPS + 1))
    server.close()


def sync(run: Run, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uft", "sync", str(run.path)]
    kept = {name: value for name, value in environment.items() if name != "WANDB_MODE"}
    return subprocess.run(command, env=os.environ | kept, capture_output=True, text=True, timeout=900, check=False)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
