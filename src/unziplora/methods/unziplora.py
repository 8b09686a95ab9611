"""UnZipLoRA (arXiv 2412.04465): a content and a style LoRA, trained together on one picture.

Prompt separation lives in the conditioning and in `BranchedLinear`, column separation in `ColumnSeparation`,
block separation in `BlockMap`. This file builds the LoRAs, says the loss and exports the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from unziplora.config import SplitConfig
from unziplora.lora.blocks import BlockMap, check_blocks
from unziplora.lora.columns import Phase, phase
from unziplora.lora.layer import Branch, add_lora, attention_linears, inject
from unziplora.lora.separation import NAMES, ColumnSeparation
from unziplora.objective import Examples, denoising_loss, generator


class UnZipLora:
    """Both LoRAs on a UNet, and what a training loop asks of a method.

    Attributes:
        branches: the branches by LoRA name and module path.
        columns: the state of column separation, or None if it is switched off.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        examples: Examples,
        config: SplitConfig,
        blocks: BlockMap,
        priors: Mapping[str, Examples] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = torch.enable_grad,
    ) -> None:
        """Inject both LoRAs into the UNet, in place.

        Args:
            unet: frozen, of SDXL's topology, full size or small, without LoRAs.
            scheduler: says how noise is added and what is predicted.
            examples: the picture; its conditioning is the three prompts' embeddings joined, or the full
                prompt's alone (no prompt separation).
            config: the recipe.
            blocks: which blocks belong to which LoRA.
            priors: class pictures for the LoRAs whose prior is preserved, with their conditioning.
            autocast: context of the forward passes.

        Raises:
            UserError: the block map names a block that this UNet does not have.
        """
        self.unet, self.scheduler, self.examples, self.config = unet, scheduler, examples, config
        self.priors, self.autocast = dict(priors or {}), autocast
        paths = attention_linears(unet)
        if config.block_separation:
            check_blocks(blocks, paths)
        owners = {path: blocks.owner(path) if config.block_separation else None for path in paths}
        self.branches = {name: self._add(name, paths) for name in NAMES}
        self.columns: ColumnSeparation | None = None
        self.settled: tuple[int, bool] | None = None  # the period and warm-up for which scales are settled
        if config.column_separation:
            self.columns = ColumnSeparation(self.branches, owners, keep_masked=not config.decay_masked)
        else:
            # Without columns there is no part of a layer to hold: an owned block is its owner's alone.
            for name in NAMES:
                for path, branch in self.branches[name].items():
                    branch.mask.fill_(float(owners[path] in (None, name)))

    def _add(self, name: str, paths: list[str]) -> dict[str, Branch]:
        config = self.config
        modules = {}
        for path, layer in inject(self.unet, paths).items():
            draw = generator(config.seed, "init", name, path)
            modules[path] = initial_pair(layer.in_features, layer.out_features, config.rank, config.init, draw)
        branches = add_lora(self.unet, name, modules, (config.alpha or config.rank) / config.rank, name)
        for branch in branches.values():
            branch.scale.requires_grad_(False)  # until column separation says which ones train
        return branches

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups, named: the matrices of each LoRA, and the scales of both without weight decay."""
        config = self.config
        rates = {"content": config.content_learning_rate, "style": config.style_learning_rate}
        groups: list[dict[str, Any]] = []
        for name in NAMES:
            matrices = [p for b in self.branches[name].values() for p in (b.down, b.up)]
            decay = config.weight_decay
            groups.append({"name": name, "params": matrices, "lr": rates[name], "weight_decay": decay})
        if self.columns is not None:
            scales = [b.scale for name in NAMES for b in self.branches[name].values()]
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
            gradient_scale: factor that keeps fp16 gradients from underflow; does not change the choice
                unless the recipe asks for scores on scaled gradients.
        """
        if self.columns is None:
            return
        config, now = self.config, self.phase(step)
        if now.opens:
            self.columns.open()
        if now.chooses:
            divisor = 1.0 if config.score_scaled else gradient_scale
            with self.columns.scored(config.column_score, divisor) as scores:
                for turn in range(config.score_timesteps):
                    draw = generator(config.seed, "score", step, turn)
                    (self._denoising_loss(self.examples, draw) * gradient_scale).backward()
            self.unet.zero_grad()
            periods, share = config.column_periods, config.column_share
            self.columns.choose(scores, share, now.period, periods, config.column_choice)
            self.columns.close()
        if self.settled != (now.period, now.warm):
            self.columns.settle_scales(now.warm, config.scale_gradient == "overlap")
            self.settled = (now.period, now.warm)

    def losses(self, step: int) -> Iterator[Tensor]:
        """The terms of the step's loss, scalars; propagate each before asking for the next.

        The main term is the denoising error with both LoRAs plus λ L⊥; then, if asked for, each LoRA's
        prior preservation: the other LoRA off, on class pictures with the class prompt.
        """
        config = self.config
        loss = self._denoising_loss(self.examples, generator(config.seed, "train", step))
        if self.columns is not None and config.orthogonality and not self.phase(step).warm:
            loss = loss + config.orthogonality * self.columns.orthogonality()
        yield loss
        weights = {"content": config.content_prior, "style": config.style_prior}
        for name, examples in self.priors.items():
            with self.only(name):
                draw = generator(config.seed, "prior", name, step)
                yield weights[name] * self._denoising_loss(examples, draw)

    def _denoising_loss(self, examples: Examples, draw: torch.Generator) -> Tensor:
        config = self.config
        with self.autocast():
            return denoising_loss(
                self.unet,
                self.scheduler,
                examples,
                batch_size=config.batch_size,
                draw=draw,
                min_snr_gamma=config.min_snr_gamma,
                noise_offset=config.noise_offset,
            )

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Switch the other LoRA off."""
        others = [b for other in NAMES if other != name for b in self.branches[other].values()]
        strengths = [b.strength for b in others]
        for branch in others:
            branch.strength = 0.0
        try:
            yield
        finally:
            for branch, strength in zip(others, strengths, strict=True):
                branch.strength = strength

    def after_backward(self, step: int) -> None:
        """Unless all scales train, keep their gradients only where the LoRAs overlap."""
        if self.columns is not None and self.config.scale_gradient == "overlap":
            self.columns.gate_scales()

    def after_step(self, step: int) -> None:
        """Keep scales in [0, 1] and masked columns at zero."""
        if self.columns is not None:
            self.columns.clamp_scales()
            self.columns.zero_masked()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the method that a checkpoint needs, by name."""
        state = {}
        for name in NAMES:
            for path, branch in self.branches[name].items():
                state.update({f"{name}.{path}.{key}": value for key, value in branch.state_dict().items()})
        if self.columns is not None:
            state.update({f"{name}.{path}.held": held for name, path, held in self.columns.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same recipe."""
        for name in NAMES:
            for path, branch in self.branches[name].items():
                branch.load_state_dict({key: state[f"{name}.{path}.{key}"] for key in branch.state_dict()})
        if self.columns is not None:
            for name, path, held in self.columns.items():
                held.copy_(state[f"{name}.{path}.held"])
        self.settled = None

    @torch.no_grad()
    def export(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Each LoRA as plain pairs (A [r, in], B [out, r]) of strength 1: masks, scales, alpha folded into B."""
        return {
            name: {
                path: (b.down.float().cpu(), (b.columns()[:, None] * b.up).float().cpu())
                for path, b in self.branches[name].items()
            }
            for name in NAMES
        }


def initial_pair(
    in_features: int, out_features: int, rank: int, init: str, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A LoRA's start: A [r, in] uniform in ±1/√in with B [out, r] zero, or both normal with std 1/r.

    The first is LoRA's (arXiv 2106.09685: ΔW = 0), the second that of UnZipLoRA's official code.
    """
    if init == "gaussian":
        shapes = (rank, in_features), (out_features, rank)
        down, up = (torch.randn(shape, generator=draw) / rank for shape in shapes)
        return down, up
    bound = 1 / math.sqrt(in_features)
    down = (torch.rand(rank, in_features, generator=draw) * 2 - 1) * bound
    return down, torch.zeros(out_features, rank)
