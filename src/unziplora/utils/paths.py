"""Paths as a user knows them."""

from __future__ import annotations

import os
from pathlib import Path


def whole(path: Path) -> Path:
    """An absolute path whose links keep their names: in the hub's cache they lead to files without a suffix."""
    return Path(os.path.abspath(path))
