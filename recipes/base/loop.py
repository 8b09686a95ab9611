"""Training loop of all stages: steps, logs, checkpoints, stops, resumes.

All randomness of a step comes from (seed, step), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import signal
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.base.config import Recipe, StageSettings
from recipes.base.optimizers import MuonAdamW, trainable
from unziplora.errors import UserError

Figures = dict[str, float | Tensor]
"""Figures of a step for the log. Tensors are read only when the log is written, so that no step waits for a GPU."""


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reduced_precision(device: torch.device) -> bool:
    """Return true if bfloat16 is faster than float32: on a GPU and on a CPU with AVX-512 (else 16 times slower)."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def training_attention(device: torch.device | str, tokens: int) -> AbstractContextManager[None]:
    """Select the attention kernel for a forward pass that a backward pass follows.

    On a CPU, plain products: torch's fused kernel saves memory, but its backward pass takes several times as long.
    From about a thousand tokens on, memory matters more.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" and tokens <= 1024 else nullcontext()


class Stop:
    """Stop condition, true after SIGTERM or SIGINT, after some minutes, or from a time of day on (UTC, "HH:MM")."""

    def __init__(self, minutes: float | None = None, until: str | None = None):
        self.asked = False
        self.deadline = time.time() + 60 * minutes if minutes else None
        if until:
            hour, minute = (int(part) for part in until.split(":"))
            now = datetime.now(timezone.utc)
            at = now.replace(hour=hour, minute=minute, second=0, microsecond=0).timestamp()
            at += 86400 if at < now.timestamp() else 0
            self.deadline = min(at, self.deadline or at)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked or (self.deadline is not None and time.time() >= self.deadline)


class Stage(ABC):
    """A training stage: its modules, its data and its loss."""

    name: str
    settings: StageSettings
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer | MuonAdamW
    tokens = 0
    """Length of the longest sequence that any attention of the stage covers."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.device = pick_device()
        self.folder = recipe.output / self.name

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """Return the loss of a step and figures to log."""

    def after_step(self, step: int) -> None:  # noqa: B027
        """Run after each optimizer step, for averages of weights."""

    def report(self, step: int) -> None:  # noqa: B027
        """Write sheets of samples."""

    def finish(self) -> None:  # noqa: B027
        """Run once after the last step."""

    def draw(self, step: int) -> np.random.Generator:
        """Return the random numbers of a step, and seed torch for it."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + step)
        return np.random.default_rng((self.recipe.seed, step))


def rate(step: int, settings: StageSettings) -> float:
    """Return the factor on the learning rate: linear warm-up, constant, linear cool-down to 5 %."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    left = (settings.steps - step) / max(settings.cooldown * settings.steps, 1)
    return rise * max(0.05, min(1.0, left))


def save_checkpoint(stage: Stage, step: int) -> None:
    """Write weights and optimizer atomically to `checkpoint.pt`."""
    state = {"step": step, "optimizer": stage.optimizer.state_dict()}
    state["modules"] = {name: module.state_dict() for name, module in stage.modules.items()}
    stage.folder.mkdir(parents=True, exist_ok=True)
    temporary = stage.folder / "checkpoint.tmp"
    torch.save(state, temporary)
    os.replace(temporary, stage.folder / "checkpoint.pt")


def load_checkpoint(stage: Stage) -> int:
    """Restore a stage; return the number of finished steps, 0 without a checkpoint."""
    path = stage.folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=stage.device, weights_only=True)
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    stage.optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class Log:
    """Lines of JSON in `log.jsonl`, also printed."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"

    def write(self, **entry: object) -> None:
        line = json.dumps({"time": datetime.now(timezone.utc).strftime("%H:%M:%S"), **entry})
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")


def update(stage: Stage, step: int) -> Figures:
    """Take one optimizer step; return the figures of the stage."""
    for group in stage.optimizer.param_groups:
        group.setdefault("full_lr", group["lr"])
        group["lr"] = group["full_lr"] * rate(step, stage.settings)
    precision = torch.autocast(stage.device.type, torch.bfloat16, enabled=reduced_precision(stage.device))
    with precision, training_attention(stage.device, stage.tokens):
        loss, figures = stage.loss(step)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trainable(stage.modules), 1.0)
    if torch.isfinite(norm):
        stage.optimizer.step()
    stage.optimizer.zero_grad()
    stage.after_step(step)
    return figures


def train(stage: Stage, stop: Stop) -> bool:
    """Run a stage from its checkpoint to its last step; False when stopped before."""
    settings, log = stage.settings, Log(stage.folder)
    first = load_checkpoint(stage)
    if first > settings.steps:
        raise UserError(f"{stage.folder}: trained for {first} steps already, not {settings.steps}: name another output")
    started = saved = sampled = time.time()
    sums: Figures = {}
    for step in range(first, settings.steps):
        for key, value in update(stage, step).items():
            sums[key] = sums.get(key, 0.0) + value / settings.log_every
        if (step + 1) % settings.log_every == 0:
            speed = (step + 1 - first) * settings.batch / (time.time() - started)
            figures = {key: round(float(value), 4) for key, value in sums.items()}
            log.write(stage=stage.name, step=step + 1, **figures, speed=round(speed, 1))
            sums = {}
        if stop:
            save_checkpoint(stage, step + 1)
            log.write(stage=stage.name, stopped=step + 1)
            return False
        if time.time() - saved > 60 * settings.checkpoint_minutes:
            save_checkpoint(stage, step + 1)
            saved = time.time()
        if time.time() - sampled > 60 * settings.sample_minutes:
            stage.report(step + 1)
            sampled = time.time()
    save_checkpoint(stage, settings.steps)
    stage.report(settings.steps)
    stage.finish()
    return True
