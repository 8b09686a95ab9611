"""Threads that repeat something beside a long job."""

import threading

from unziplora.utils.threads import Periodic


class Countdown(Periodic):
    """Ends by itself after some ticks."""

    def __init__(self, ticks: int) -> None:
        super().__init__(0.001)
        self.left, self.done = ticks, threading.Event()

    def tick(self) -> bool:
        self.left -= 1
        if not self.left:
            self.done.set()
        return self.left != 0


def test_ticks_until_it_says_that_it_ends() -> None:
    with Countdown(3) as countdown:
        assert countdown.done.wait(10)
    assert countdown.left == 0


def test_no_tick_after_the_context() -> None:
    with Countdown(-1) as countdown:
        pass
    left = countdown.left
    assert not countdown.done.wait(0.02)
    assert countdown.left == left
