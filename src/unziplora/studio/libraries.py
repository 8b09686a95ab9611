"""Heavy libraries of the server. Two threads must not import them at once: parts of diffusers are missing then."""

from __future__ import annotations

import threading
from importlib import import_module
from pkgutil import resolve_name

from unziplora.jobs.trainings import TRAININGS

_LOCK = threading.Lock()
_MODULES = ("api", "models.sizes", "training.memory", "training.preflight", "sampling.sample", "sampling.sources")


def load() -> None:
    """Import all that the page needs, or wait until another thread has done so."""
    with _LOCK:
        for name in _MODULES:
            import_module(f"unziplora.{name}")
        for training in TRAININGS.values():
            resolve_name(training.function)
