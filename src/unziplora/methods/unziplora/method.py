"""UnZipLoRA (arXiv 2412.04465): a content and a style LoRA, trained together on one image.

Three separations keep the two apart. Each is implemented in one place:

- Prompt separation (section 3.2), K, V = W0 x + ΔW_c x_c + ΔW_s x_s: `lora.layer.BranchedLinear`.
- Column separation (section 3), each LoRA trains only the columns it holds: `methods.unziplora.columns`.
- Block separation (section 3), blocks in which one LoRA trains all columns: `lora.blocks.BlockMap`.

The orthogonality loss L⊥ = mean_i |m_c^i · m_s^i| is `training.loss.orthogonality`; ZipLoRA uses the same. This file
adds the LoRAs to the UNet, computes the loss, moves through the phases of the columns and exports the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from unziplora.config.recipe import KINDS
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.lora.blocks import check_blocks, read_blocks
from unziplora.lora.inject import filter_targets, target_layers
from unziplora.methods.adapters import (
    AdapterMethod,
    TrainingData,
    check_block_map,
    matrices,
    new_branches,
    pair_views,
)
from unziplora.methods.unziplora import style_phrase
from unziplora.methods.unziplora.check import check_loras, check_models
from unziplora.methods.unziplora.columns import ColumnSeparation, Phase, phase
from unziplora.methods.unziplora.data import check_prompts, encode_training_data
from unziplora.methods.unziplora.seeds import best_of_seeds
from unziplora.models.base import Base
from unziplora.models.sizes import inspect_base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import LoraDescription, RunDescription, image_count
from unziplora.training.loss import generator
from unziplora.training.method import Findings, Setup, View
from unziplora.training.runner import run_training
from unziplora.utils.progress import Callback


class UnZipLora(AdapterMethod[SplitConfig, TrainingData]):
    """A content and a style LoRA on a UNet; the paper's are on all its attentions.

    Attributes:
        columns: state of column separation, or None without it.
    """

    command: ClassVar[str] = "split"

    def add_loras(self) -> None:
        config = self.config
        self.text = {"style": self.data.text} if self.data.text else {}
        paths, blocks = target_layers(self.unet, config.targets), read_blocks(config.blocks)
        if config.block_separation:
            check_blocks(blocks, paths)
        owners = {path: blocks.owner(path) if config.block_separation else None for path in paths}
        self.branches = {
            name: new_branches(self.unet, name, paths, config, stream=name, official_code=config.official_code)
            for name in KINDS
        }
        self.columns: ColumnSeparation | None = None
        self.settled: tuple[int, bool] | None = None  # the period and warm-up for which scales are settled
        if config.column_separation:
            self.columns = ColumnSeparation(self.branches, owners, config.official_code)
        else:
            # Without columns there is no part of a layer to hold: an owned block is its owner's alone.
            for name in KINDS:
                for path, branch in self.branches[name].items():
                    branch.mask.fill_(float(owners[path] in (None, name)))

    @classmethod
    def check(cls, config: SplitConfig, base: Base | None = None) -> None:
        read_blocks(config.blocks)
        if config.block_separation:
            check_block_map(config.blocks, config.targets, config.base, base)
        check_prompts(config)
        check_models(config)
        _check_columns(config, base)

    @classmethod
    def phase_steps(cls, config: SplitConfig) -> int:
        return config.phrase_steps + style_phrase.DISTILLATION_STEPS if config.phrase_steps else 0

    @classmethod
    def layers(cls, config: SplitConfig, paths: list[str]) -> dict[str, list[str]]:
        return dict.fromkeys(KINDS, filter_targets(paths, config.targets))

    @classmethod
    def build(cls, config: SplitConfig, setup: Setup) -> UnZipLora:
        data = encode_training_data(config, setup)
        setup.make_room(config)
        return cls(setup.base.unet, setup.noise_schedule(), data, config, setup.autocast)

    @classmethod
    def describe(cls, config: SplitConfig) -> RunDescription:
        prompts = config.prompts()
        return RunDescription(
            method="UnZipLoRA (arXiv 2412.04465)",
            origin=f"Two LoRAs split from {image_count(config)}",
            prompt=prompts["full"],
            files={
                "content": LoraDescription(
                    "the content", prompts["content"], "Pair with the style LoRA to restore the image."
                ),
                "style": LoraDescription(
                    "the style", config.style_trigger(config.style_prompt), "Pair with any content LoRA."
                ),
            },
            separate_prompts=config.separates_prompts,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return named optimizer groups: each LoRA's matrices, then the scales of both, without weight decay."""
        config = self.config
        rates = {"content": config.content_learning_rate, "style": config.style_learning_rate}
        groups: list[dict[str, Any]] = []
        for name in KINDS:
            params, decay = matrices(self.branches[name]), config.weight_decay
            groups.append({"name": name, "params": params, "lr": rates[name], "weight_decay": decay})
        if self.columns is not None:
            scales = [b.scale for name in KINDS for b in self.branches[name].values()]
            rate = config.scale_learning_rate
            groups.append({"name": "scales", "params": scales, "lr": rate, "weight_decay": 0.0})
        return groups

    def phase(self, step: int) -> Phase:
        """Return the phase of a step in the schedule of column choices."""
        config = self.config
        return phase(step, config.steps, config.column_periods, config.column_warmup)

    def before_step(self, step: int, gradient_scale: float = 1.0) -> None:
        """Open the columns at the start of a period; score, choose and close them after its warm-up.

        fp16's gradient scale changes the choice only with `official_code`.
        """
        if self.columns is None:
            return
        config, now = self.config, self.phase(step)
        if now.opens:
            self.columns.open()
        if now.chooses:
            with self.columns.scored(gradient_scale) as scores:
                for turn in range(config.score_timesteps):
                    draw = generator(config.seed, "score", step, turn)
                    (self.denoising_loss(self.data.examples, draw) * gradient_scale).backward()
            self.unet.zero_grad()
            self.columns.choose(scores, config.column_share, now.period, config.column_periods)
            self.columns.close()
        if self.settled != (now.period, now.warm):
            self.columns.settle_scales(frozen=now.warm)
            self.settled = (now.period, now.warm)

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the terms of the step's loss, scalars; propagate each before asking for the next.

        The main term is the denoising error with both LoRAs, plus λ L⊥ outside warm-ups, where λ is
        `config.orthogonality` (column separation only). Prior preservation adds a term for each LoRA: the error without
        the other LoRA on class images with the class prompt (arXiv 2208.12242). In a step in which one LoRA learns
        alone, the error without the other is the only term.
        """
        config, examples, solo = self.config, self.data.examples, self.solo(step)
        if solo is not None:
            with self.only(solo):
                draw = generator(config.seed, "train", step)
                yield self.denoising_loss(self.data.alone.get(solo, examples), draw)
            return
        loss = self.denoising_loss(examples, generator(config.seed, "train", step))
        if self.columns is not None and config.orthogonality and not self.phase(step).warm:
            loss = loss + config.orthogonality * self.columns.orthogonality()
        yield loss
        weights = config.prior_weights()
        for name, class_examples in self.data.priors.items():
            with self.only(name):
                draw = generator(config.seed, "prior", name, step)
                yield weights[name] * self.denoising_loss(class_examples, draw)

    def solo(self, step: int) -> str | None:
        """Return the LoRA that learns alone in this step, or None if both learn together.

        In a warm-up both do: the columns of a LoRA that has learned nothing have no scores to be chosen by.
        """
        if self.columns is not None and self.phase(step).warm:
            return None
        drawn = float(torch.rand((), generator=generator(self.config.seed, "alone", step)))
        if drawn < self.config.content_alone:
            return "content"
        return "style" if drawn < self.config.content_alone + self.config.style_alone else None

    def after_backward(self, step: int) -> None:
        """Keep the scales' gradients only where the LoRAs overlap."""
        if self.columns is not None:
            self.columns.gate_scales()

    def after_step(self, step: int) -> None:
        """Clamp the scales to [0, 1] and reset closed columns to zero."""
        if self.columns is not None:
            self.columns.clamp_scales()
            self.columns.zero_masked()

    def state_dict(self) -> dict[str, Tensor]:
        columns = {} if self.columns is None else self.columns.state_dict()
        return {**super().state_dict(), **self.data.state_dict(), **columns}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.columns is not None:
            for name, held in self.columns.state_dict().items():
                held.copy_(state[name])
        self.settled = None
        self.data = self.data.restored(state)

    def check_loras(self, base: Base) -> Findings | None:
        return check_loras(self, self.config, base) if self.config.is_checked() else None

    def views(self) -> list[View]:
        prompts = self.config.prompts()
        together = Prompts(**prompts) if self.config.separates_prompts else Prompts(prompts["full"])
        return pair_views(self.config, together, prompts["content"], "{style}")


def _check_columns(config: SplitConfig, base: Base | None) -> None:
    """Refuse to choose columns of convolutions; the projections of some bases are such, unlike SDXL's.

    Raises:
        UserError: the base has them, and the recipe adapts them.
    """
    if config.column_separation and "projections" in config.targets:
        unet_config = inspect_base(config.base).unet_config if base is None else base.unet.config
        if not unet_config["use_linear_projection"]:
            raise UserError(
                "column separation chooses columns of linear layers, and this base's projections are convolutions: "
                "take 'projections' out of targets, or switch column_separation off"
            )


def split(
    config: SplitConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train a content and a style LoRA on the configured images and write them into a run folder.

    Arguments and errors are those of `run_training`.
    """
    train = best_of_seeds if config.seeds > 1 else run_training
    return train(UnZipLora, config, resume, progress, base)
