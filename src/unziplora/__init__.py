"""Split one image into a content LoRA and a style LoRA for SDXL, in files that every tool loads.

    import unziplora

    run = unziplora.split("cat.jpg", content="cat", style="pencil sketch")
    images = unziplora.sample(run, prompts=["a sks cat on a beach"])

Importing the package takes milliseconds: a name is loaded when it is first used, and torch only with a name that needs
it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unziplora.api import (
        Run,
        convert,
        find_blocks,
        grid,
        inspect,
        load_base,
        read_lora,
        resize,
        sample,
        split,
        train_blora,
        train_dreambooth,
        write_lora,
        zip_loras,
    )
    from unziplora.config.blora import BLoraConfig
    from unziplora.config.dreambooth import DreamBoothConfig
    from unziplora.config.probe import ProbeConfig
    from unziplora.config.sample import GridConfig, SampleConfig
    from unziplora.config.split import SplitConfig
    from unziplora.config.zip import ZipConfig
    from unziplora.errors import Interrupted, MachineError, OutOfMemory, UnziploraError, UserError

__version__ = version("unziplora")

_MODULES = {
    "unziplora.api": (
        *("split", "train_dreambooth", "train_blora", "zip_loras", "sample", "grid", "find_blocks", "Run"),
        *("inspect", "convert", "resize", "read_lora", "write_lora", "load_base"),
    ),
    "unziplora.config.split": ("SplitConfig",),
    "unziplora.config.dreambooth": ("DreamBoothConfig",),
    "unziplora.config.blora": ("BLoraConfig",),
    "unziplora.config.zip": ("ZipConfig",),
    "unziplora.config.sample": ("SampleConfig", "GridConfig"),
    "unziplora.config.probe": ("ProbeConfig",),
    "unziplora.errors": ("UnziploraError", "UserError", "MachineError", "OutOfMemory", "Interrupted"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    "split",
    "train_dreambooth",
    "train_blora",
    "zip_loras",
    "sample",
    "grid",
    "find_blocks",
    "inspect",
    "convert",
    "resize",
    "read_lora",
    "write_lora",
    "load_base",
    "Run",
    "SplitConfig",
    "DreamBoothConfig",
    "BLoraConfig",
    "ZipConfig",
    "SampleConfig",
    "GridConfig",
    "ProbeConfig",
    "UnziploraError",
    "UserError",
    "MachineError",
    "OutOfMemory",
    "Interrupted",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unziplora' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
