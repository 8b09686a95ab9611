"""Origins of LoRAs: run folders or files, with the words, settings and base of their training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unziplora.config.bases import SDXL, SDXL_FILE, is_bundled
from unziplora.config.recipe import KINDS
from unziplora.config.sample import GenerationConfig
from unziplora.config.templates import fill
from unziplora.errors import UserError
from unziplora.formats.header import trigger_words
from unziplora.formats.safetensors import read_header
from unziplora.images.preprocess import share_lost
from unziplora.models.base import Scale
from unziplora.models.hub import names_a_model
from unziplora.runs.folder import MERGED, RunFolder
from unziplora.utils.files import file_stem
from unziplora.utils.inputs import parse_json, read_toml


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file of a kind, content or style, with its header and the configuration of its run, if recorded."""

    kind: str
    file: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """Base that the LoRA was trained on, as its run or its header names it; None if neither does."""
        name = str(self.settings.get("base") or self.header.get("ss_sd_model_name") or "")
        if name.startswith(SDXL_FILE):
            return SDXL
        return "bundled" if name and is_bundled(name) else name or None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the training images, if unziplora trained the LoRA."""
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.header.get("modelspec.resolution", ""))
        return (int(size[1]), int(size[2])) if size and "unziplora.version" in self.header else None

    @property
    def trigger(self) -> str | None:
        return next(iter(trigger_words(self.header)), None)

    @property
    def words(self) -> dict[str, str]:
        """Token, content and style of the run, as far as they are recorded."""
        return {name: str(self.settings[name]) for name in ("token", "content", "style") if self.settings.get(name)}

    @property
    def wording(self) -> dict[str, Any]:
        """Words and prompts of the run, as far as they are recorded."""
        prompts = {name: text for name, text in self.settings.items() if name == "prompts" or name.endswith("_prompt")}
        return {**self.words, **prompts}

    @property
    def merged(self) -> bool:
        if kind := _recorded_kind(self.header):
            return kind == MERGED
        return RunFolder(self.file.parent).lora_name(self.file) == MERGED

    def prompt(self, name: str) -> str | None:
        """Return the run's template of the full, content or style prompt, or None if none is recorded."""
        if self.settings.get(f"{name}_prompt"):
            return str(self.settings[f"{name}_prompt"])
        trained = self.settings.get("prompts")  # of a LoRA that was trained alone, one for all its images
        return str(trained[0]) if trained and name in (self.kind, "full") else None

    def filled_prompt(self, name: str) -> str | None:
        """Return the run's full, content or style prompt with the run's own words, or None if none is recorded."""
        prompt = self.prompt(name)
        return prompt if prompt is None else fill(prompt, self.words)


def loras_of(run: Path) -> dict[str, Path]:
    """Return the LoRAs of a run folder by kind: content and style, or the merged LoRA as content.

    A file is one LoRA, of either kind. An unfinished run is returned for both kinds, so that one that stopped
    between its two files does not pass for a content alone.

    Raises:
        UserError: the path is a file, but not a LoRA.
    """
    folder = run.expanduser()
    if folder.is_file():
        return {"style" if _is_style(folder) else "content": run}
    loras = RunFolder(folder).loras
    if MERGED in loras:
        return {"content": loras[MERGED]}
    return dict.fromkeys(loras, run) if loras and not RunFolder(folder).unfinished else dict.fromkeys(KINDS, run)


def _is_style(file: Path) -> bool:
    """Check whether a LoRA is a style, by the method in its header, else by the words of its name."""
    if kind := _recorded_kind(read_header(file).metadata):
        return kind == "style"
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", file_stem(file))
    return any(word.lower() in ("style", "styles") for word in words)


def _recorded_kind(header: Mapping[str, str]) -> str | None:
    """Return the kind of a LoRA that unziplora wrote, as its header records it: content, style or `MERGED`."""
    recorded = re.search(r", (\w+) LoRA$", header.get("unziplora.method", ""))
    return recorded[1] if recorded else None


def find_loras(config: GenerationConfig) -> list[LoraSource]:
    """Find the LoRAs of a configuration, content first. Errors as in `find_lora`."""
    return [find_lora(path, kind) for kind in KINDS if (path := getattr(config, kind)) is not None]


