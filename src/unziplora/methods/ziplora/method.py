"""ZipLoRA (arXiv 2311.13600): one LoRA merged from a content and a style LoRA by trained scales of input columns.

    ΔW = ΔW_c diag(m_c) + ΔW_s diag(m_s)

The matrices are frozen, and only the scales m train. With p_c and p_s the prompts of the two LoRAs, and x_c and x_s
noisy latents of their images:

    L = ‖ε(x_c; ΔW, p_c) − ε(x_c; ΔW_c, p_c)‖² + ‖ε(x_s; ΔW, p_s) − ε(x_s; ΔW_s, p_s)‖² + λ Σ_i |m_c^i · m_s^i|

The last term is the orthogonality loss, `training.loss.orthogonality`; UnZipLoRA uses the same. Changes to text
encoders have no scales: the parts of both LoRAs act, and the UNet's scales train with prompts encoded that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from unziplora.config.recipe import KINDS
from unziplora.config.training import style_words
from unziplora.config.zip import ZipConfig
from unziplora.formats.header import LAYERS_KEY
from unziplora.lora.inject import add_lora
from unziplora.lora.layer import Branch
from unziplora.lora.weights import Lora
from unziplora.methods.adapters import AdapterMethod, folded, switched_off
from unziplora.methods.ziplora.inputs import (
    TeacherExamples,
    check_zippable,
    complete,
    encode_teachers,
    learned_images,
    merge,
    project_content,
    read_loras,
    shared_layers,
)
from unziplora.models.base import Base
from unziplora.models.sizes import described_unet
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import LoraDescription, RunDescription, base_name
from unziplora.sampling.sources import find_lora
from unziplora.training.export import Provenance, write_card, write_loras
from unziplora.training.loss import generator, noised, orthogonality, snr_weights
from unziplora.training.method import ImageGroup, Setup, View
from unziplora.training.runner import in_run_folder, named_settings, run_training
from unziplora.utils.progress import Callback, Progress

BASE_KEYS = (
    "modelspec.resolution",
    "modelspec.prediction_type",
    "ss_resolution",
    "ss_zero_terminal_snr",
    LAYERS_KEY,
)
"""Header entries that describe the base; a plain sum copies them from its LoRAs, because it does not open the base."""

METHODS = {
    "zip": "ZipLoRA (arXiv 2311.13600)",
    "null-space": "null-space projection (arXiv 2511.11051)",
    "direct": "direct addition",
}
"""Names of the methods in cards and headers."""

SCALES = "scales"
"""Name that switches the scales off, for the plain sum of both LoRAs."""


class InputScale(nn.Module):
    """Soft scale m, [in], of a LoRA's input features, ones at the start: A diag(m) for A [rank, in].

    The input features of a convolution, A [rank, in, kh, kw], are its channels.
    """

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.ones(down.shape[1], device=down.device))
        self.on = True

    def forward(self, down: Tensor) -> Tensor:
        return down * self.columns.view(-1, *[1] * (down.dim() - 2)) if self.on else down


def scale_input(branch: Branch) -> InputScale:
    """Put a scale on the input features of a LoRA's layer."""
    scale = InputScale(branch.down)
    register_parametrization(branch, "down", scale)
    return scale


