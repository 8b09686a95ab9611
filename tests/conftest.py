"""Fixtures shared by all tests: a tiny pipeline of SDXL's topology in every form that a base comes in."""

import copy
import gc
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import vision
from hypothesis import settings

from unziplora.models.base import Base, load_base
from unziplora.training.trainer import StepReport, Trainer
from unziplora.utils.signals import STOP

# The suite tries the same examples every time; a longer search is `pytest --hypothesis-profile=torture`.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.register_profile("torture", max_examples=5000, deadline=None, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on many threads, and results then do not depend on the machine."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as inside the package's long calls


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Let collections of garbage, of which every run makes one, not go through all that was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _steps_draw_nothing_global(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no training step of any test draw from torch's global generator: checkpoints do not contain its state."""
    step = Trainer.step

    def checked(self: Trainer, number: int) -> StepReport:
        before = torch.get_rng_state()
        report = step(self, number)
        assert torch.equal(torch.get_rng_state(), before), "a step drew from torch's global generator"
        return report

    monkeypatch.setattr(Trainer, "step", checked)


def pytest_configure() -> None:
    """Receive the signals that tests send themselves: in the background or under nohup they begin ignored."""
    for number in STOP:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base as a diffusers folder. Read only: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("base") / "tiny-xl"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random models that compare images, by kind: clip, dino, csd."""
    return vision.save_models(tmp_path_factory.mktemp("models-of-jane"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one file in the original SDXL layout, with its configuration folder beside it."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    tiny.save_checkpoint(tiny.pipeline(), path)
    path.with_suffix("").symlink_to(tiny_folder, target_is_directory=True)
    return path


@pytest.fixture(scope="session")
def shared_base(tiny_folder: Path) -> Base:
    """The tiny base, loaded once. Read only: for tests that change the UNet there is `tiny_base`."""
    return load_base(str(tiny_folder))


@pytest.fixture
def fresh_base(shared_base: Base) -> Callable[[], Base]:
    """Make as many independent tiny bases as wanted: each has a UNet of its own, the rest is shared."""

    def make() -> Base:
        base = copy.copy(shared_base)
        parts = {**shared_base.pipe.components, "unet": copy.deepcopy(shared_base.unet)}
        base.pipe = type(shared_base.pipe)(**parts, add_watermarker=False)
        return base

    return make


@pytest.fixture
def tiny_base(fresh_base: Callable[[], Base]) -> Base:
    """The tiny base with a UNet that the test may change."""
    return fresh_base()
