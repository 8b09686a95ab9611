"""What two recipes of a run must have in common, so that one goes on where the other was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from unziplora.config.recipe import Recipe
from unziplora.lora.blocks import NAMED
from unziplora.utils.files import whole

R = TypeVar("R", bound=Recipe)


def absolute(config: R) -> R:
    """The same configuration with absolute paths, so that it works from any folder."""
    paths: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, Path) and name != "out":
            paths[name] = whole(value)
        elif isinstance(value, list) and value and all(isinstance(item, Path) for item in value):
            paths[name] = [whole(item) for item in value]
    for name in ("base", "blocks"):  # a file or folder, or a name that stays one, whatever files are called so
        value = getattr(config, name, None)
        if value is not None and value not in NAMED and Path(value).expanduser().exists():
            paths[name] = str(whole(Path(value).expanduser()))
    return config.model_copy(update=paths)


def differing(saved: R, config: R) -> list[str]:
    """Names of the keys in which two recipes of a kind say something else of what is learnt."""
    one, two = absolute(saved), absolute(config)
    skipped = two.marked("may_change")
    return [name for name, value in two if name not in skipped and value != getattr(one, name)]
