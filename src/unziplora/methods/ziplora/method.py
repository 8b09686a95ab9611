"""ZipLoRA (arXiv 2311.13600): a content and a style LoRA become one, by trained scales of their input columns.

ΔW = ΔW_c diag(m_c) + ΔW_s diag(m_s). The matrices are frozen; only the scales m train, towards what each LoRA does
alone.
What LoRAs change in text encoders has no scales: both parts act, and the UNet's scales train with prompts read so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from unziplora.config.recipe import KINDS
from unziplora.config.training import style_words
from unziplora.config.zip import ZipConfig
from unziplora.formats.header import LAYERS_KEY
from unziplora.images.preprocess import load_image
from unziplora.lora.inject import add_lora
from unziplora.lora.layer import Branch
from unziplora.lora.weights import Lora, check_fits
from unziplora.methods.adapters import folded, switched_off
from unziplora.methods.ziplora.inputs import (
    LearnedExamples,
    check_zippable,
    complete,
    learned,
    merge,
    read_loras,
    shared_layers,
)
from unziplora.models.base import Base
from unziplora.models.sizes import inspect_base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import About, File
from unziplora.training.loss import generator, noised, orthogonality, snr_weights
from unziplora.training.method import Method, Setup, View
from unziplora.training.runner import in_run_folder, run_training, write_card, write_loras
from unziplora.utils.progress import Callback, Progress

# What the headers of the merged files tell of their base, which is not opened for a plain sum.
OF_THE_BASE = (
    "modelspec.resolution",
    "modelspec.prediction_type",
    "ss_resolution",
    "ss_zero_terminal_snr",
    LAYERS_KEY,
)

SCALES = "scales"
"""What is switched off, by this name, for the plain sum of both LoRAs."""


class InputScale(nn.Module):
    """A diag(m) for A [rank, in]: ΔW diag(m), a soft scale for each INPUT feature (arXiv 2311.13600).

    Attributes:
        columns: m, [in]; ones at the start.
        on: whether the scale acts.
    """

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.ones(down.shape[1], device=down.device))
        self.on = True

    def forward(self, down: Tensor) -> Tensor:
        """A [rank, in] → A diag(m) [rank, in]."""
        return down * self.columns if self.on else down


def scale_input(branch: Branch) -> InputScale:
    """Put a scale on the input features of a LoRA's layer."""
    scale = InputScale(branch.down)
    register_parametrization(branch, "down", scale)
    return scale


