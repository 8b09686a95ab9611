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
from unziplora.utils.files import file_stem


def plan_prompts(config: GenerationConfig, sources: Sequence[LoraSource]) -> list[Prompts]:
    """Fill the prompts of every image: three if both LoRAs see their own, else one.

    Raises:
        UserError: no prompt is given and the runs have none, or a placeholder is unknown.
    """
    by_kind = {source.kind: source for source in sources}
    words = _words(by_kind)
    fulls = [fill(prompt, words) for prompt in config.prompts] or [_required_prompt(sources)]
    if not _separate(config, by_kind):
        return [Prompts(full) for full in fulls]
    content, style = (_own_prompt(config, by_kind[kind], words) for kind in KINDS)
    return [Prompts(full, content, style) for full in fulls]


def default_prompt(sources: Sequence[LoraSource]) -> str | None:
    """Return the prompt that the runs of one LoRA, or of a content and a style, trained with; None if it is not known.

    Raises:
        UserError: a recorded prompt has an unknown placeholder.
    """
    if len(sources) == 2:
        return _combined_prompt(sources[0], sources[1], _words({source.kind: source for source in sources}))
    return next((source.filled_prompt("full" if source.merged else source.kind) for source in sources), None)


def _words(by_kind: Mapping[str, LoraSource]) -> dict[str, str]:
    """Return the words of all placeholders: the style LoRA has the style, the content LoRA all others.

    The style of the content's image is none of them if there is a style LoRA.
    """
    content, style = (by_kind[kind].words if kind in by_kind else {} for kind in KINDS)
    words = {**style, **content}
    if "style" in by_kind:
        words.pop("style", None)
    return words | {name: word for name, word in style.items() if name == "style"}


def _required_prompt(sources: Sequence[LoraSource]) -> str:
    prompt = default_prompt(sources)
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
    if not _of_one_run(content, style) and not (prompt and "{style}" in prompt and "style" in words):
        own, manner = content.filled_prompt("content"), style.filled_prompt("style")
        if own and manner:
            return joined_prompt(own, manner)
    if prompt and not content.settings.get("full_prompt") and "style" in words:
        prompt = f"{prompt} in {{style}} style"
    return fill(prompt, words) if prompt and ("style" in words or "{style}" not in prompt) else None


def _of_one_run(content: LoraSource, style: LoraSource) -> bool:
    """Return whether two files come from one run. The folder does not tell: many lie in one, such as `models/loras`."""
    names = [file_stem(source.file).removesuffix(source.kind) for source in (content, style)]
    return content.wording == style.wording and names[0] == names[1]


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
