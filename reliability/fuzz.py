"""Damaged inputs of every sort: each is read, or refused by a message, within the time limit."""

from __future__ import annotations

import random
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability import mutations
from reliability.campaign import Failure
from reliability.corpus import make_corpus
from reliability.processes import forked
from reliability.workshop import METHODS, Workshop, use_cache
from unziplora.bench.contenders import read_settings
from unziplora.bench.photos import load_photos
from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import UnziploraError
from unziplora.formats.convert import convert, resize_file
from unziplora.formats.files import read_lora
from unziplora.formats.inspect import inspect
from unziplora.images.preprocess import ImageFile, load_image, load_images
from unziplora.lora.blocks import read_blocks
from unziplora.models.base import load_base
from unziplora.models.sizes import inspect_base
from unziplora.runs.folder import RunFolder
from unziplora.sampling.sources import find_loras, loras_of
from unziplora.utils.inputs import read_toml
from unziplora.utils.text import printable

Damage = Callable[[random.Random, Path], object]


@dataclass(frozen=True)
class Target:
    """A reader and how its inputs are made: a file of a corpus folder is damaged, and its path or folder is read.

    Attributes:
        share: how often this target is chosen.
        whole: the whole corpus folder is copied, and the readers receive its only entry.
        inner: pattern of the files that may be damaged.
    """

    corpus: str
    share: int
    damage: Damage
    readers: tuple[Callable[[Path], object], ...]
    whole: bool = False
    inner: str = "*"


def damage_image(draw: random.Random, file: Path) -> None:
    file.write_bytes(mutations.damage_bytes(draw, file.read_bytes()))


def damage_any(draw: random.Random, file: Path) -> None:
    """Damage a file by its suffix."""
    damage = {".json": mutations.damage_json, ".toml": mutations.damage_toml}
    damage[".safetensors"] = mutations.damage_safetensors
    damage.get(file.suffix, damage_image)(draw, file)


def _image(file: Path) -> object:
    return load_image(file, 32)


def _masked(file: Path) -> object:
    return load_images([ImageFile(file, mask=file, crop=(0, 0, 16, 16))], [(32, 32), (24, 40)])


def _inspect(file: Path) -> str:
    return str(inspect(file))


def _convert(file: Path) -> object:
    return convert(file, file.parent / "converted" / "new.safetensors")


def _resize(file: Path) -> object:
    return resize_file(file, file.parent / "resized" / "new.safetensors", rank=1)


def _recipe(file: Path) -> object:
    return resolve(SplitConfig, read_toml(file), {"out": file.parent / "out"}).model_dump_json()


def _photos(file: Path) -> object:
    return load_photos(file.parent, 32)


def _prompts(run: Path) -> object:
    config = resolve(SampleConfig, dict(loras_of(run)))
    return [(source.words, source.trigger, source.filled_prompt("full")) for source in find_loras(config)]


def _resume(run: Path) -> object:
    folder = RunFolder(run)
    config = folder.config(SplitConfig)
    with RunFolder.resumed(run, config) as opened:
        return opened.read_log(), opened.steps()


def _load_base(path: Path) -> object:
    return load_base(str(path)).fingerprint()


def _inspect_base(path: Path) -> object:
    return inspect_base(str(path))


LORA_READERS = (read_lora, _inspect, _convert, _resize)
TARGETS = {
    "LoRA file": Target("lora", 30, mutations.damage_safetensors, LORA_READERS),
    "PEFT folder": Target("peft", 12, damage_any, (read_lora,), whole=True),
    "image": Target("image", 25, damage_image, (_image, _masked)),
    "recipe": Target("toml", 10, mutations.damage_toml, (_recipe,), inner="split.toml"),
    "block map": Target("toml", 6, mutations.damage_toml, (lambda file: read_blocks(str(file)),), inner="blocks.toml"),
    "settings": Target("toml", 3, mutations.damage_toml, (read_settings,), inner="settings.toml"),
    "photos": Target("toml", 3, mutations.damage_toml, (_photos,), inner="words.toml"),
    "run folder": Target("run", 10, damage_any, (_prompts, _resume), whole=True),
    "configuration of a base": Target("base", 4, damage_any, (_inspect_base,), whole=True, inner="*.json"),
    "base": Target("base", 2, damage_any, (_load_base,), whole=True),
    "checkpoint of a base": Target("checkpoint", 3, damage_any, (_load_base,), inner="tiny.safetensors"),
}


class Fuzz:
    """Damaged files, each given to one reader."""

    name = "fuzz"
    seconds = 10.0

    def __init__(self, shop: Workshop) -> None:
        self.corpus = shop.folder / "corpus"
        run = shop.folder / "to-read" / "run"

        def finish() -> str:
            use_cache(run.parent / "cache")
            shop.train(METHODS[0], shop.config(METHODS[0], run))
            return "finished"

        ending = forked(finish)
        if not ending.text:
            raise RuntimeError(f"the run to read failed: {ending}")
        make_corpus(shop, self.corpus, run)

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Damage one file, or now and then two, and read it."""
        warnings.simplefilter("ignore")
        use_cache(folder / "cache")
        names = list(TARGETS)
        (name,) = draw.choices(names, [TARGETS[name].share for name in names])
        target = TARGETS[name]
        path = self._make(draw, target, folder / "input")
        reader = draw.choice(target.readers)
        try:
            text = str(reader(path))
        except UnziploraError as error:
            _check_printable(str(error), path)
            return [f"{name}: refused"]
        except BaseException:
            raise Failure("fault", f"{name} {path.name}: {traceback.format_exc()}") from None
        if reader is _inspect:
            _check_printable(text, path)
        return [f"{name}: read"]

    def _make(self, draw: random.Random, target: Target, folder: Path) -> Path:
        """Copy an input from the corpus, damage it and return it."""
        source = self.corpus / target.corpus
        if target.whole:
            (entry,) = source.iterdir()
            path = Path(shutil.copytree(entry, folder / entry.name))
            files = [file for file in sorted(path.rglob(target.inner)) if file.is_file() and file.stat().st_size]
        else:
            shutil.copytree(source, folder)
            files = sorted(folder.glob(target.inner))
            path = draw.choice(files)
            files = [path]
        for _ in range(draw.choice((1, 1, 1, 2))):
            target.damage(draw, draw.choice(files))
        return path


def _check_printable(text: str, path: Path) -> None:
    """Check that a text reaches the terminal without control characters.

    Raises:
        Failure: it contains some.
    """
    text = printable(text)  # as every command prints it
    odd = {character for character in text if not character.isprintable() and character not in "\n\t"}
    if odd:
        raise Failure("fault", f"control characters {odd} from {path.name} reach the terminal: {text[:300]!r}")
