"""Temporary signal handlers."""

import os
import signal

import pytest

from unziplora.utils.signals import STOP, caught


@pytest.mark.parametrize("number", STOP)
def test_requests_to_stop_are_handled_and_handlers_come_back(number: signal.Signals) -> None:
    before, received = signal.getsignal(number), []
    with caught(lambda number, _: received.append(number), *STOP):
        os.kill(os.getpid(), number)
    assert received == [number]
    assert signal.getsignal(number) == before


def test_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught(lambda *_: pytest.fail("handled"), *STOP):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
