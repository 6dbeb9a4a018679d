"""Signals that ask a run to stop."""

import os
import signal
from collections.abc import Iterator

import pytest

from train.stop import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals as in a shell in front of its user: tests may run under nohup or in the background."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_remembered_and_the_old_handler_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts_at_once() -> None:
    """Who presses Ctrl-C twice does not want to wait for the save."""
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
