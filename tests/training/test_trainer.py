"""The training loop: loss scaling, checkpoints, losses that are not finite."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

from unziplora.errors import NonFiniteLoss
from unziplora.runs.folder import RunFolder
from unziplora.training.checkpoint import Checkpoint
from unziplora.training.runner import TrainingRun, autocast_for, make_scaler, peak_memory
from unziplora.training.trainer import Trainer


class Line:
    """A method with one weight, whose loss is a multiple of it."""

    def __init__(self, slopes: list[float]) -> None:
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.slopes = slopes

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "line", "params": [self.weight], "lr": 0.1, "weight_decay": 0.0}]

    def losses(self, step: int) -> list[Tensor]:
        return [(self.weight * self.slopes[step]).sum()]

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weight.data.copy_(state["weight"])

    def before_step(self, step: int, gradient_scale: float) -> None: ...

    def after_backward(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...


CONFIG: Any = SimpleNamespace(
    optimizer="adamw", betas=(0.9, 0.999), schedule="cosine", steps=4, schedule_warmup=1, max_grad_norm=1.0
)


def trained(slopes: list[float], scaler: GradScaler | None = None) -> Trainer:
    method: Any = Line(slopes)
    trainer = Trainer(method, CONFIG, scaler)
    for step in range(len(slopes)):
        trainer.step(step)
    return trainer


def test_loss_scale_of_a_power_of_two_changes_no_result() -> None:
    plain, scaled = trained([3.0, -1.0, 2.0]), trained([3.0, -1.0, 2.0], GradScaler("cpu", init_scale=1024.0))
    assert torch.equal(plain.method.state_dict()["weight"], scaled.method.state_dict()["weight"])


@pytest.mark.parametrize("kind", ["adamw", "prodigy"])
def test_one_scaler_serves_several_optimizers(kind: str) -> None:
    """Prodigy has one for each LoRA."""

    class Lines(Line):
        def __init__(self) -> None:
            super().__init__([3.0, -1.0, 2.0])
            self.other = torch.nn.Parameter(torch.full((1,), 2.0))

        def parameter_groups(self) -> list[dict[str, Any]]:
            (group,) = super().parameter_groups()
            return [{**group, "lr": 1.0}, {**group, "name": "other", "params": [self.other], "lr": 1.0}]

        def losses(self, step: int) -> list[Tensor]:
            return [((self.weight + self.other.square()) * self.slopes[step]).sum()]

    results = []
    for scaler in (None, GradScaler("cpu", init_scale=1024.0)):
        method: Any = Lines()
        trainer = Trainer(method, SimpleNamespace(**{**vars(CONFIG), "optimizer": kind}), scaler)
        for step in range(3):
            trainer.step(step)
        results.append((method.weight.item(), method.other.item()))
    assert len(trainer.optimizers) == (2 if kind == "prodigy" else 1)
    assert results[0] == results[1]


def test_run_that_began_on_another_device_steps_as_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(fused: bool) -> Trainer:
        monkeypatch.setattr(
            "unziplora.training.trainer.make_optimizers",
            lambda groups, config: [torch.optim.AdamW(groups, betas=config.betas, fused=fused)],
        )
        return trained([3.0, -1.0])

    here = make(True)
    here.load_state_dict(make(False).state_dict())
    assert [group["fused"] for optimizer in here.optimizers for group in optimizer.param_groups] == [True]


@pytest.mark.parametrize("fused", [True, False])
def test_overflow_skips_the_step_and_halves_the_scale(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(
        "unziplora.training.trainer.make_optimizers",
        lambda groups, config: [torch.optim.AdamW(groups, betas=config.betas, fused=fused)],
    )
    scaler = GradScaler("cpu", init_scale=2.0**127)
    trainer = trained([4.0], scaler)
    assert torch.equal(trainer.method.state_dict()["weight"], torch.ones(1))
    assert scaler.get_scale() == 2.0**126
    # a fused optimizer skips the step itself, so its schedule moves on
    assert trainer.schedules[0].last_epoch == int(fused)


def test_checkpoint_restores_optimizer_schedule_and_scaler(tmp_path: Path) -> None:
    slopes = [3.0, -1.0, 2.0, 0.5]
    whole = trained(slopes, GradScaler("cpu", init_scale=2.0))
    first = trained(slopes[:2], GradScaler("cpu", init_scale=2.0))
    with (tmp_path / "step").open("wb") as file:
        Checkpoint(2, first.state_dict(), {}).write(file)
    method: Any = Line(slopes)
    second = Trainer(method, CONFIG, GradScaler("cpu"))
    torch.manual_seed(3)
    checkpoint = Checkpoint.read(tmp_path / "step")
    assert checkpoint is not None
    second.load_state_dict(checkpoint.state)
    assert torch.initial_seed() == 3
    for step in (2, 3):
        second.step(step)
    assert torch.equal(second.method.state_dict()["weight"], whole.method.state_dict()["weight"])
    assert second.schedules[0].get_last_lr() == whole.schedules[0].get_last_lr()


def test_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(NonFiniteLoss, match="step 1: the loss is nan"):
        trained([1.0, float("nan")])


class TestAdviceAfterDivergence:
    def advice(self, folder: Path, half: bool, weight: float) -> str:
        run, trainer = RunFolder(folder), trained([1.0])
        trainer.method.weight.data.fill_(weight)
        run.checkpoint(200, Checkpoint(200, trainer.state_dict(), {}).write)
        method: Any = SimpleNamespace(command="split")
        nothing: Any = None
        return TrainingRun(method, nothing, lambda _: None, run, nothing, nothing).after_divergence(half)

    def test_sound_checkpoint_continues_in_fp32(self, tmp_path: Path) -> None:
        text = self.advice(tmp_path, True, 1.0)
        assert (
            f"after step 200 is sound; continue from it in fp32:\n  unziplora split --resume --out {tmp_path}" in text
        )
        assert text.endswith("--precision fp32")

    def test_run_in_fp32_starts_again_because_learning_rates_stay(self, tmp_path: Path) -> None:
        assert self.advice(tmp_path, False, 1.0) == (
            "Start a new run, into another --out, with lower learning rates; a resumed run keeps its learning rates"
        )

    def test_checkpoint_that_is_not_finite_is_not_recommended(self, tmp_path: Path) -> None:
        assert "--resume" not in self.advice(tmp_path, True, float("nan"))


def test_half_precision_computes_under_autocast_and_fp16_scales_its_loss() -> None:
    cpu = torch.device("cpu")
    with autocast_for(cpu, torch.bfloat16)():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with autocast_for(cpu, torch.float32)():
        assert not torch.is_autocast_enabled("cpu")
    assert make_scaler(cpu, torch.bfloat16) is None
    assert make_scaler(cpu, torch.float16) is not None


def test_peak_memory_is_measured_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 7}[str(device)])
    assert peak_memory(torch.device("cuda:1")) == 7
    assert peak_memory(torch.device("cpu")) > 2**20
