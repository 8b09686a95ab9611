"""The interface of a method: it is built from a recipe, yields losses and exports LoRAs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from unziplora.config.training import Fit, ImageConfig, TrainingConfig, default_fit, read_crop
from unziplora.images.preprocess import Flaw, ImageFile, Size, TrainingImage
from unziplora.lora.weights import Lora
from unziplora.models.base import Base, Scale
from unziplora.models.text import Prompts
from unziplora.runs.folder import located
from unziplora.runs.model_card import RunDescription
from unziplora.training.cuda_graphs import Predict
from unziplora.training.phases import Phases

C = TypeVar("C", bound=TrainingConfig)

IMAGES = "images"
"""Name of the group of images of a method that has one."""


class ImageGroup(NamedTuple):
    """Image files, and the way in which they are fitted to the base."""

    files: Sequence[ImageFile]
    fit: Fit


class Trainable(ABC):
    """Interface of a method to the training loop."""

    predict: Predict
    """The UNet, or its recorded passes while a run trains."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return named optimizer groups."""

    def before_step(self, step: int, gradient_scale: float) -> None:
        """Prepare a step, before its losses; does nothing by default."""
        return

    @abstractmethod
    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the terms of the loss; each is propagated before the next is computed."""

    def after_backward(self, step: int) -> None:
        """Change gradients before they are clipped; does nothing by default."""
        return

    def after_step(self, step: int) -> None:
        """Clamp parameters to their bounds; does nothing by default."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`."""


class Method(Trainable, Generic[C]):
    """Interface of a method to the runner.

    Attributes:
        command: the command that runs it, for messages.
        images: training images, the first one for the sample sheet; may be empty.
    """

    command: ClassVar[str]
    images: list[Image.Image]

    @classmethod
    def check(cls, config: C, base: Base | None = None) -> None:
        """Refuse an unusable recipe before a folder is created and a base is loaded; does nothing by default.

        Args:
            base: used instead of the configured one, if it is loaded already.
        """
        return

    @classmethod
    def inputs(cls, config: C) -> dict[str, Path]:
        """Return the files whose content decides what is learned, by names for messages; default: all in the recipe."""
        settings = {name: value if isinstance(value, list) else [value] for name, value in located(config).items()}
        paths = {name: [Path(item) for item in items] for name, items in settings.items() if name != "base"}
        return {
            name if len(items) == 1 else f"{name} {number}": path
            for name, items in paths.items()
            for number, path in enumerate(items, 1)
            if path.is_file()
        }

    @classmethod
    def image_groups(cls, config: C) -> dict[str, ImageGroup]:
        """Return the images to learn from, in groups of one size each; those of an `ImageConfig` by default."""
        if not isinstance(config, ImageConfig):
            return {}
        crops = [read_crop(crop) for crop in config.crop]
        files = [ImageFile(*one) for one in zip_longest(config.images, config.masks, crops)]
        return {IMAGES: ImageGroup(files, config.fit or default_fit(config.base))}

    @classmethod
    def phase_steps(cls, config: C) -> int:
        """Return the steps of all phases that precede the training."""
        return 0

    @classmethod
    @abstractmethod
    def layers(cls, config: C, paths: list[str]) -> dict[str, list[str]]:
        """Return the layers that each LoRA adapts, by LoRA name, out of a UNet's layers at these paths."""

    @classmethod
    @abstractmethod
    def build(cls, config: C, setup: Setup) -> Method[C]:
        """Encode the training data and add the LoRAs to the base's UNet."""

    @abstractmethod
    def export(self) -> dict[str, Lora]:
        """Return the LoRAs by file name, in fp32, at strength 1."""

    @classmethod
    @abstractmethod
    def describe(cls, config: C) -> RunDescription:
        """Describe the LoRAs for the card and the headers of the files."""

    @abstractmethod
    def views(self) -> list[View]:
        """Return the columns of the sample sheet."""

    def check_loras(self, base: Base) -> Findings | None:
        """Check the finished LoRAs on images that they draw; None if the recipe asks for no check.

        Raises:
            UserError: a model that the check needs cannot be loaded.
            OutOfMemory: memory does not suffice.
        """
        return None

    @abstractmethod
    def off(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Temporarily switch off the LoRAs of these names."""


@dataclass(frozen=True)
class Findings:
    """Findings of a check of the finished LoRAs.

    Attributes:
        figures: for programs, as JSON types; `score` is 0…1, the best run of several has the highest.
        lines: sentences for people.
    """

    figures: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True)
class OpenedImages:
    """The images of a run by group (`Method.image_groups`), as a base of this scale needs them.

    Attributes:
        size: width and height of the first group, and of the images that the run generates itself.
    """

    scale: Scale
    size: Size
    groups: Mapping[str, Sequence[TrainingImage]] = field(default_factory=dict)

    def of(self, group: str = IMAGES) -> list[Image.Image]:
        """Return the images of a group."""
        return [image.image for image in self.groups[group]]

    @property
    def flaws(self) -> list[Flaw]:
        """Losses of all images on the way to their training size."""
        return [flaw for group in self.groups.values() for image in group for flaw in image.flaws]


@dataclass(frozen=True)
class Setup:
    """Everything besides its recipe that a method is built from.

    Attributes:
        base: frozen, without LoRAs.
        images: the training images.
        autocast: context of the forward passes.
        report: shows the user one line.
        resumed: a checkpoint will be loaded next, with all that was learned before it.
        phases: what is learned before the training, step by step.
        digests: of what the training reads besides the files of its recipe; to be filled by the method.
    """

    base: Base
    images: OpenedImages
    autocast: Callable[[], AbstractContextManager[object]]
    report: Callable[[str], None]
    resumed: bool = False
    phases: Phases = field(default_factory=Phases)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        return self.images.size

    def noise_schedule(self) -> DDPMScheduler:
        """Return the noise schedule of the base's training."""
        return DDPMScheduler.from_config(self.base.scheduler.config)

    def make_room(self, config: TrainingConfig, keep_text: bool = False) -> None:
        """Make room for training the UNet, once all images are encoded: move the encoders to the CPU.

        The text encoders stay if every step needs them (`keep_text`). Gradient checkpointing is switched on here if the
        recipe uses it.
        """
        for module in (self.base.vae, *(() if keep_text else self.base.text_encoders)):
            module.to("cpu")
        if config.gradient_checkpointing:
            self.base.unet.enable_gradient_checkpointing()


@dataclass(frozen=True)
class View:
    """A column of the sample sheet: prompts, and names of the LoRAs that are switched off for it."""

    title: str
    prompts: Prompts
    off: tuple[str, ...] = ()
