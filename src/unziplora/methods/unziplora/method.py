"""UnZipLoRA (arXiv 2412.04465): a content and a style LoRA, trained together on one picture.

Prompt separation lives in the conditioning and in `BranchedLinear`, column separation in `ColumnSeparation`,
block separation in `BlockMap`. This file builds the LoRAs, says the loss and exports the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from unziplora.config.recipe import KINDS
from unziplora.config.split import SplitConfig
from unziplora.lora.blocks import BlockMap, check_blocks, read_blocks
from unziplora.lora.inject import attention_linears, filter_targets
from unziplora.lora.weights import Lora
from unziplora.methods.adapters import branch_state, folded, load_branch_state, matrices, new_branches, switched_off
from unziplora.methods.unziplora.columns import ColumnSeparation, Phase, phase
from unziplora.methods.unziplora.data import TrainingData, check_prompts, encode_training_data
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import About, File, image_count
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import Method, Setup, View
from unziplora.training.runner import run_training
from unziplora.utils.progress import Callback


class UnZipLora(Method[SplitConfig]):
    """Both LoRAs on a UNet, and what a job asks of a method.

    Attributes:
        branches: the branches by LoRA name and module path.
        columns: the state of column separation, or None if it is switched off.
    """

    command: ClassVar[str] = "split"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        material: TrainingData,
        config: SplitConfig,
        blocks: BlockMap,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Inject both LoRAs into the UNet, in place.

        Args:
            unet: frozen, of SDXL's topology, full size or small, without LoRAs.
            scheduler: says how noise is added and what is predicted.
            material: what is learned from.
            config: the recipe.
            blocks: which blocks belong to which LoRA.
            autocast: context of the forward passes.

        Raises:
            UserError: the block map names a block that this UNet does not have.
        """
        self.unet, self.scheduler, self.material, self.config = unet, scheduler, material, config
        self.predict = unet
        self.autocast, self.pictures = autocast, list(material.pictures)
        paths = attention_linears(unet)
        if config.block_separation:
            check_blocks(blocks, paths)
        owners = {path: blocks.owner(path) if config.block_separation else None for path in paths}
        self.branches = {
            name: new_branches(unet, name, paths, config, stream=name, official_code=config.official_code)
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
        """Read the block map and fill in the prompts, those of class pictures too.

        Raises:
            UserError: either is not usable.
        """
        read_blocks(config.blocks)
        check_prompts(config)

    @classmethod
    def layers(cls, config: SplitConfig, paths: list[str]) -> dict[str, list[str]]:
        """Both LoRAs on all attentions."""
        return dict.fromkeys(KINDS, filter_targets(paths, ["attention"]))

    @classmethod
    def build(cls, config: SplitConfig, setup: Setup) -> UnZipLora:
        """Gather what is learned from, then inject both LoRAs."""
        material = encode_training_data(config, setup)
        setup.make_room(config)
        return cls(
            setup.base.unet, setup.noise_schedule(), material, config, read_blocks(config.blocks), setup.autocast
        )

    @classmethod
    def about(cls, config: SplitConfig) -> About:
        """Two LoRAs that work alone and together."""
        words = config.prompts()
        return About(
            method="UnZipLoRA (arXiv 2412.04465)",
            made=f"Two LoRAs split from {image_count(config)}",
            prompt=words["full"],
            files={
                "content": File("the content", words["content"], "Pair with the style LoRA to restore the picture."),
                "style": File("the style", config.style_trigger(config.style_prompt), "Pair with any content LoRA."),
            },
            separate=config.prompt_separation,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups, named: the matrices of each LoRA, and the scales of both without weight decay."""
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
        """Where this step lies in the schedule of column choices."""
        config = self.config
        return phase(step, config.steps, config.column_periods, config.column_warmup)

    def before_step(self, step: int, gradient_scale: float = 1.0) -> None:
        """Open the columns at the start of a period; score, choose and close them after its warm-up.

        Args:
            gradient_scale: factor that keeps fp16 gradients from underflow; it changes the choice only with
                `official_code`.
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
                    (self._denoising_loss(self.material.examples, draw) * gradient_scale).backward()
            self.unet.zero_grad()
            self.columns.choose(scores, config.column_share, now.period, config.column_periods)
            self.columns.close()
        if self.settled != (now.period, now.warm):
            self.columns.settle_scales(frozen=now.warm)
            self.settled = (now.period, now.warm)

    def losses(self, step: int) -> Iterator[Tensor]:
        """The terms of the step's loss, scalars; propagate each before asking for the next.

        The main term is the denoising error with both LoRAs plus λ L⊥; then, if asked for, each LoRA's
        prior preservation: the other LoRA off, on class pictures with the class prompt. A step in which one LoRA
        learns alone has the denoising error without the other as its only term.
        """
        config, examples, solo = self.config, self.material.examples, self.solo(step)
        if solo is not None:
            with self.only(solo):
                yield self._denoising_loss(
                    self.material.alone.get(solo, examples), generator(config.seed, "train", step)
                )
            return
        loss = self._denoising_loss(examples, generator(config.seed, "train", step))
        if self.columns is not None and config.orthogonality and not self.phase(step).warm:
            loss = loss + config.orthogonality * self.columns.orthogonality()
        yield loss
        weights = config.prior_weights()
        for name, pictures in self.material.priors.items():
            with self.only(name):
                draw = generator(config.seed, "prior", name, step)
                yield weights[name] * self._denoising_loss(pictures, draw)

    def solo(self, step: int) -> str | None:
        """The LoRA that learns alone in this step; None: both together."""
        drawn = float(torch.rand((), generator=generator(self.config.seed, "alone", step)))
        if drawn < self.config.content_alone:
            return "content"
        return "style" if drawn < self.config.content_alone + self.config.style_alone else None

    def _denoising_loss(self, examples: Examples, draw: torch.Generator) -> Tensor:
        with self.autocast():
            return denoising_loss(self.predict, self.scheduler, examples, draw=draw, **self.config.noising())

    def only(self, name: str) -> AbstractContextManager[None]:
        """Switch the other LoRA off in the UNet; the words are encoded already."""
        return switched_off(*(self.branches[other] for other in KINDS if other != name))

    @contextmanager
    def off(self, names: tuple[str, ...]) -> Iterator[None]:
        """Switch LoRAs off."""
        text = self.material.text
        with (
            text.off() if text and "style" in names else nullcontext(),
            switched_off(*(self.branches[name] for name in names)),
        ):
            yield

    def after_backward(self, step: int) -> None:
        """Keep the scales' gradients only where the LoRAs overlap."""
        if self.columns is not None:
            self.columns.gate_scales()

    def after_step(self, step: int) -> None:
        """Keep scales in [0, 1] and masked columns at zero."""
        if self.columns is not None:
            self.columns.clamp_scales()
            self.columns.zero_masked()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the method that a checkpoint needs, by name."""
        state = self.material.state_dict()
        for name in KINDS:
            state.update(branch_state(self.branches[name], name))
        if self.columns is not None:
            state.update({f"{name}.{path}.held": held for name, path, held in self.columns.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same recipe."""
        for name in KINDS:
            load_branch_state(self.branches[name], name, state)
        if self.columns is not None:
            for name, path, held in self.columns.items():
                held.copy_(state[f"{name}.{path}.held"])
        self.settled = None
        self.material = self.material.restored(state)

    def export(self) -> dict[str, Lora]:
        """Both LoRAs as plain pairs: masks, scales and alpha folded into B."""
        text = self.material.text
        return {
            "content": Lora(folded(self.branches["content"])),
            "style": Lora(folded(self.branches["style"]), text=text.export() if text else {}),
        }

    def views(self) -> list[View]:
        """Both together with the prompts of the training; each alone, away from the other's word.

        Alone they get one plain prompt each, as a user of the exported files would give it.
        """
        config = self.config
        words, style, subject = config.prompts(), config.sample_style, config.sample_subject
        return [
            View("together", Prompts(**words) if config.prompt_separation else Prompts(words["full"])),
            View(f"content, {style}", Prompts(f"{words['content']} in {style} style"), off=("style",)),
            View(f"style, {subject}", Prompts(config.fill(f"a {subject} in {{style}} style")), off=("content",)),
        ]


def split(
    config: SplitConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train a content and a style LoRA on the configured picture and write them into a run folder.

    Arguments and errors are those of `run_training`.
    """
    return run_training(UnZipLora, config, resume, progress, base)
