"""Short trainings on the tiny base: settings that every method shares, and methods without their training loop."""

from contextlib import nullcontext
from typing import Any

from unziplora.config.training import TrainingConfig
from unziplora.models.base import Base
from unziplora.training.method import Method, Setup
from unziplora.training.preflight import open_images

SHORT: dict[str, object] = {
    "steps": 4,
    "checkpoint_every": 2,
    "sample_steps": 1,
    "sample_guidance": 1,
    "sample_seeds": [],
    "save_precision": "fp32",
    "device": "cpu",
}
GENERATED = {"generated_steps": 1, "generated_guidance": 1}


def build(kind: type[Method], base: Base, config: TrainingConfig, messages: list[str] | None = None) -> Any:
    """A method on a base, as a training begins with it; `messages` collects what it reports."""
    messages = [] if messages is None else messages
    return kind.build(config, Setup(base, open_images(kind, config, base.scale), nullcontext, messages.append))