class ZipLora(AdapterMethod[ZipConfig, TeacherExamples]):
    """A content and a style LoRA on a UNet, frozen, with trained scales.

    Attributes:
        scales: the scales by LoRA name and module path, in the layers that both LoRAs have.
    """

    command: ClassVar[str] = "zip"

    def add_loras(self) -> None:
        loras = self.data.loras
        self.branches = {name: add_lora(self.unet, name, loras[name].modules) for name in KINDS}
        for branch in (branch for branches in self.branches.values() for branch in branches.values()):
            branch.requires_grad_(False)
        shared = shared_layers(loras)
        self.scales = {name: {path: scale_input(self.branches[name][path]) for path in shared} for name in KINDS}

    @classmethod
    def check(cls, config: ZipConfig, base: Base | None = None) -> None:
        unet = None
        if config.method == "zip":
            unet = described_unet(config.base) if base is None else base.unet
        loras = read_loras(config, unet and unet.config)
        config.filled_prompts()
        if config.method == "zip":
            check_zippable(config, loras, unet)

    @classmethod
    def image_groups(cls, config: ZipConfig) -> dict[str, ImageGroup]:
        """Return the images of both LoRAs, each of them cropped and fitted as in its own run."""
        return {name: learned_images(config, name) for name in KINDS}

    @classmethod
    def inputs(cls, config: ZipConfig) -> dict[str, Path]:
        """Return the LoRAs, which may be in run folders, and the images."""
        loras = {f"{name}_lora": find_lora(getattr(config, f"{name}_lora"), name).file for name in KINDS}
        return {**super().inputs(config), **loras}

    @classmethod
    def layers(cls, config: ZipConfig, paths: list[str]) -> dict[str, list[str]]:
        return {name: [path for path in paths if path in lora.modules] for name, lora in read_loras(config).items()}

    @classmethod
    def build(cls, config: ZipConfig, setup: Setup) -> ZipLora:
        base = setup.base
        loras = read_loras(config, base.unet.config)
        check_zippable(config, loras, base.unet)
        data = encode_teachers(setup, config, loras)
        setup.make_room(config)
        return cls(base.unet, setup.noise_schedule(), data, config, setup.autocast)

    @classmethod
    def describe(cls, config: ZipConfig) -> RunDescription:
        prompts, hint = config.filled_prompts(), "Add the other part, at the same strength."
        files = {"lora": LoraDescription("content and style in one", prompts["full"])}
        if config.parts:
            triggers = {"content": prompts["content"], "style": style_words(prompts["style"])}
            files |= {name: LoraDescription(f"the {name} in it", trigger, hint) for name, trigger in triggers.items()}
        return RunDescription(
            METHODS[config.method], "A LoRA merged from a content and a style LoRA", prompts["full"], files
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        params = [scale.columns for name in KINDS for scale in self.scales[name].values()]
        return [{"name": SCALES, "params": params, "lr": self.config.learning_rate, "weight_decay": 0.0}]

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the terms of the loss, scalars: the distance of the merged LoRA to each alone, then λ L⊥.

        ‖·‖² is the mean over the elements of the prediction, and λ's sum the mean over columns and then layers, so
        that λ means the same for every image size and base.
        """
        for name in KINDS:
            yield self._distance(name, step)
        if self.config.orthogonality:
            content, style = (self.scales[name] for name in KINDS)
            pairs: list[tuple[Tensor, Tensor]] = [(content[path].columns, style[path].columns) for path in content]
            yield self.config.orthogonality * orthogonality(pairs)

    def _distance(self, name: str, step: int) -> Tensor:
        """Return the mean squared difference of the merged LoRA's predictions and one LoRA's alone, a scalar."""
        config, alone, merged = self.config, self.data.alone[name], self.data.merged[name]
        drawn = noised(
            self.scheduler,
            alone,
            config.batch_size,
            generator(config.seed, "zip", name, step),
            config.noise_offset,
            config.timestep_shift,
        )
        # Two contexts: weights that autocast caches in the first pass, without gradients, must not serve the second.
        with torch.no_grad(), self.autocast(), self.only(name):
            target = self.unet(**drawn.unet_inputs(alone.conditioning))[0]
        with self.autocast():
            output = self.predict(**drawn.unet_inputs(merged.conditioning))[0]
        error = (output.float() - target.float()).square().mean(dim=(1, 2, 3))
        if config.min_snr_gamma is not None:
            error = error * snr_weights(self.scheduler, drawn.timesteps, config.min_snr_gamma)
        return error.mean()

    def only(self, name: str) -> AbstractContextManager[None]:
        """Switch the other LoRA and the scales off in the UNet: one LoRA acts as it did before merging."""
        return self._unet_off((*(other for other in KINDS if other != name), SCALES))

    @contextmanager
    def off(self, names: tuple[str, ...]) -> Iterator[None]:
        """Switch off LoRAs by name, with all their parts; the name `scales` switches the scales off."""
        with self.data.texts.muted(*names), self._unet_off(names):
            yield

    @contextmanager
    def _unet_off(self, names: tuple[str, ...]) -> Iterator[None]:
        scales = [scale for name in KINDS for scale in self.scales[name].values()]
        with switched_off(*(self.branches[name] for name in KINDS if name in names)):
            for scale in scales:
                scale.on = SCALES not in names
            try:
                yield
            finally:
                for scale in scales:
                    scale.on = True

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{path}": scale.columns for name in KINDS for path, scale in self.scales[name].items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, columns in self.state_dict().items():
            columns.copy_(state[name])

    def export(self) -> dict[str, Lora]:
        """Return the merged LoRA, of rank r_c + r_s, scales folded into A, and its two parts if configured.

        Changes to text encoders are added as they are.
        """
        parts = {name: Lora(folded(self.branches[name]), text=self.data.loras[name].text) for name in KINDS}
        return {"lora": merge(parts), **(parts if self.config.parts else {})}

    def views(self) -> list[View]:
        """Return the merged LoRA next to the plain sum, with the same prompt, then each LoRA alone, with its own."""
        prompts = {name: Prompts(text) for name, text in self.config.filled_prompts().items()}
        return [
            View("zipped", prompts["full"]),
            View("plain sum", prompts["full"], off=(SCALES,)),
            View("content alone", prompts["content"], off=("style", SCALES)),
            View("style alone", prompts["style"], off=("content", SCALES)),
        ]


def zip_loras(
    config: ZipConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Merge the configured content and style LoRA into one, in a run folder.

    Base, prompts and images that the recipe leaves open come from the LoRAs' own runs. Only method `zip` needs a base.
    Arguments and errors are those of `run_training`.
    """
    with named_settings(config, resume):
        config = complete(config, base)
    if config.method == "zip":
        return run_training(ZipLora, config, resume, progress, base)
    return _add(config, resume, progress or (lambda _: None))


def _add(config: ZipConfig, resume: bool, progress: Callback) -> RunFolder:
    """Write a sum that needs no training into a run folder like that of a training."""
    with named_settings(config, resume):
        ZipLora.check(config)

    def wrote(path: Path) -> None:
        progress(Progress(1, 1, message=f"wrote {path}"))

    def work(run: RunFolder) -> None:
        parts = read_loras(config)
        if config.method == "null-space":
            parts["content"] = project_content(parts["content"], parts["style"], config.projection)
        loras = {"lora": merge(parts), **(parts if config.parts else {})}
        description = ZipLora.describe(config)
        provenance = Provenance(base_name(config), entries=_base_metadata(parts))
        write_loras(run, config, description, provenance, loras, wrote)
        write_card(run, config, description, loras)

    return in_run_folder(config, resume, work)


def _base_metadata(parts: Mapping[str, Lora]) -> dict[str, str]:
    """Return the content header's entries about the base, else the style header's, else empty ones."""
    headers = [parts[name].metadata for name in KINDS]
    return {key: next((header[key] for header in headers if key in header), "") for key in BASE_KEYS}
