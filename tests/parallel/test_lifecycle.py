"""The program with `hardware=cpu2`: it ends like one process, dies with a cause, stops with a checkpoint, and goes on,
also with another number of processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import program as programs
import pytest
from cases import overrides, write_files
from outside import environment

STEPS = 30
CLOCKS = {"seconds", "tokens_per_second", "mfu"}
MORE = (f"train.steps={STEPS}", "train.checkpoint_every=5", "train.batch_size=5")
Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_files(folder)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """start("train", ...): the program; killed at the end if it still lives."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "uft", *arguments]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(programs.Popen(command, cwd=folder, env=environment(folder), **streams))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def request(folder: Path, run: str, hardware: str) -> list[str]:
    wanted = overrides("dft", ("demonstrations", "negatives"), folder, MORE)
    return ["train", *(word for word in wanted if word != "hardware=cpu"), f"hardware={hardware}", f"run.dir={run}"]


def ended(process: subprocess.Popen[str], code: int) -> str:
    said: str = process.communicate(timeout=600)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """The curve of one undisturbed process."""
    command = [sys.executable, "-m", "uft", *request(folder, "whole", "cpu")]
    programs.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True, timeout=600)
    return curve(folder / "whole")


def curve(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def same(ours: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    for line, other in zip(ours, whole, strict=True):
        for key in other.keys() - CLOCKS:
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (line["step"], key)


def children(parent: int) -> list[int]:
    """Living child processes, without the fork server."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has just ended
            name, _, rest = file.read_text().rpartition(")")
            state, above = rest.split()[:2]
            if int(above) == parent and state != "Z" and not name.endswith("uft-forkserver"):
                found.append(int(file.parent.name))
    return found


def processes(program: subprocess.Popen[str]) -> tuple[int, dict[int, int]]:
    """(the agent, rank -> process) of a running program."""
    (agent,) = children(program.pid)
    ranks = {}
    for child in children(agent):
        words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(word[5:]): child for word in words if word.startswith(b"RANK=")}
    return agent, ranks


def at_step(run: Path, step: int, program: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").is_file() or not any(line["step"] >= step for line in curve(run)):
        assert program.poll() is None, program.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_one_of_two_is_killed(start: Start, folder: Path, whole: list[dict[str, Any]], then: int) -> None:
    """The run ends soon, says which process died of what, goes on, on one process or two, and has the curve of one."""
    run = folder / f"killed-{then}"
    program = start(*request(folder, run.name, "cpu2"))
    at_step(run, 7, program)
    agent, ranks = processes(program)
    assert sorted(ranks) == [0, 1]
    asked = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    said = ended(program, 1)
    assert time.monotonic() - asked < 60 or os.getloadavg()[0] > 4
    assert "process 1 was killed by SIGKILL" in said
    result = result_of(run)
    assert result["status"] == "failed"
    assert "process 1 was killed by SIGKILL" in result["error"]
    assert not children(agent)
    ended(start("resume", run.name, f"hardware.processes={then}"), 0)
    same(curve(run), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "number"), [("program", signal.SIGTERM), ("rank 1", signal.SIGUSR2)])
def test_stopped_and_gone_on_with(
    start: Start, folder: Path, whole: list[dict[str, Any]], to: str, number: signal.Signals
) -> None:
    """A signal to the program, or to one process alone, is everybody's: a checkpoint, exit code 75. Then one process
    goes on with what two began."""
    name = f"stopped-{number.name}"
    program = start(*request(folder, name, "cpu2"))
    at_step(folder / name, 4, program)
    _, ranks = processes(program)
    os.kill(program.pid if to == "program" else ranks[1], number)
    ended(program, 75)
    result = result_of(folder / name)
    assert result["status"] == "stopped"
    assert 4 <= result["steps"] < STEPS
    assert (folder / name / "checkpoints" / f"step-{result['steps']:06d}").is_dir()
    ended(start("resume", name, "hardware.processes=1"), 0)
    same(curve(folder / name), whole)


@pytest.mark.slow
def test_two_go_on_with_what_one_began(start: Start, folder: Path, whole: list[dict[str, Any]]) -> None:
    program = start(*request(folder, "grown", "cpu"))
    at_step(folder / "grown", 4, program)
    program.send_signal(signal.SIGTERM)
    ended(program, 75)
    ended(start("resume", "grown", "hardware.processes=2"), 0)
    same(curve(folder / "grown"), whole)


@pytest.mark.slow
def test_a_bad_request_is_told_once(start: Start, folder: Path) -> None:
    program = start(*request(folder, "bad", "cpu2"), "train.max_length=5", "data.too_long=error")
    said = ended(program, 2)
    assert said.count("problem") == 1
    assert not (folder / "bad").exists()


@pytest.mark.slow
def test_they_end_when_the_program_is_killed(start: Start, folder: Path) -> None:
    """By SIGKILL, even: they save a checkpoint and end, and the next session waits for that."""
    program = start(*request(folder, "orphans", "cpu2"), "train.steps=100000")
    at_step(folder / "orphans", 4, program)
    agent, _ = processes(program)
    program.kill()
    deadline = time.monotonic() + 300
    while Path(f"/proc/{agent}").exists() and children(agent):
        assert time.monotonic() < deadline, "they go on without the program"
        time.sleep(0.1)
    assert result_of(folder / "orphans")["status"] == "stopped"


@pytest.mark.slow
def test_two_machines_by_hand(start: Start, folder: Path, whole: list[dict[str, Any]]) -> None:
    """Two programs that are told of each other, in one folder: as good as two machines. Then again, after a stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"hardware.rendezvous=127.0.0.1:{free.getsockname()[1]}"
    several = ("hardware.processes=1", "hardware.nodes=2", meeting)
    words = [*request(folder, "machines", "cpu2"), *several]
    second, first = (start(*words, f"hardware.node_rank={rank}") for rank in (1, 0))
    at_step(folder / "machines", 4, first)
    second.send_signal(signal.SIGTERM)
    ended(second, 75)
    ended(first, 75)
    again = [start(*words, f"hardware.node_rank={rank}") for rank in (0, 1)]
    for program in again:
        ended(program, 0)
    same(curve(folder / "machines"), whole)
