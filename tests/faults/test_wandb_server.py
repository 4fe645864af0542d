"""A W&B server in trouble: training does not wait for it, the local files are whole, and `uft sync` sends the rest."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from evidence import written
from sessions import SINGLE

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
from standin import KEY, Standin

from uft.runs import Run
from uft.tracking.metrics import read_metrics
from uft.tracking.wandb import unsent

STEPS = 60
WORDS = (*SINGLE, f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=30")


@pytest.fixture
def server():
    standin = Standin()
    yield standin
    standin.broken = True
    standin.close()


def variables(server: Standin) -> dict[str, str]:
    return {
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


def kill(server: Standin) -> None:
    server.broken = True
    server.close()


def nothing(server: Standin) -> None:
    """It never gets well."""


TROUBLES = {
    "500 for a while": (
        lambda server: setattr(server, "broken", True),
        lambda server: setattr(server, "broken", False),
    ),
    "slow": (lambda server: setattr(server, "slow", 2.0), nothing),
    "dead": (kill, nothing),
}
"""What happens in the middle, and once the last step was logged."""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble(bench, new_run, server, uft, trouble):
    begin, end = TROUBLES[trouble]
    plain, run = new_run("plain", *WORDS), new_run("run", *WORDS, "tracking.mode=online")
    bench.sit(plain.path, code=0)
    session = bench.start(run.path, **variables(server))
    wait_until(lambda: logged(run) >= STEPS // 3)
    begin(server)
    wait_until(lambda: logged(run) >= STEPS)
    end(server)
    ended = session.wait()
    assert ended.code == 0, ended.said
    assert run.result()["seconds"] < 3 * plain.result()["seconds"] + 5  # of training: it did not wait
    ours, theirs = written(run.path), written(plain.path)
    assert (ours["curve"], ours["samples"], ours["models"]) == (theirs["curve"], theirs["samples"], theirs["models"])
    if trouble == "dead":
        assert unsent(run)
        assert "uft sync" in ended.said
        server = Standin()
        assert "arrived" in uft("sync", run.path, env=variables(server), timeout=900).stdout
    assert steps_on(server, run) == list(range(STEPS + 1))
    server.close()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
