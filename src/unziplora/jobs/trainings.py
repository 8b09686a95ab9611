"""Trainings by the name of their method, and their execution one after the other on a base that stays loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.config.templates import ui_syntax
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import MachineError, UserError
from unziplora.models.kept import KeptBase
from unziplora.runs.folder import RunFolder
from unziplora.utils.inputs import read_toml
from unziplora.utils.progress import Callback
from unziplora.utils.signals import stop_requests

if TYPE_CHECKING:
    from PIL import Image

    from unziplora.images.preprocess import Flaw
    from unziplora.models.base import Base
    from unziplora.training.memory import Memory
    from unziplora.training.method import Method

C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True)
class Training:
    """A kind of training.

    Attributes:
        recipe: model of its configuration.
        function: trains; 'module:name', because the import brings torch along.
        method: its class, in the same way.
    """

    recipe: type[TrainingConfig]
    function: str
    method: str


_METHODS = "unziplora.methods"
TRAININGS = {
    "split": Training(SplitConfig, f"{_METHODS}.unziplora.method:split", f"{_METHODS}.unziplora.method:UnZipLora"),
    "dreambooth": Training(
        DreamBoothConfig, f"{_METHODS}.dreambooth:train_dreambooth", f"{_METHODS}.dreambooth:DreamBooth"
    ),
    "blora": Training(BLoraConfig, f"{_METHODS}.blora:train_blora", f"{_METHODS}.blora:BLora"),
    "zip": Training(ZipConfig, f"{_METHODS}.ziplora.method:zip_loras", f"{_METHODS}.ziplora.method:ZipLora"),
}


def training_of(settings: dict[str, Any]) -> Training:
    """Return the kind of training that a whole configuration belongs to: the one that has all of its keys.

    Raises:
        UserError: there is none.
    """
    for training in TRAININGS.values():
        if settings.keys() <= training.recipe.model_fields.keys():
            return training
    raise UserError("config.toml: belongs to no method of this version; start the run again")


def config_of(run: RunFolder) -> TrainingConfig:
    """Read the configuration of a run of any kind.

    Raises:
        UserError: it is missing or damaged, or belongs to no kind of training.
    """
    return run.config(training_of(read_toml(run.config_file)).recipe)


def check(config: C) -> C:
    """Return a recipe, completed; refuse one that cannot be trained, before anything is loaded.

    Raises:
        UserError: an image, a word, the base or a setting is not usable.
    """
    from unziplora.training.preflight import check_run

    method = method_of(config)
    config = completed(config)
    if needs_base(config):
        check_run(method, config)
    else:
        method.check(config)
    return config


def completed(config: C) -> C:
    """Return a recipe with what it takes from the runs that it builds on."""
    if not isinstance(config, ZipConfig):
        return config
    from unziplora.methods.ziplora.inputs import complete

    return cast(C, complete(config))


def needs_base(config: TrainingConfig) -> bool:
    """Return True unless a recipe only adds files."""
    return not isinstance(config, ZipConfig) or config.method == "zip"


class Forecast(NamedTuple):
    """Forecast of a training on images: what it will learn, and what it needs.

    Attributes:
        image: the images at the training size, faded where a mask excludes them.
        size: width and height of the training images.
        prompts: filled prompts by name.
        memory: at the peak.
        flaws: losses of the images on the way to the training size.
        ineffective: parts of the words that only have an effect in user interfaces.
    """

    image: Image.Image
    size: tuple[int, int]
    prompts: dict[str, str]
    memory: Memory
    flaws: list[Flaw]
    ineffective: list[str]


def foresee(config: ImageConfig) -> Forecast:
    """Check a recipe as `check` does, and forecast its training. Errors as in `check`; warns of nothing."""
    from unziplora.models.sizes import inspect_base
    from unziplora.training.memory import estimate
    from unziplora.training.preflight import checked_images, preview

    kind, sizes = method_of(config), inspect_base(config.base)
    images, prompts = checked_images(kind, config), config.filled_prompts()
    memory = estimate(config, sizes, kind.layers(config, sizes.names), images.size)
    return Forecast(preview(images), images.size, prompts, memory, images.flaws, ui_syntax(prompts.values()))


def function_of(config: TrainingConfig) -> Callable[..., RunFolder]:
    """Return the function that trains as a recipe is configured."""
    return resolve_name(_kind_of(config).function)


def method_of(config: TrainingConfig) -> type[Method[Any]]:
    """Return the class of the method that a recipe belongs to."""
    return resolve_name(_kind_of(config).method)


def _kind_of(config: TrainingConfig) -> Training:
    return next(kind for kind in TRAININGS.values() if type(config) is kind.recipe)


def import_whole(config: TrainingConfig) -> None:
    """Import what a training needs. A stop in the middle waits: it would leave half of a module to the next run.

    Raises:
        KeyboardInterrupt: there was a stop.
    """
    with stop_requests() as stopped:
        function_of(config)
        import_module("unziplora.models.base")
    if stopped.is_set():
        raise KeyboardInterrupt


class Trainer:
    """Trains the runs of one process. The base stays loaded while the next run needs the same one."""

    def __init__(self) -> None:
        self.kept = KeptBase()

    def __call__(self, run: RunFolder, progress: Callback) -> None:
        """Train a run to its end, from the step that it has reached.

        Raises:
            UserError, MachineError, Interrupted: as the training itself.
        """
        config = config_of(run).model_copy(update={"out": run.path})
        import_whole(config)
        try:
            base = self.load(config, progress)
            function_of(config)(config, resume=True, progress=progress, base=base)
        except (MachineError, MemoryError, RuntimeError):  # the memory may be needed, and the state is uncertain
            self.kept.drop()
            raise

    def load(self, config: TrainingConfig, progress: Callback) -> Base | None:
        """Return the base of a recipe, which is loaded unless the last run had it; None if the recipe needs none."""
        from unziplora.models.device import pick_device, pick_dtype
        from unziplora.utils.progress import Progress

        config = completed(config)
        if not needs_base(config):
            return None
        device = pick_device(config.device)
        loading = Progress(message=f"loading base {config.base}")
        dtype = pick_dtype(config.precision, device)
        return self.kept.load(config.base, dtype, device, before=lambda: progress(loading))
