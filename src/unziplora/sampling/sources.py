"""Where LoRAs for sampling come from, run folders or files, and the words that go with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unziplora.config.bases import SDXL, is_bundled
from unziplora.config.recipe import KINDS, read_toml
from unziplora.config.sample import GenerationConfig
from unziplora.config.templates import fill
from unziplora.config.zip import joined_prompt
from unziplora.errors import UserError
from unziplora.formats.header import trigger_words
from unziplora.models.hub import names_a_model
from unziplora.models.text import Prompts
from unziplora.runs.folder import MERGED, RunFolder


@dataclass(frozen=True)
class Source:
    """A LoRA file and what is known of its training.

    Attributes:
        kind: 'content' or 'style'.
        file: the LoRA.
        run: keys of the run's configuration; empty for a file that tells nothing.
        header: what the file says of itself.
    """

    kind: str
    file: Path
    run: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """What the LoRA was trained on, in the words of its run or of its header; None: neither tells."""
        told = str(self.run.get("base") or self.header.get("ss_sd_model_name") or "")
        if is_bundled(told):
            return "bundled"
        return SDXL if told.startswith("sd_xl_base_1.0") else told or None  # as Stability's own file is called

    @property
    def trigger(self) -> str | None:
        """The first trigger word that the header tells."""
        return next(iter(trigger_words(self.header)), None)

    def prompt(self, name: str) -> str | None:
        """The run's template of the full, content or style prompt, or None if none is known."""
        if self.run.get(f"{name}_prompt"):
            return str(self.run[f"{name}_prompt"])
        trained = self.run.get("prompts")  # of a LoRA that was trained alone, one for all its pictures
        return str(trained[0]) if trained and name in (self.kind, "full") else None

    def filled_prompt(self, name: str) -> str | None:
        """The run's content or style prompt with the run's own words in it, or None if none is known."""
        prompt = self.prompt(name)
        return prompt if prompt is None else fill(prompt, self.words)

    @property
    def words(self) -> dict[str, str]:
        """The run's token, content and style, as far as it tells them."""
        return {name: str(self.run[name]) for name in ("token", "content", "style") if self.run.get(name)}

    @property
    def merged(self) -> bool:
        """Whether the file is content and style in one."""
        return self.file.name.split(".")[0] == MERGED


def find_source(path: Path, kind: str) -> Source:
    """The LoRA of a kind in a run folder, or a LoRA file, with its run's configuration where it is known.

    That is config.toml beside the file, or the settings that our own files carry in their header.

    Raises:
        UserError: there is no such folder or file, or the run is not finished.
    """
    path = path.expanduser()
    try:
        if path.is_file():
            return Source(kind, path, _run(path))
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder or LoRA file, which should give the {kind}")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    file = path / f"{kind}.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: there is no {file.name} in it; {_instead(path)}")
    return Source(kind, file, _run(file))


def _instead(folder: Path) -> str:
    """What to do about a folder without the LoRA that was looked for."""
    others = [name for name in (*KINDS, MERGED) if (folder / f"{name}.safetensors").is_file()]
    if RunFolder(folder).unfinished or (not others and (folder / "config.toml").is_file()):
        return "the run is not finished: resume it, or give a LoRA file"
    if others:
        return f"it holds {' and '.join(f'{name}.safetensors' for name in others)}: give the file that you mean"
    return "this is no run folder: give one, or a LoRA file"


def _run(file: Path) -> dict[str, Any]:
    config = file.parent / "config.toml"
    if config.is_file() and file.name.split(".")[0] in (*KINDS, MERGED):
        return read_toml(config)
    return {}


def with_metadata(source: Source, metadata: Mapping[str, str]) -> Source:
    """The source with its file's header, and the settings in there if no run folder told them."""
    try:
        settings = source.run or json.loads(metadata.get("unziplora.settings", "{}"))
    except ValueError:
        settings = {}
    return replace(source, run=settings if isinstance(settings, Mapping) else {}, header=metadata)


def choose_base(config: GenerationConfig, sources: list[Source]) -> str:
    """The base to use: the one asked for, else the LoRAs' common one, else SDXL base 1.0.

    Raises:
        UserError: the LoRAs were trained on different bases, or on one that is not here under that name.
    """
    return config.base or at_hand(common_base(sources), sources) or SDXL


