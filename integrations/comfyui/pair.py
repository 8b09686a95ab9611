"""A content LoRA and a style LoRA from files: their weights at strength 1, their words, and their dials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unziplora.config.recipe import KINDS
from unziplora.config.sample import read_blocks
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.lora.weights import Lora, scale_blocks
from unziplora.methods.ziplora.inputs import project_content
from unziplora.sampling.prompts import default_prompt
from unziplora.sampling.sources import LoraSource, find_lora


@dataclass(frozen=True)
class Part:
    """One LoRA of a pair.

    Attributes:
        lora: its weights at dial 1, with block strengths and projection applied.
        strength: its dial.
        blocks: its block strengths as written, such as `up_blocks.0=0.5`.
        patches: the patches by which ComfyUI merges it into the model, by the key of the weight.
    """

    source: LoraSource
    lora: Lora
    strength: float = 1.0
    blocks: tuple[str, ...] = ()
    patches: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """The LoRAs that a model carries, by kind: `content`, `style` or both.

    Attributes:
        projection: share of the style's directions that the content LoRA was projected away from.
        separate: each LoRA reads a prompt of its own.
    """

    parts: Mapping[str, Part]
    projection: float = 0.0
    separate: bool = False

    @property
    def two_prompts(self) -> bool:
        """True if two LoRAs read a prompt each; `unziplora sample` knows no other images with several prompts."""
        return self.separate and len(self.parts) == 2


@dataclass(frozen=True)
class Words:
    """Trigger words and prompts of a pair; a text that no file contains is empty."""

    triggers: str
    full: str
    content: str
    style: str


def read_pair(
    files: Mapping[str, Path],
    strengths: Mapping[str, float],
    blocks: Mapping[str, str],
    projection: float,
    unet_config: Mapping[str, Any],
) -> Pair:
    """Read the LoRAs of a pair and apply block strengths and null-space projection.

    Args:
        files: LoRA files by kind.
        blocks: block strengths by kind, separated by spaces, commas or lines.
        unet_config: `layers_per_block` and `cross_attention_dim` of the base.

    Raises:
        UserError: a file is missing, damaged or for another family; a block is unknown; a projection of one LoRA.
    """
    if projection and set(files) != set(KINDS):
        raise UserError("projection keeps the content away from the style: choose both files, or set it to 0")
    parts = {}
    for kind, file in files.items():
        entries = tuple(blocks.get(kind, "").replace(",", " ").split())
        try:
            factors = read_blocks(list(entries))
        except ValueError as error:
            raise UserError(f"{kind}_blocks: {error}") from None
        lora = scale_blocks(read_lora(file, unet_config), factors, str(file))
        parts[kind] = Part(find_lora(file, kind), lora, strengths[kind], entries)
    if projection:
        lora = project_content(parts["content"].lora, parts["style"].lora, projection)
        parts["content"] = replace(parts["content"], lora=lora)
    return Pair(parts, projection)


def words_of(pair: Pair) -> Words:
    """Return the trigger words in the headers and the prompts of the runs, as `unziplora sample` fills them."""
    sources = {kind: part.source for kind, part in pair.parts.items()}
    triggers = ", ".join(source.trigger for source in sources.values() if source.trigger)
    own = {kind: source.filled_prompt(kind) or "" for kind, source in sources.items()}
    full = default_prompt(list(sources.values())) or ""
    return Words(triggers, full, own.get("content", ""), own.get("style", ""))
