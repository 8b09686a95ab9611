"""A training run as a guest in its process: afterwards all global state is as it was."""

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from torch.nn import functional as F

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.methods.dreambooth import train_dreambooth
from unziplora.methods.unziplora.method import split
from unziplora.utils.progress import Progress

METHODS: dict[str, tuple[Callable[..., Any], type, dict[str, Any]]] = {
    "dreambooth": (train_dreambooth, DreamBoothConfig, {"text_encoders": True, "prior": 1.0, "prior_images": 1}),
    "split": (split, SplitConfig, {"style": "ink wash", "phrase_steps": 1, "column_periods": 1, "column_warmup": 1}),
}


@pytest.fixture
def _flushed_again() -> Iterator[None]:
    """Flush denormals again after a test, as `conftest.py` does for all."""
    yield
    torch.set_flush_denormal(True)


def process_state() -> dict[str, Any]:
    """Everything outside its arguments that a run could change."""
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "accelerate": (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)),
        "functions": (F.scaled_dot_product_attention, F.layer_norm, F.group_norm, F.linear, F.conv2d),
        "warnings": list(warnings.filters),
        "denormals": (torch.full((1,), 1e-40) * 1.0).item() > 0,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
    }


@pytest.mark.usefixtures("_flushed_again")
@pytest.mark.parametrize(("name", "flushed", "fails"), [("dreambooth", False, False), ("split", True, True)])
def test_run_restores_the_state_of_its_process(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flushed: bool, fails: bool
) -> None:
    monkeypatch.setenv("UNZIPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 1)
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")
    train, recipe, settings = METHODS[name]
    common = {"images": [tmp_path / "cat.png"], "content": "cat", "out": tmp_path / "run", "base": str(tiny_folder)}
    small = {"steps": 2, "rank": 2, "resolution": 64, "sample_steps": 1, "sample_guidance": 1, "sample_seeds": [0]}
    small |= {"generated_steps": 1, "generated_guidance": 1}

    def progress(event: Progress) -> None:
        if fails and event.step == 1:
            raise ValueError("broken")

    torch.set_flush_denormal(flushed)
    before = process_state()
    if fails:
        with pytest.raises(ValueError, match="broken"):
            train(recipe(**common, **small, **settings), progress=progress)
    else:
        assert train(recipe(**common, **small, **settings), progress=progress).card.is_file()
    after = process_state()
    assert {key: value for key, value in after.items() if value != before[key]} == {}