def at_hand(base: str | None, sources: Iterable[Source]) -> str | None:
    """The base that LoRAs tell of, which may be a mere name: headers keep the last part of a path.

    Raises:
        UserError: it is not here under that name.
    """
    if base is None or is_bundled(base) or names_a_model(base) or Path(base).expanduser().exists():
        return base
    files = " and ".join(str(source.file) for source in sources if source.base == base)
    raise UserError(f"{files}: trained on {base}, which is not here under that name: give its path with --base")


def common_base(sources: Iterable[Source]) -> str | None:
    """The base that all LoRAs were trained on, of those that tell.

    Raises:
        UserError: they were trained on different ones.
    """
    known = {source.base: source.file for source in sources if source.base}
    for base in list(known):  # of a path, headers keep the last part
        if any(base != other and base == Path(other).name for other in known):
            del known[base]
    if len(known) > 1:
        told = ", ".join(f"{file} on {base}" for base, file in known.items())
        raise UserError(f"the LoRAs were trained on different bases ({told}): choose one with --base")
    return next(iter(known), None)


def guidance(config: GenerationConfig, sources: list[Source]) -> float:
    """The guidance asked for, else that of the first run that tells one, else 5."""
    told = [float(source.run["sample_guidance"]) for source in sources if source.run.get("sample_guidance")]
    return config.guidance if config.guidance is not None else next(iter(told), 5.0)


def plan(config: GenerationConfig, sources: list[Source]) -> list[Prompts]:
    """The prompts of every picture: three each where both LoRAs get their own, else one.

    Raises:
        UserError: no prompt is given and none is known, or a word in braces is not known.
    """
    by_kind = {source.kind: source for source in sources}
    words = _words(by_kind)
    templates: dict[str, str | None] = {
        name: getattr(config, f"{name}_prompt") or (by_kind[name].filled_prompt(name) if name in by_kind else None)
        for name in KINDS
    }
    if len(by_kind) == 2:
        default = _full(by_kind["content"], by_kind["style"], words)
    else:
        default = sources[0].prompt("full" if sources[0].merged else sources[0].kind) if sources else None
    fulls: list[str | None] = list(config.prompts) or [default]
    if fulls[0] is None:
        files = ", ".join(str(source.file) for source in sources)
        triggers = ", ".join(source.trigger for source in sources if source.trigger)
        known = f", with its trigger words: {triggers}" if triggers else ""
        raise UserError(f"{files} does not tell its words: say what to show with --prompts{known}")
    separate = len(by_kind) == 2 and config.mode != "direct"
    unknown = [name for name, text in templates.items() if text is None]
    if separate and unknown:
        if config.mode == "separate":
            raise UserError(
                f"mode separate: give --{unknown[0]}-prompt, which {by_kind[unknown[0]].file} does not tell"
            )
        separate = False
    content, style = (fill(templates[name] or "", words) if separate else None for name in KINDS)
    return [Prompts(fill(text or "", words), content, style) for text in fulls]


def _full(content: Source, style: Source, words: Mapping[str, str]) -> str | None:
    """The prompt of content and style together.

    Of one run it is the run's own; of two it is the content's with the style's words in it. Where the content's has no
    place for them, or the style has a prompt and no words (B-LoRA), both prompts are joined. A content LoRA that was
    trained alone gets the style's words behind.
    """
    prompt = content.prompt("full")
    alone = not content.run.get("full_prompt")
    if content.file.parent != style.file.parent and not (prompt and "{style}" in prompt and style.run.get("style")):
        called, manner = content.filled_prompt("content"), style.filled_prompt("style")
        if called and manner:
            return joined_prompt(called, manner)
    return f"{prompt} in {{style}} style" if prompt and alone and "style" in words else prompt


def _words(by_kind: Mapping[str, Source]) -> dict[str, str]:
    """Token and content word come from the content LoRA, the style words from the style LoRA, if there."""
    content, style = (by_kind[kind].words if kind in by_kind else {} for kind in KINDS)
    words = {**style, **content}
    return words | {"style": style["style"]} if "style" in style else words
