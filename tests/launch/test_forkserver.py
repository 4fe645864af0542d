"""Workers that are forked: the same processes as those that are started, and isolated from each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uft.errors import FAILED, INTERRUPTED, STOPPED
from uft.launch import forkserver, process

JOB = (sys.executable, "-P", "-m", "forked_job")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are fork servers on Linux alone")


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`forked_job.py` stands in for the worker."""
    monkeypatch.setattr(process, "COMMAND", JOB)
    monkeypatch.setattr(forkserver, "WORKER", JOB)
    monkeypatch.setattr(forkserver, "FREE", (*forkserver.FREE, "PYTEST_"))  # it changes from fixture to test
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv(forkserver.SWITCH, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[forkserver.Server]:
    """A server that workers are forked from, warm."""
    with forkserver.forkserver():
        assert process.run_worker(["exit", "0"]) == 0
        server = forkserver.Current.server
        assert server is not None
        yield server


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_fork_is_the_process_that_a_start_is(
    server: forkserver.Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("UFT_SAMPLE", "söme\nvalue")
    found = []
    for current in (server, None):
        with monkeypatch.context() as context:
            context.setattr(forkserver.Current, "server", current)
            assert process.run_worker(["describe", "a word"], cwd=elsewhere, more={"CUDA_VISIBLE_DEVICES": "1"}) == 0
        said, handler = capfd.readouterr().out.splitlines()
        assert handler == "an exit handler"
        found.append(json.loads(said))
    forked, started = found
    started["main"] = "forked_job"  # `__main__`, of the same file
    assert forked == started
    assert forked["parent"] == os.getpid()
    assert forked["leads a session"]
    assert forked["environment"]["CUDA_VISIBLE_DEVICES"] == "1"


def test_streams(server: forkserver.Server, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a line\n")
    environment = {**os.environ, "PYTHONPATH": process.python_path()}
    with open("in") as stdin, open("out", "w") as stdout, open("err", "w") as stderr:
        streams = (stdin.fileno(), stdout.fileno(), stderr.fileno())
        child = server.fork(JOB[-1], ["ask"], environment, None, streams)
        assert child is not None
        assert child.wait() == 0
    assert Path("out").read_text() == "a line was read\n"
    assert Path("err").read_text() == "a complaint\n"
    process.run_worker(["ask"], log=tmp_path / "console.log")
    assert Path("console.log").read_text() == "a complaint\n"  # as of a job of a sweep


def test_ends(server: forkserver.Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit codes, exceptions, SIGKILL and a crash: each is told as of a process that was started, and the next job of
    the server is none the worse."""
    assert process.run_worker(["exit", "75"]) == 75
    assert process.run_worker(["raise"]) == 1
    assert "ValueError: it broke" in capfd.readouterr().err
    assert process.run_worker(["leave"]) == 1
    assert capfd.readouterr().err == "in words\n"
    assert process.run_worker(["kill"]) == FAILED
    assert "uft: the worker was killed by SIGKILL (sent from outside, or by the kernel" in capfd.readouterr().err
    assert process.run_worker(["crash"]) == FAILED
    assert "uft: the worker was killed by SIGSEGV (a crash" in capfd.readouterr().err
    assert process.run_worker(["exit", "0"]) == 0
    assert forkserver.Current.server is server


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, INTERRUPTED)])
def test_signals_are_forwarded(server: forkserver.Server, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """One that the job answers, and one that ends it."""

    def send() -> None:
        wait_for(lambda: (tmp_path / "ready").exists())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert process.run_worker(["wait", str(tmp_path / "ready")]) == code
    thread.join()


def test_a_signal_does_not_wait_for_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that comes while the server still imports: as while a worker does."""
    (tmp_path / "slow_job.py").write_text(
        "import time\nfrom pathlib import Path\ndef preload():\n    Path('slow').touch()\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    time.sleep(60)\n"
    )
    for module in (process, forkserver):
        name = "COMMAND" if module is process else "WORKER"
        monkeypatch.setattr(module, name, (*JOB[:-1], "slow_job"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def send() -> None:
        wait_for(lambda: (tmp_path / "slow").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    began = time.monotonic()
    with forkserver.forkserver():
        assert process.run_worker([]) == STOPPED
    assert time.monotonic() - began < 20


def test_where_a_fork_would_be_another_it_is_started(
    server: forkserver.Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": process.python_path()}
    assert forkserver.server_for([*JOB, "exit"], environment) is server
    assert forkserver.server_for([*process.AGENT, "exit"], environment) is None  # several processes
    assert forkserver.server_for([*JOB, "exit"], environment | {"OMP_NUM_THREADS": "7"}) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process.run_worker(["describe"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0])["environment"]["OMP_NUM_THREADS"] == "7"


def test_without_its_server_a_sweep_goes_on(server: forkserver.Server) -> None:
    server.process.send_signal(signal.SIGKILL)
    for _ in range(2):
        assert process.run_worker(["exit", "3"]) == 3
    assert forkserver.Current.server is None


def test_no_server_is_left(server: forkserver.Server) -> None:
    with forkserver.forkserver():  # within another one: nothing of its own
        assert forkserver.Current.server is server
    assert server.process.poll() is None


LAUNCHER = """\
import sys
from uft.launch import forkserver, process
process.COMMAND = forkserver.WORKER = (sys.executable, "-P", "-m", "forked_job")
with forkserver.forkserver():
    process.run_worker(["exit", "0"])
    print(forkserver.Current.server.process.pid, flush=True)
    process.run_worker(["wait", sys.argv[1]])
"""


def test_a_launcher_that_is_killed_takes_its_job_and_its_server_along(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{process.python_path()}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "ready")]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    server = int(launcher.stdout.readline())
    wait_for(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text())
    job = int((tmp_path / "ready").read_text())
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_for(lambda: not alive(job) and not alive(server))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
