"""The one training loop: a method provides parameters and losses, the loop does everything else."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from unziplora.config.training import TrainingConfig
from unziplora.errors import NonFiniteLoss
from unziplora.training.method import Trainable
from unziplora.training.optimizers import make_optimizers, make_schedule
from unziplora.utils.signals import STOP, caught, stop_requests


@dataclass(frozen=True)
class StepReport:
    """Report of one step; `done` counts the steps so far."""

    done: int
    loss: float
    learning_rate: float
    seconds: float


class Trainer:
    """A method with its optimizers, whose whole state can be saved and restored between steps; fp16 needs a scaler."""

    def __init__(self, method: Trainable, config: TrainingConfig, scaler: GradScaler | None = None) -> None:
        self.method, self.config, self.scaler = method, config, scaler
        self.groups = method.parameter_groups()
        self.optimizers = make_optimizers(self.groups, config)
        self.schedules = [
            make_schedule(optimizer, config.schedule, config.steps, config.schedule_warmup)
            for optimizer in self.optimizers
        ]

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return adapters, masks, scales, optimizers, schedules and loss scaler.

        Random states are not part of it, because the draws of a step depend on the seed and its number (see
        `generator`).
        """
        return {
            "method": self.method.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.method.load_state_dict(state["method"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_kept_fused(optimizer, saved))
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.scaler is not None and state["scaler"]:  # the run may have begun in another precision
            self.scaler.load_state_dict(state["scaler"])

    def step(self, step: int) -> StepReport:
        """Do one optimizer step.

        Raises:
            NonFiniteLoss: the loss is infinite or not a number.
        """
        start = time.perf_counter()
        self.method.before_step(step, 1.0 if self.scaler is None else self.scaler.get_scale())
        losses = []
        for loss in self.method.losses(step):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
        self.method.after_backward(step)
        self._clip()
        rate = float(self.schedules[0].get_last_lr()[0])
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            if self._optimize(optimizer):
                schedule.step()
            optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()
        self.method.after_step(step)
        # Last, because it waits for the GPU, which by now has received the whole step.
        total = sum(loss.item() for loss in losses)
        if not math.isfinite(total):
            raise NonFiniteLoss(f"step {step}: the loss is {total}")
        return StepReport(step + 1, total, rate, time.perf_counter() - start)

    def _clip(self) -> None:
        """Clip the gradients to the recipe's norm, after undoing the loss scale."""
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        clip_grad_norm_(parameters, self.config.max_grad_norm)

    def _optimize(self, optimizer: Optimizer) -> bool:
        """Step one optimizer; return False if the loss scaler skipped the step because fp16 overflowed.

        Fused optimizers receive the overflow and skip the step themselves; for them the schedule moves on.
        """
        if self.scaler is None:
            optimizer.step()
            return True
        steps: list[object] = []
        hook = optimizer.register_step_post_hook(lambda *_: steps.append(None))
        self.scaler.step(optimizer)
        hook.remove()
        return bool(steps)


def _kept_fused(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with this machine's choice of fused steps: a run may change its device."""
    groups = [
        {**saved, "fused": own["fused"]} if "fused" in own else saved
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def train(
    trainer: Trainer,
    start: int,
    report: Callable[[StepReport], None],
    save: Callable[[int], None],
    show: Callable[[int], None],
) -> int:
    """Train from step `start` to the last, or until the process is asked to stop; return the steps done.

    Args:
        report: called after every step.
        save: called with the number of steps done when a checkpoint is due, at the end and when asked to stop.
        show: called with the number of steps done when a sample sheet or LoRAs to keep are due, again if resumed there.
    """
    config, done = trainer.config, start
    with stop_requests() as stopped:

        def show_if_due() -> None:
            if 0 < done < config.steps and (is_due(done, config.sample_every) or is_due(done, config.save_every)):
                try:
                    with caught(signal.default_int_handler, *STOP):  # a sheet takes long; a resumed run begins with it
                        show(done)
                except KeyboardInterrupt:
                    stopped.set()

        show_if_due()
        while done < config.steps and not stopped.is_set():
            report(trainer.step(done))
            done += 1
            if done == config.steps or is_due(done, config.checkpoint_every):
                save(done)  # also at the end, because the disk may be full when the LoRAs are written
            show_if_due()
        if done < config.steps and not is_due(done, config.checkpoint_every):
            save(done)
    return done


def is_due(done: int, every: int) -> bool:
    """Return True if something that happens every so many steps, or never if 0, is due after the steps done."""
    return bool(every) and done % every == 0
