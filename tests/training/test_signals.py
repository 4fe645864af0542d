"""Signals set a flag; a second Ctrl-C does not wait for it to be seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from uft.errors import INTERRUPTED, STOPPED
from uft.training.liveness import SIGNALS, Stop, listening

CODES = {signal.SIGTERM: STOPPED, signal.SIGUSR1: STOPPED, signal.SIGUSR2: STOPPED, signal.SIGINT: INTERRUPTED}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_has_its_exit_code(number: signal.Signals) -> None:
    with listening() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert (stop.name, stop.exit_code) == (number.name, CODES[number])


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), listening():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_still_waits_for_the_safe_point() -> None:
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.exit_code == STOPPED


def test_nobody_asked() -> None:
    assert not Stop()()
    assert Stop().name == ""


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    program = (
        "import os, signal\n"
        "from uft.training.liveness import listening\n"
        "with listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not any more', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (INTERRUPTED, "still here\n")
