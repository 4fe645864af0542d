"""Workers that are forked: the same processes as those that are started, and isolated from each other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from program import alive

from uft.errors import FAILED, INTERRUPTED, STOPPED
from uft.launch import forkserver, process

JOB = (sys.executable, "-P", "-m", "forked_job")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are fork servers on Linux alone")


@pytest.fixture(autouse=True)
def job(monkeypatch, tmp_path):
    """`forked_job.py` stands in for the worker."""
    monkeypatch.setattr(process, "COMMAND", JOB)
    monkeypatch.setattr(forkserver, "WORKER", JOB)
    monkeypatch.setattr(forkserver, "FREE", (*forkserver.FREE, "PYTEST_"))  # it changes from fixture to test
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv(forkserver.SWITCH, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server():
    """A server that workers are forked from, warm. None is left when its context ends."""
    with forkserver.forkserver():
        assert process.run_worker(["exit", "0"]) == 0
        server = forkserver.Current.server
        yield server
        with forkserver.forkserver():  # within another one: nothing of its own
            assert forkserver.Current.server in (server, None)
    assert server.process.poll() is not None


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_fork_is_the_process_that_a_start_is(server, tmp_path, capfd, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("UFT_SAMPLE", "söme\nvalue")
    found = []
    for current in (server, None):
        with monkeypatch.context() as context:
            context.setattr(forkserver.Current, "server", current)
            context.setattr(forkserver.Current, "wanted", False)
            variables = {"CUDA_VISIBLE_DEVICES": "1"}
            assert process.run_worker(["describe", "a word"], cwd=elsewhere, variables=variables) == 0
        said, handler = capfd.readouterr().out.splitlines()
        assert handler == "an exit handler"
        found.append(json.loads(said))
    forked, started = found
    started["main"] = "forked_job"  # `__main__`, of the same file
    assert forked == started
    assert forked["parent"] == os.getpid()
    assert forked["leads a session"]
    assert forked["environment"]["CUDA_VISIBLE_DEVICES"] == "1"


def test_streams(server, tmp_path):
    (tmp_path / "in").write_text("a line\n")
    environment = {**os.environ, "PYTHONPATH": process.python_path()}
    with open("in") as stdin, open("out", "w") as stdout, open("err", "w") as stderr:
        streams = (stdin.fileno(), stdout.fileno(), stderr.fileno())
        assert server.fork(JOB[-1], ["ask"], environment, None, streams).wait() == 0
    assert Path("out").read_text() == "a line was read\n"
    assert Path("err").read_text() == "a complaint\n"
    process.run_worker(["ask"], log=tmp_path / "console.log")
    assert Path("console.log").read_text() == "a complaint\n"  # as of a job of a sweep


def test_ends(server, capfd):
    """Exit codes, exceptions, SIGKILL and a crash: each is told as of a process that was started, and the next job of
    the server is none the worse."""
    for words, code, said in (
        (["exit", "75"], 75, ""),
        (["raise"], 1, "ValueError: it broke"),
        (["leave"], 1, "in words\n"),
        (["kill"], FAILED, "uft: the worker was killed by SIGKILL (sent from outside, or by the kernel"),
        (["crash"], FAILED, "uft: the worker was killed by SIGSEGV (a crash"),
        (["exit", "0"], 0, ""),
    ):
        assert process.run_worker(words) == code
        assert said in capfd.readouterr().err
    assert forkserver.Current.server is server


def test_signals_are_forwarded(server, tmp_path):
    """One that the job answers, and one that ends it."""
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, INTERRUPTED)):
        ready = tmp_path / f"ready-{number}"
        send_once(ready, number)
        assert process.run_worker(["wait", str(ready)]) == code


def send_once(there: Path, number: int) -> None:
    """Send this process a signal as soon as a file is there."""
    thread = threading.Thread(target=lambda: (wait_for(there.exists), os.kill(os.getpid(), number)))
    thread.start()


def test_a_signal_does_not_wait_for_the_server(monkeypatch, tmp_path):
    """One that comes while the server still imports: as while a worker does."""
    (tmp_path / "slow_job.py").write_text(
        "import time\nfrom pathlib import Path\ndef preload():\n    Path('slow').touch()\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(process, "COMMAND", (*JOB[:-1], "slow_job"))
    monkeypatch.setattr(forkserver, "WORKER", (*JOB[:-1], "slow_job"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    send_once(tmp_path / "slow", signal.SIGTERM)
    began = time.monotonic()
    with forkserver.forkserver():
        assert process.run_worker([]) == STOPPED
    assert time.monotonic() - began < 20


def test_where_a_fork_would_be_another_it_is_started(server, monkeypatch, capfd):
    environment = {**os.environ, "PYTHONPATH": process.python_path()}
    assert forkserver.server_for([*JOB, "exit"], environment) is server
    assert forkserver.server_for([*process.AGENT, "exit"], environment) is None  # several processes
    assert forkserver.server_for([*JOB, "exit"], environment | {"OMP_NUM_THREADS": "7"}) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process.run_worker(["describe"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0])["environment"]["OMP_NUM_THREADS"] == "7"


def test_without_its_server_a_sweep_goes_on(server):
    server.process.send_signal(signal.SIGKILL)
    for _ in range(2):
        assert process.run_worker(["exit", "3"]) == 3
    assert forkserver.Current.server is None


def test_it_can_be_done_without(monkeypatch):
    monkeypatch.setenv(forkserver.SWITCH, "off")
    with forkserver.forkserver():
        assert process.run_worker(["exit", "3"]) == 3
        assert forkserver.Current.server is None


LAUNCHER = """\
import sys
from uft.launch import forkserver, process
process.COMMAND = forkserver.WORKER = (sys.executable, "-P", "-m", "forked_job")
with forkserver.forkserver():
    process.run_worker(["exit", "0"])
    print(forkserver.Current.server.process.pid, flush=True)
    process.run_worker(["wait", sys.argv[1]])
"""


def test_a_launcher_that_is_killed_takes_its_job_and_its_server_along(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{process.python_path()}{os.pathsep}{Path(__file__).parent}"}
    command, ready = [sys.executable, "-c", LAUNCHER, str(tmp_path / "ready")], tmp_path / "ready"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        server = int(launcher.stdout.readline())
        wait_for(lambda: ready.exists() and ready.read_text())
        launcher.kill()
    wait_for(lambda: not alive(int(ready.read_text())) and not alive(server))
