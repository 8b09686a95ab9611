"""Prompts of two LoRAs of any origin: whose words they contain, and when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unziplora.config.sample import SampleConfig
from unziplora.errors import UserError
from unziplora.sampling.prompts import default_prompt, plan_prompts
from unziplora.sampling.sources import LoraSource

SPLIT = {
    "full_prompt": "a {token} {content} in {style} style",
    "content_prompt": "a {token} {content}",
    "style_prompt": "an image in {style} style",
}
CAT = {**SPLIT, "token": "sks", "content": "cat", "style": "ink"}
FOX = {**SPLIT, "token": "sks", "content": "fox", "style": "oil paint"}
BLORA = {
    "token": "v7",
    "full_prompt": "A {token}",
    "content_prompt": "A {token}",
    "style_prompt": "an image in {token} style",
}
ALONE = {"token": "sks", "content": "cat", "prompts": ["a {token} {content}"]}


def pair(content: tuple[str, dict[str, Any]], style: tuple[str, dict[str, Any]]) -> list[LoraSource]:
    """Return sources from the names of files in one folder and the settings in their headers."""
    named = {"content": content, "style": style}
    return [LoraSource(kind, Path("loras") / file, settings) for kind, (file, settings) in named.items()]


@pytest.mark.parametrize(
    ("content", "style", "prompt"),
    [
        (("cat-content.safetensors", CAT), ("cat-style.safetensors", CAT), "a sks cat in ink style"),
        (("cat-content.safetensors", CAT), ("fox-style.safetensors", FOX), "a sks cat in oil paint style"),
        (("cat-content.safetensors", CAT), ("b-style.safetensors", BLORA), "a sks cat in v7 style"),
        (("b-content.safetensors", BLORA), ("cat-style.safetensors", CAT), "A v7 in ink style"),
        (("b-content.safetensors", BLORA), ("b-style.safetensors", BLORA), "A v7"),
        (("one.safetensors", ALONE), ("cat-style.safetensors", CAT), "a sks cat in ink style"),
        (
            ("cat-content.safetensors", {**CAT, "full_prompt": "my {content} drawn"}),
            ("fox-style.safetensors", FOX),
            "a sks cat in oil paint style",
        ),
        (
            ("cat-content.safetensors", {**CAT, "full_prompt": "my {content} drawn"}),
            ("cat-style.safetensors", {**CAT, "full_prompt": "my {content} drawn"}),
            "my cat drawn",
        ),
        (("cat-content.safetensors", CAT), ("watercolor.safetensors", {}), None),
        (("foreign.safetensors", {}), ("cat-style.safetensors", CAT), None),
        (("foreign.safetensors", {}), ("watercolor.safetensors", {}), None),
    ],
)
def test_files_of_one_folder_get_the_prompt_of_their_own_runs(content: Any, style: Any, prompt: str | None) -> None:
    assert default_prompt(pair(content, style)) == prompt


def test_style_of_the_contents_image_is_not_asked_for_with_another_style_lora() -> None:
    sources = pair(("cat-content.safetensors", CAT), ("watercolor.safetensors", {}))
    foreign = LoraSource("style", sources[1].file, header={"modelspec.trigger_phrase": "wtrclr"})
    files = {"content": sources[0].file, "style": foreign.file}
    with pytest.raises(UserError, match=r"contains no prompt: .* trigger words: wtrclr"):
        plan_prompts(SampleConfig(**files), [sources[0], foreign])
    with pytest.raises(UserError, match=r"\{style\} is not known here; known: \{token\}, \{content\}$"):
        plan_prompts(SampleConfig(**files, prompts=["a dog in {style} style"]), [sources[0], foreign])
    (prompts,) = plan_prompts(SampleConfig(content=files["content"], prompts=["a dog in {style} style"]), sources[:1])
    assert prompts.full == "a dog in ink style"
