"""Prompts of an image from a sampling configuration and the words of its LoRAs' runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unziplora.config.recipe import KINDS
from unziplora.config.sample import GenerationConfig
from unziplora.config.templates import fill
from unziplora.config.zip import joined_prompt
from unziplora.errors import UserError
from unziplora.models.text import Prompts
from unziplora.sampling.sources import LoraSource


def plan_prompts(config: GenerationConfig, sources: Sequence[LoraSource]) -> list[Prompts]:
    """Fill the prompts of every image: three if both LoRAs see their own, else one.

    Raises:
        UserError: no prompt is given and the runs have none, or a placeholder is unknown.
    """
    by_kind = {source.kind: source for source in sources}
    words = _words(by_kind)
    fulls = [fill(prompt, words) for prompt in config.prompts] or [_default_prompt(sources, words)]
    if not _separate(config, by_kind):
        return [Prompts(full) for full in fulls]
    content, style = (_own_prompt(config, by_kind[kind], words) for kind in KINDS)
    return [Prompts(full, content, style) for full in fulls]


def _words(by_kind: Mapping[str, LoraSource]) -> dict[str, str]:
    """Return the words of all placeholders: the style's run has the style, the content's run all others."""
    content, style = (by_kind[kind].words if kind in by_kind else {} for kind in KINDS)
    words = {**style, **content}
    return words | {"style": style["style"]} if "style" in style else words


def _default_prompt(sources: Sequence[LoraSource], words: Mapping[str, str]) -> str:
    if len(sources) == 2:
        prompt = _combined_prompt(sources[0], sources[1], words)
    else:
        prompt = next((source.filled_prompt("full" if source.merged else source.kind) for source in sources), None)
    if prompt is None:
        files = ", ".join(str(source.file) for source in sources)
        triggers = ", ".join(source.trigger for source in sources if source.trigger)
        hint = f", with its trigger words: {triggers}" if triggers else ""
        raise UserError(f"{files} contains no prompt: describe the image with --prompts{hint}")
    return prompt


def _combined_prompt(content: LoraSource, style: LoraSource, words: Mapping[str, str]) -> str | None:
    """Return the prompt of content and style together.

    Of one run it is the run's own. Of two it is the content's with the style's words in it. If the content's has no
    place for them, or the style has a prompt and no words (B-LoRA), both prompts are joined. After a content LoRA
    that was trained alone, the style's words follow.
    """
    prompt = content.prompt("full")
    one_run = content.file.parent == style.file.parent
    if not one_run and not (prompt and "{style}" in prompt and style.settings.get("style")):
        own, manner = content.filled_prompt("content"), style.filled_prompt("style")
        if own and manner:
            return joined_prompt(own, manner)
    if prompt and not content.settings.get("full_prompt") and "style" in words:
        prompt = f"{prompt} in {{style}} style"
    return prompt and fill(prompt, words)


def _separate(config: GenerationConfig, by_kind: Mapping[str, LoraSource]) -> bool:
    if len(by_kind) < 2 or config.mode == "direct":
        return False
    unknown = [kind for kind in KINDS if not (getattr(config, f"{kind}_prompt") or by_kind[kind].prompt(kind))]
    if unknown and config.mode == "separate":
        raise UserError(
            f"mode separate: {by_kind[unknown[0]].file} contains no prompt of its own; give --{unknown[0]}-prompt"
        )
    return not unknown


def _own_prompt(config: GenerationConfig, source: LoraSource, words: Mapping[str, str]) -> str:
    template: str | None = getattr(config, f"{source.kind}_prompt")
    return fill(template, words) if template else source.filled_prompt(source.kind) or ""