def find_lora(path: Path, kind: str) -> LoraSource:
    """Find the LoRA of a kind in a run folder, or a LoRA file, and read config.toml or the header; no weights.

    A file that is of the other kind by its header brings a warning.

    Raises:
        UserError: there is no such folder or file, the run is not finished, or the file is damaged.
    """
    file = _lora_file(path.expanduser(), kind)
    header = read_header(file).metadata
    recorded = _recorded_kind(header)
    if recorded in KINDS and recorded != kind:
        warnings.warn(
            f"{file}: this is a {recorded} LoRA by its header, used for the {kind}; if that is a mix-up, give it as "
            f"the {recorded}",
            stacklevel=2,
        )
    return LoraSource(kind, file, _settings(file, header), header)


def _lora_file(path: Path, kind: str) -> Path:
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder or LoRA file for the {kind}")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    file = RunFolder(path).lora(kind)
    if not file.is_file():
        raise UserError(f"{path}: there is no {file.name} in it; {_remedy(RunFolder(path))}")
    return file


def _remedy(run: RunFolder) -> str:
    others = [file.name for file in run.loras.values()]
    if run.unfinished or (not others and run.config_file.is_file()):
        return "the run is not finished: resume it, or give a LoRA file"
    if others:
        return f"it contains {' and '.join(others)}: give the file that you mean"
    return "this is not a run folder: give one, or a LoRA file"


def _settings(file: Path, header: Mapping[str, str]) -> Mapping[str, Any]:
    run = RunFolder(file.parent)
    if run.config_file.is_file() and run.lora_name(file):
        settings = read_toml(run.config_file)
    else:
        try:
            settings = parse_json(header.get("unziplora.settings", "{}"))
        except ValueError:
            return {}
    return {name: value for name, value in settings.items() if _usable(name, value)} if type(settings) is dict else {}


def _usable(name: str, value: Any) -> bool:
    """Return whether a recorded setting is of the type that it is read as; a header may contain anything."""
    if name in ("base", "token", "content", "style") or name.endswith("_prompt"):
        return isinstance(value, str) and "\0" not in value
    if name in ("prompts", "images", "masks", "crop"):
        return isinstance(value, list) and all(isinstance(item, str) and "\0" not in item for item in value)
    return name != "sample_guidance" or (isinstance(value, (int, float)) and 1 <= value < 1e6)


def choose_base(config: GenerationConfig, sources: Sequence[LoraSource]) -> str:
    """Return the base to use: the configured one, else the one of the LoRAs, else SDXL base 1.0.

    Raises:
        UserError: the LoRAs were trained on different bases, or on one that is not available under its name.
    """
    return config.base or require_available(training_base(sources), sources) or SDXL


def training_base(sources: Iterable[LoraSource]) -> str | None:
    """Return the base that the LoRAs were trained on, or None if none is recorded.

    Raises:
        UserError: they were trained on different ones.
    """
    bases = {source.base: source.file for source in sources if source.base}
    for base in list(bases):
        if any(base != other and _is_last_part(base, other) for other in bases):
            del bases[base]
    if len(bases) > 1:
        pairs = ", ".join(f"{file} on {base}" for base, file in bases.items())
        raise UserError(f"the LoRAs were trained on different bases ({pairs}): choose one with --base")
    return next(iter(bases), None)


def _is_last_part(base: str, other: str) -> bool:
    """Return whether a base named in a header is the one at a path: its last part, or SDXL for Stability's own file."""
    name = Path(other).name
    return base == name or (base == SDXL and name.startswith(SDXL_FILE))


def require_available(base: str | None, sources: Iterable[LoraSource]) -> str | None:
    """Return the base of some LoRAs if it can be opened by its name; headers contain only the last part of a path.

    Raises:
        UserError: it is not available under that name.
    """
    if base is None or is_bundled(base) or names_a_model(base):
        return base
    with suppress(OSError, RuntimeError):  # a name too long for a file, or of a home that no one has
        if Path(base).expanduser().exists():
            return base
    files = " and ".join(str(source.file) for source in sources if source.base == base)
    raise UserError(f"{files}: trained on {base}, which is not here under that name: give its path with --base")


def choose_size(config: GenerationConfig, sources: Iterable[LoraSource], scale: Scale) -> tuple[int | None, int | None]:
    """Return the configured width and height, else the base's size of the proportions in which a LoRA was trained."""
    trained = next((source.size for source in sources if source.size), None)
    if config.width or config.height or not trained or not all(trained) or trained[0] == trained[1]:
        return config.width, config.height
    return min(scale.sizes(scale.resolution), key=lambda size: share_lost(trained, size))


def choose_guidance(config: GenerationConfig, sources: Iterable[LoraSource]) -> float:
    """Return the configured guidance, else that of the first run that records one, else 5."""
    recorded = (float(value) for source in sources if (value := source.settings.get("sample_guidance")))
    return config.guidance or next(recorded, 5.0)
