"""Single flipped bits in what an interrupted run has saved: the result is equal, or the damage is named."""

from __future__ import annotations

import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

from reliability.campaign import Failure
from reliability.kills import Kills
from reliability.processes import forked
from reliability.workshop import METHODS, STEPS, Method, Workshop, check_equal, pick, use_cache
from unziplora.errors import UnziploraError
from unziplora.runs.folder import LOCK, LOCK_OWNER, RunFolder
from unziplora.utils.progress import Progress

IRRELEVANT = {LOCK, LOCK_OWNER}


class Flips:
    """Interrupted runs of every method in which one bit of one file is flipped before they are resumed."""

    name = "flips"
    seconds = 60.0

    def __init__(self, shop: Workshop, kills: Kills) -> None:
        self.shop, self.references = shop, kills.references
        for method in METHODS:
            ending = forked(partial(self._interrupted, method))
            if ending.signal != signal.SIGKILL:
                raise RuntimeError(f"the run of {method.name} was not killed: {ending}")

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Flip a bit, then resume."""
        method = pick(draw)
        shutil.copytree(self.shop.folder / "interrupted" / method.name, folder, dirs_exist_ok=True)
        use_cache(folder / "cache")
        file = self._flip(draw, folder)
        run = RunFolder(folder / "run")
        try:
            saved = run.config(method.recipe).model_copy(update={"out": run.path})
            self.shop.train(method, saved, resume=True)
        except UnziploraError as error:
            if not any(word in str(error) for word in (file.name, "damaged", "config.toml", "differ")):
                raise Failure("lost", f"{file}: a message without the damage: {error}") from None
            return [f"{kind(file)}: the damage is named"]
        try:
            check_equal(run, self.references[method.name])
        except Failure as failure:
            raise Failure(failure.kind, f"{file}: {failure}") from None
        return [f"{kind(file)}: equal"]

    def _interrupted(self, method: Method) -> str:
        """Run a method and kill it one step before its end."""
        folder = self.shop.folder / "interrupted" / method.name
        use_cache(folder / "cache")

        def kill(event: Progress) -> None:
            if event.step == STEPS - 1 and not event.message:
                os.kill(os.getpid(), signal.SIGKILL)

        self.shop.train(method, self.shop.config(method, folder / "run"), progress=kill)
        return "finished"

    def _flip(self, draw: random.Random, folder: Path) -> Path:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in IRRELEVANT]
        large = [file for file in files if file.suffix == ".safetensors"]
        file = draw.choice(large if large and draw.random() < 0.5 else [file for file in files if file.stat().st_size])
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        return file.relative_to(folder)


def kind(file: Path) -> str:
    """Return what a file of a run is."""
    if "cache" in file.parts:
        return "class images"
    return "checkpoint" if "checkpoints" in file.parts else file.name if len(file.parts) == 2 else file.parts[1]
