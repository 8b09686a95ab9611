"""Names of base models: SDXL's on the hub, and the small base that ships with the package."""

from __future__ import annotations

import os
import re
from pathlib import Path

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

SDXL_FILE = "sd_xl_base_1.0"
"""Start of the name of Stability's own files of it; one has another VAE."""

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?")
"""A model's name on the hub, owner/name."""

BUNDLED_BASE = Path(__file__).parents[1] / "models" / "bundled" / "emoji-xl"
"""Folder of the base that ships with the package, called `bundled`."""


def is_bundled(base: str | Path | None) -> bool:
    """Check whether a base is the one that ships with the package, given by its name or by the path of its folder."""
    if base is None or "\0" in str(base):
        return False
    if base == "bundled":
        return True
    return os.path.realpath(os.path.expanduser(base)) == os.path.realpath(BUNDLED_BASE)
