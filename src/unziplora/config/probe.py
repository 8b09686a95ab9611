"""Recipe of `blocks`: the words to swap, and the settings of the images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationInfo, field_validator, model_validator

from unziplora.config.bases import SDXL
from unziplora.config.recipe import Precision, Recipe, expert, key, natural_seeds
from unziplora.config.templates import fill, plain_words


class WordPair(NamedTuple):
    """Words of prompt P and their replacements in prompt Q; one of the two is swapped at a time."""

    content: str
    style: str
    other_content: str
    other_style: str


class ProbeConfig(Recipe):
    """Find the blocks of a base that decide content and style (B-LoRA's probe, arXiv 2403.14572, section 4)."""

    base: str = key(SDXL, "Base model: 'bundled', a diffusers folder, a hub id or a .safetensors file.", "Input")
    out: Path = key(Path("blocks"), "Folder to create for the block map, the figures and the images.", "Input")

    contents: list[str] = key(
        ["house", "guitar", "cactus", "rocket", "penguin", "banana"],
        "Content words to swap; the base must know them.",
        "Prompts",
        min_length=2,
    )
    styles: list[str] = key(
        ["pencil sketch", "neon sign", "watercolor painting", "blueprint", "oil painting"],
        "Style phrases to swap; the base must know them.",
        "Prompts",
        min_length=2,
    )
    prompt: str = expert("a {content} in {style} style", "Prompt of every image.", "Prompts")

    pairs: int = expert(8, "Pairs of prompts on each axis.", "Method", ge=1)
    clip: str | None = key(
        None,
        "CLIP model to compare images by, a folder or hub id; default: statistics of gradients, colors and textures.",
        "Method",
        min_length=1,
    )
    content_blocks: int = expert(2, "Maximum number of blocks for content in the map.", "Method", ge=0)
    style_blocks: int = expert(4, "Maximum number of blocks for style in the map.", "Method", ge=0)

    seeds: list[int] = key([0, 1], "Seeds; one image of each prompt per seed.", "Sampling", min_length=1)
    steps: int = key(30, "Denoising steps.", "Sampling", ge=1, le=1000)
    guidance: float = expert(5.0, "Classifier-free guidance; 1 switches it off.", "Sampling", ge=1)
    resolution: int | None = expert(None, "Side of the images in pixels; default: the base's own.", "Sampling", ge=8)
    batch_size: int = expert(1, "Seeds computed at once.", "Sampling", ge=1)
    precision: Precision = expert("auto", "Number format of the base.", "Sampling")
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Sampling")

    @field_validator("contents", "styles")
    @classmethod
    def _distinct(cls, words: list[str], info: ValidationInfo) -> list[str]:
        if not all(word.strip() for word in words):
            raise ValueError("a word is empty")
        stripped = [plain_words(word, style=info.field_name == "styles") for word in words]
        twice = {word for word in stripped if [other.lower() for other in stripped].count(word.lower()) > 1}
        if twice:
            raise ValueError(f"{sorted(twice)[0]!r} is there twice")
        return stripped

    @field_validator("prompt")
    @classmethod
    def _names_both(cls, prompt: str) -> str:
        for word in ("{content}", "{style}"):
            if prompt.count(word) != 1:
                raise ValueError(f"must name {word} once, such as 'a {{content}} in {{style}} style'")
        return prompt

    _natural = field_validator("seeds")(natural_seeds)

    @model_validator(mode="after")
    def _consistent(self) -> ProbeConfig:
        both = {word.lower() for word in self.contents} & {word.lower() for word in self.styles}
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is both a content and a style: a swap would change both")
        most = len(self.contents) * min(len(self.contents) - 1, len(self.styles) * (len(self.styles) - 1))
        if self.pairs > most:
            raise ValueError(
                f"pairs: {len(self.contents)} contents and {len(self.styles)} styles make {most} pairs at most, "
                f"not {self.pairs}: give more words"
            )
        return self

    def word_pairs(self) -> list[WordPair]:
        """Return the pairs: every word is swapped in turn, and no swap occurs twice on an axis."""
        contents, styles = self.contents, self.styles
        pairs = []
        for number in range(self.pairs):
            turn, first = divmod(number, len(contents))
            look = (first + turn) % len(styles)
            pairs.append(
                WordPair(
                    contents[first],
                    styles[look],
                    contents[(first + 1 + turn % (len(contents) - 1)) % len(contents)],
                    styles[(look + 1 + turn % (len(styles) - 1)) % len(styles)],
                )
            )
        return pairs

    def fill(self, content: str, style: str) -> str:
        """Fill a content word and a style phrase into the prompt."""
        return fill(self.prompt, {"content": content, "style": style})