class ZipLora(Method[ZipConfig]):
    """Both LoRAs on a UNet with their scales, and what a job asks of a method.

    Attributes:
        branches: the branches by LoRA name and module path.
        scales: the scales by LoRA name and module path, in the layers that both LoRAs have.
    """

    command: ClassVar[str] = "zip"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        learned: LearnedExamples,
        loras: Mapping[str, Lora],
        config: ZipConfig,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        pictures: Sequence[Image.Image] = (),
    ) -> None:
        """Inject both LoRAs into the UNet, in place.

        Args:
            unet: frozen, without LoRAs.
            scheduler: says how noise is added.
            learned: the pictures of both LoRAs, with the conditioning of their prompts.
            loras: by name, at their strengths; of linear layers that the UNet has, and of text encoders.
            config: the recipe.
            autocast: context of the forward passes.
            pictures: what the examples were made from, for the sample sheet.
        """
        self.unet, self.scheduler, self.learned, self.config = unet, scheduler, learned, config
        self.predict = unet
        self.autocast, self.pictures = autocast, list(pictures)
        self.text = {name: lora.text for name, lora in loras.items()}
        self.branches = {name: add_lora(unet, name, loras[name].modules) for name in KINDS}
        for branch in (branch for branches in self.branches.values() for branch in branches.values()):
            branch.requires_grad_(False)
        shared = shared_layers(loras)
        self.scales = {name: {path: scale_input(self.branches[name][path]) for path in shared} for name in KINDS}

    @classmethod
    def check(cls, config: ZipConfig, base: Base | None = None) -> None:
        """Read both LoRAs, fill in the prompts, open the pictures.

        Raises:
            UserError: one of them is not usable.
        """
        direct = config.method == "direct"
        shapes = None
        if not direct:
            shapes = inspect_base(config.base).unet_config if base is None else base.unet.config
        loras = read_loras(config, shapes)
        config.prompts()
        if not direct:
            check_zippable(config, loras)
            for path in (*config.content_images, *config.style_images):
                load_image(path, 64)

    @classmethod
    def layers(cls, config: ZipConfig, paths: list[str]) -> dict[str, list[str]]:
        """The layers of each LoRA's file."""
        return {name: [path for path in paths if path in lora.modules] for name, lora in read_loras(config).items()}

    @classmethod
    def build(cls, config: ZipConfig, setup: Setup) -> ZipLora:
        """Encode what each LoRA learned, or have it make pictures, then inject both."""
        base = setup.base
        loras = read_loras(config, base.unet.config)
        for name, lora in loras.items():
            check_fits(lora, base.unet, str(getattr(config, f"{name}_lora")), f"base {base.name}")
        paths = {"content": config.content_images, "style": config.style_images}
        pictures = {name: [load_image(path, setup.size) for path in paths[name]] for name in KINDS}
        made = learned(setup, config, loras, pictures)
        setup.make_room(config)
        shown = [picture for name in KINDS for picture in pictures[name]]
        return cls(base.unet, setup.noise_schedule(), made, loras, config, setup.autocast, shown)

    @classmethod
    def about(cls, config: ZipConfig) -> About:
        """One LoRA, and if asked for its two parts."""
        prompts, hint = config.prompts(), "Add the other part, at the same strength."
        files = {"lora": File("content and style in one", prompts["full"])}
        if config.parts:
            triggers = {"content": prompts["content"], "style": style_words(prompts["style"])}
            files |= {name: File(f"the {name} in it", trigger, hint) for name, trigger in triggers.items()}
        method = "ZipLoRA (arXiv 2311.13600)" if config.method == "zip" else "direct addition"
        return About(method, "A LoRA merged from a content and a style LoRA", prompts["full"], files)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group: the scales of both LoRAs, without weight decay."""
        params = [scale.columns for name in KINDS for scale in self.scales[name].values()]
        return [{"name": SCALES, "params": params, "lr": self.config.learning_rate, "weight_decay": 0.0}]

    def losses(self, step: int) -> Iterator[Tensor]:
        """The terms of ZipLoRA's loss, scalars: the squared distance of the merged LoRA to each alone, and λ L⊥.

        ‖·‖² is the mean over the elements of the prediction, and λ's sum the mean over columns and then layers, so
        that λ means the same for every picture size and base.
        """
        for name in KINDS:
            yield self._distance(name, step)
        if self.config.orthogonality:
            content, style = (self.scales[name] for name in KINDS)
            pairs: list[tuple[Tensor, Tensor]] = [(content[path].columns, style[path].columns) for path in content]
            yield self.config.orthogonality * orthogonality(pairs)

    def _distance(self, name: str, step: int) -> Tensor:
        """Mean squared difference of the predictions by the merged LoRA and by one alone, a scalar."""
        config, alone, merged = self.config, self.learned.alone[name], self.learned.merged[name]
        drawn = noised(
            self.scheduler,
            alone,
            config.batch_size,
            generator(config.seed, "zip", name, step),
            config.noise_offset,
            config.timestep_shift,
        )
        # Two contexts: what autocast keeps of the first pass, without gradients, must not serve the second.
        with torch.no_grad(), self.autocast(), self.only(name):
            wanted = self.unet(**drawn.unet_inputs(alone.conditioning))[0]
        with self.autocast():
            given = self.predict(**drawn.unet_inputs(merged.conditioning))[0]
        error = (given.float() - wanted.float()).square().mean(dim=(1, 2, 3))
        if config.min_snr_gamma is not None:
            error = error * snr_weights(self.scheduler, drawn.timesteps, config.min_snr_gamma)
        return error.mean()

    def only(self, name: str) -> AbstractContextManager[None]:
        """Have one LoRA act alone in the UNet, without scales, as it was before merging."""
        return self._unet_off((*(other for other in KINDS if other != name), SCALES))

    @contextmanager
    def off(self, names: tuple[str, ...]) -> Iterator[None]:
        """Switch LoRAs off; `scales` switches the scales off."""
        with self.learned.texts.muted(*names), self._unet_off(names):
            yield

    @contextmanager
    def _unet_off(self, names: tuple[str, ...]) -> Iterator[None]:
        scales = [scale for name in KINDS for scale in self.scales[name].values()] if SCALES in names else []
        with switched_off(*(self.branches[name] for name in KINDS if name in names)):
            for scale in scales:
                scale.on = False
            try:
                yield
            finally:
                for scale in scales:
                    scale.on = True

    def state_dict(self) -> dict[str, Tensor]:
        """The scales by LoRA name and module path; everything else comes from the files."""
        return {f"{name}.{path}": scale.columns for name in KINDS for path, scale in self.scales[name].items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same recipe."""
        for name, columns in self.state_dict().items():
            columns.copy_(state[name])

    def export(self) -> dict[str, Lora]:
        """The merged LoRA, of rank r_c + r_s, scales folded into A; and if asked for its two parts.

        What the LoRAs change in text encoders is added as it is.
        """
        parts = {name: Lora(folded(self.branches[name]), text=self.text[name]) for name in KINDS}
        return {"lora": merge(parts), **(parts if self.config.parts else {})}

    def views(self) -> list[View]:
        """Merged, beside the plain sum with the same prompt; then what each LoRA does alone, with its own."""
        prompts = {name: Prompts(text) for name, text in self.config.prompts().items()}
        return [
            View("zipped", prompts["full"]),
            View("plain sum", prompts["full"], off=(SCALES,)),
            View("content alone", prompts["content"], off=("style", SCALES)),
            View("style alone", prompts["style"], off=("content", SCALES)),
        ]


def zip_loras(
    config: ZipConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Merge the configured content and style LoRA into `lora.safetensors` in a run folder.

    What the recipe leaves open, the LoRAs' own runs tell: base, prompts, pictures. Method `direct` needs no base.
    Arguments and errors are those of `run_training`.
    """
    config = complete(config, base)
    if config.method == "zip":
        return run_training(ZipLora, config, resume, progress, base)
    return _add(config, resume, progress or (lambda _: None))


def _add(config: ZipConfig, resume: bool, progress: Callback) -> RunFolder:
    """The plain sum, in a run folder like that of a training."""
    ZipLora.check(config)

    def wrote(path: Path) -> None:
        progress(Progress(1, 1, message=f"wrote {path}"))

    def work(run: RunFolder) -> None:
        parts = read_loras(config)
        loras = {"lora": merge(parts), **(parts if config.parts else {})}
        about = ZipLora.about(config)
        write_loras(run, config, about, loras, {}, wrote, _of_the_base(parts))
        write_card(run, config, about, loras)

    return in_run_folder(config, resume, work)


def _of_the_base(parts: Mapping[str, Lora]) -> dict[str, str]:
    """What the content's header tells of the base, else the style's; empty where neither does, for nobody knows."""
    headers = [parts[name].metadata for name in KINDS]
    return {key: next((header[key] for header in headers if key in header), "") for key in OF_THE_BASE}
