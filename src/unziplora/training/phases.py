"""Phases that precede the training of a run: counted, saved and stopped on request like the training itself."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unziplora.errors import Interrupted, NonFiniteLoss
from unziplora.utils.signals import stop_requests


class Phase(ABC):
    """Something that is learned step by step, whose whole state can be saved and restored between steps."""

    name: str
    steps: int

    @abstractmethod
    def step(self, number: int) -> float:
        """Do one step, 0 ≤ number < steps; return its loss."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, numbers and tensors for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""


@dataclass
class Phases:
    """The phases of one run, one after the other.

    Attributes:
        states: steps done and state of each phase so far, by its name; those of a checkpoint are continued.
        report: called after every step with the steps done in all phases, the loss and the seconds.
        save: called when a checkpoint is due, at the end of a phase and when asked to stop.
        every: steps between checkpoints; 0: only at the end.
        stopped: makes the exception for a run that was asked to stop.
        done: steps done in all phases.
    """

    states: dict[str, Any] = field(default_factory=dict)
    report: Callable[[int, float, float], object] = lambda done, loss, seconds: None
    save: Callable[[], object] = lambda: None
    every: int = 0
    stopped: Callable[[str], Exception] = Interrupted
    done: int = 0

    def learn(self, phase: Phase) -> None:
        """Do the steps of a phase that its checkpoint has not done, or stop on request."""
        start = 0
        if phase.name in self.states:
            start = self.states[phase.name]["done"]
            phase.load_state_dict(self.states[phase.name]["state"])
        self.done += start
        with stop_requests() as stopped:
            for number in range(start, phase.steps):
                begin = time.perf_counter()
                loss = phase.step(number)
                if not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"step {number} of {phase.name}: the loss is {loss}. Start a new run with a lower rate for it"
                    )
                self.done += 1
                self.report(self.done, loss, time.perf_counter() - begin)
                done = number + 1
                if done == phase.steps or stopped.is_set() or (self.every and done % self.every == 0):
                    self.states[phase.name] = {"done": done, "state": phase.state_dict()}
                    self.save()
                if stopped.is_set():
                    raise self.stopped(f"stopped after step {done} of {phase.steps} of {phase.name}, checkpoint saved")
