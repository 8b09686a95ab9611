"""Short runs of every method on a tiny base, and what the campaigns compare them by."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from reliability.campaign import Failure
from tests import tiny
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import KINDS
from unziplora.config.split import SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UnziploraError
from unziplora.formats.files import write_lora
from unziplora.lora.weights import Lora
from unziplora.methods.blora import train_blora
from unziplora.methods.dreambooth import train_dreambooth
from unziplora.methods.unziplora import style_phrase
from unziplora.methods.unziplora.method import split
from unziplora.methods.ziplora.method import zip_loras
from unziplora.models.base import Base, load_base
from unziplora.runs.folder import RunFolder

STEPS = 4
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
"""Fewer levels than SDXL has, with the blocks that the methods name."""

SHORT: dict[str, Any] = {
    "steps": STEPS,
    "resolution": tiny.SIDE,
    "checkpoint_every": 1,
    "sample_every": 3,
    "sample_steps": 1,
    "sample_guidance": 1.0,
    "sample_seeds": [0],
    "generated_steps": 1,
    "generated_guidance": 1.0,
    "save_precision": "fp32",
    "device": "cpu",
    "precision": "fp32",
}
PHRASE = {"phrase_steps": 3, "content": "cat", "style": "ink wash"}
COLUMNS = {"column_periods": 1, "column_warmup": 1, "score_timesteps": 1}
PRIOR = {"prior_images": 1}


@dataclass(frozen=True)
class Method:
    """A method: the function that trains, its recipe, and settings that reach all of its phases."""

    name: str
    train: Callable[..., RunFolder]
    recipe: type[TrainingConfig]
    settings: dict[str, Any]


METHODS = (
    Method("split", split, SplitConfig, {**PHRASE, **COLUMNS, **PRIOR, "content_prior": 1.0, "rank": 2}),
    Method(
        "dreambooth",
        train_dreambooth,
        DreamBoothConfig,
        {**PRIOR, "content": "cat", "rank": 2, "text_encoders": True, "prior": 1.0},
    ),
    Method("blora", train_blora, BLoraConfig, {"rank": 2}),
    Method(
        "zip",
        zip_loras,
        ZipConfig,
        {"content_prompt": "a cat", "style_prompt": "ink", "full_prompt": "a cat in ink style", "teacher_images": 1},
    ),
)


@dataclass(frozen=True)
class Workshop:
    """A loaded tiny base with its folder, an image and two LoRAs to train on."""

    folder: Path
    base: Base

    @classmethod
    def open(cls, folder: Path) -> Workshop:
        """Make everything that the cases share."""
        torch.set_num_threads(1)
        style_phrase.DISTILLATION_STEPS = 1
        tiny.pipeline(**SMALL).save_pretrained(folder / "tiny-xl")
        base = load_base(str(folder / "tiny-xl"))
        Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(folder / "cat.png")
        blocks = {kind: [f"up_blocks.0.attentions.{number}"] for number, kind in enumerate(KINDS)}
        (folder / "blocks.toml").write_text(tomli_w.dumps(blocks), encoding="utf-8")
        for seed, name in enumerate(("content", "style")):
            write_lora(Lora(tiny.random_lora(base.unet, seed)), folder / f"{name}.safetensors")
        gc.collect()
        gc.freeze()  # nothing of it is garbage; looking through it takes longer than a step
        return cls(folder, base)

    def config(self, method: Method, out: Path) -> TrainingConfig:
        """Return the recipe of a short run."""
        values: dict[str, Any] = {**SHORT, "out": out, "base": str(self.folder / "tiny-xl"), **method.settings}
        if method.recipe is ZipConfig:
            values |= {f"{name}_lora": self.folder / f"{name}.safetensors" for name in ("content", "style")}
        else:
            values["images"] = [self.folder / "cat.png"]
        if method.recipe is SplitConfig:
            values["blocks"] = str(self.folder / "blocks.toml")
        return method.recipe(**values)

    def train(self, method: Method, config: TrainingConfig, **options: Any) -> RunFolder:
        """Train on the loaded base."""
        return method.train(config, base=self.base, **options)


def pick(draw: random.Random) -> Method:
    """Pick a method."""
    return draw.choice(METHODS)


def use_cache(folder: Path) -> None:
    """Keep the class images of this process in a folder."""
    os.environ["UNZIPLORA_CACHE"] = str(folder)


def learned(run: RunFolder) -> dict[str, Tensor]:
    """Return all tensors of a run's LoRA files, by file and name."""
    files = sorted(run.path.glob("*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def check_equal(run: RunFolder, reference: dict[str, Tensor]) -> None:
    """Compare the LoRAs of a run with those of an uninterrupted one.

    Raises:
        Failure: they differ.
    """
    found = learned(run)
    if found.keys() != reference.keys():
        raise Failure("silently wrong", f"other tensors: {sorted(found.keys() ^ reference.keys())[:3]}")
    different = [name for name, value in reference.items() if not torch.equal(value, found[name])]
    if different:
        raise Failure("silently wrong", f"{len(different)} of {len(found)} tensors differ, such as {different[0]}")


def recover(shop: Workshop, method: Method, config: TrainingConfig) -> str:
    """Resume a run, or repeat the command that began it; return which of the two worked.

    Raises:
        Failure: neither works.
    """
    run = RunFolder(config.out)
    if run.card.exists():
        return "was finished already"
    try:
        saved = run.config(method.recipe).model_copy(update={"out": config.out})
        shop.train(method, saved, resume=True)
        return "resumed"
    except UnziploraError as error:
        refusal = error
    try:
        shop.train(method, config)
        return "started again"
    except UnziploraError as error:
        raise Failure("lost", f"--resume: {refusal}\nsame command: {error}") from None
