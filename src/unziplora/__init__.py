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

from unziplora.errors import Interrupted, MachineError, OutOfMemory, UnziploraError, UserError

if TYPE_CHECKING:
    from unziplora.api import *  # noqa: F403
    from unziplora.config.bases import BUNDLED_BASE
    from unziplora.config.blora import BLoraConfig
    from unziplora.config.dreambooth import DreamBoothConfig
    from unziplora.config.probe import ProbeConfig
    from unziplora.config.sample import GridConfig, SampleConfig
    from unziplora.config.split import SplitConfig
    from unziplora.config.zip import ZipConfig

__version__ = version("unziplora")

# fmt: off
# ruff: noqa: F405, RUF022
__all__ = [  # in the order in which a reader meets them
    "split", "train_dreambooth", "train_blora", "zip_loras", "sample", "grid", "find_blocks", "Run",
    "batch", "Queue", "work", "find_runs",
    "inspect", "convert", "resize", "read_lora", "write_lora", "load_base",
    "SplitConfig", "DreamBoothConfig", "BLoraConfig", "ZipConfig", "SampleConfig", "GridConfig", "ProbeConfig",
    "BUNDLED_BASE", "UnziploraError", "UserError", "MachineError", "OutOfMemory", "Interrupted",
]
# fmt: on


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562); configurations load no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'unziplora' has no attribute {name!r}")
    recipe = {"GridConfig": "sample", "BUNDLED_BASE": "bases"}.get(name) or name.removesuffix("Config").lower()
    module = f"config.{recipe}" if name.endswith(("Config", "BASE")) else "api"
    value = globals()[name] = getattr(import_module(f"unziplora.{module}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
