"""Another split in a process of its own: the training of a small base leaves most of a machine idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from unziplora.config.recipe import to_toml
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, MachineError, UnziploraError, UserError
from unziplora.runs.folder import with_absolute_paths


@contextmanager
def beside(config: SplitConfig, threads: int) -> Iterator[Callable[[], None]]:
    """Split a picture in another process; yield what waits for its end.

    Where the context is left before that, the process is stopped.

    Args:
        config: the recipe.
        threads: of torch in the other process.

    Raises:
        UserError, MachineError, Interrupted: on waiting, as `split`.
    """
    with TemporaryDirectory() as place:
        recipe, said = Path(place) / "split.toml", Path(place) / "said"
        recipe.write_text(to_toml(with_absolute_paths(config)), encoding="utf-8")
        command = [sys.executable, "-m", "unziplora", "split", "--quiet", "--json", "--config", str(recipe)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with said.open("wb") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.DEVNULL)

        def wait() -> None:
            if process.wait():
                raise _failure(process.returncode, said.read_text(encoding="utf-8", errors="replace"))

        try:
            yield wait
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _failure(code: int, said: str) -> UnziploraError:
    """The error that a process ended with."""
    try:
        text = str(json.loads(said)["error"])
    except (ValueError, KeyError, TypeError):
        text = f"the other process ended with code {code}"
    kinds: dict[int, type[UnziploraError]] = {kind.exit_code: kind for kind in (UserError, Interrupted)}
    return kinds.get(code, MachineError)(text)
