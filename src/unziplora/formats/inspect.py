"""What a LoRA file holds and which programs load it; conversion between layouts and ranks."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from unziplora.formats import families
from unziplora.formats.convert import Resized, convert, counted, dtype_name, resize_file
from unziplora.formats.files import understand
from unziplora.formats.header import trigger_words
from unziplora.formats.programs import Verdict, loads_in
from unziplora.formats.readers import Factors, Grouped
from unziplora.formats.safetensors import open_tensors
from unziplora.lora import algebra
from unziplora.lora.blocks import block_of

__all__ = ["Block", "Inspection", "Resized", "Verdict", "convert", "inspect", "resize_file"]


class Block(BaseModel):
    """The modules of one block and their share of the whole update, Σ‖ΔW‖² of the block over that of the file."""

    modules: int
    untrained: int
    share: float


class Inspection(BaseModel):
    """What a LoRA file holds."""

    path: Path
    bytes: int
    layout: str
    base: str
    trained_on: str
    modules: int
    text_modules: int
    parameters: int
    ranks: dict[int, int]
    alphas: dict[str, int]
    strengths: dict[str, int]
    dtypes: dict[str, int]
    kinds: dict[str, int]
    blocks: dict[str, Block]
    untrained: list[str]
    trigger_words: list[str]
    metadata: dict[str, str]
    loads_in: dict[str, Verdict]
    problems: list[str]

    def lines(self) -> list[str]:
        """The findings as plain text, one fact per line."""
        metadata = [f"  {key}: {_short(value)}" for key, value in sorted(self.metadata.items())]
        return [
            f"{self.path}  {self.bytes / 1e6:.1f} MB",
            f"layout    {self.layout}",
            f"base      {self.base}" + (f", trained on {self.trained_on}" if self.trained_on else ""),
            f"modules   {self.modules} of the UNet ({_counts(self.kinds)}), {self.text_modules} of text encoders",
            f"rank      {_counts(self.ranks)}",
            f"alpha     {_counts(self.alphas)}; strength {_counts(self.strengths)}",
            f"stored as {_counts(self.dtypes)}, {self.parameters:,} parameters",
            f"trigger   {', '.join(self.trigger_words) or 'none given'}",
            "blocks    modules · share of the update",
            *(f"  {name:<28} {block.modules:>4} · {_share(block)}" for name, block in self.blocks.items()),
            "loads in",
            *(f"  {name:<10} {verdict.answer:<8} {verdict.reason}" for name, verdict in self.loads_in.items()),
            *(f"problem   {problem}" for problem in self.problems),
            *(["metadata", *metadata] if metadata else []),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def inspect(path: str | Path) -> Inspection:
    """What a LoRA file holds: layout, blocks, ranks, alphas, metadata, and which programs load it.

    Raises:
        UserError: the file is missing, damaged or no LoRA for SDXL (says what it is instead).
        MachineError: the file cannot be read.
    """
    path = Path(path)
    tensors, metadata = open_tensors(path)
    grouped = understand(path, tensors, metadata)
    factors = {**grouped.unet, **grouped.text}
    untrained = [name for name, f in factors.items() if not f.up.any() or not f.down.any()]
    shapes = {name: algebra.shape((f.down, f.up))[:2] for name, f in grouped.unet.items()}
    full_size = families.sdxl_sized(shapes)
    return Inspection(
        path=path,
        bytes=path.stat().st_size,
        layout=grouped.layout,
        base="SDXL" if full_size else "a base of SDXL's topology, of another size",
        trained_on=metadata.get("ss_sd_model_name", ""),
        modules=len(grouped.unet),
        text_modules=len(grouped.text),
        parameters=sum(f.down.numel() + f.up.numel() for f in factors.values()),
        ranks=counted(f.rank for f in factors.values()),
        alphas=counted("none" if f.alpha is None else f"{f.alpha:g}" for f in factors.values()),
        strengths=counted(f"{f.strength:g}" for f in factors.values()),
        dtypes=counted(dtype_name(f.down) for f in factors.values()),
        kinds=counted(_kind(name) for name in grouped.unet),
        blocks=_blocks(grouped.unet, set(untrained)),
        untrained=untrained,
        trigger_words=trigger_words(metadata),
        metadata=metadata,
        loads_in=loads_in(grouped, full_size, metadata),
        problems=_problems(grouped, tensors, untrained),
    )


def _blocks(unet: dict[str, Factors], untrained: set[str]) -> dict[str, Block]:
    members: dict[str, list[str]] = {}
    energy = {name: algebra.norm(factors.pair()) ** 2 for name, factors in unet.items()}
    for name in unet:
        members.setdefault(block_of(name), []).append(name)
    total = sum(energy.values())
    return {
        block: Block(
            modules=len(names),
            untrained=len(untrained & set(names)),
            share=sum(energy[name] for name in names) / total if total > 0 else 0.0,
        )
        for block, names in sorted(members.items())
    }


def _problems(grouped: Grouped, tensors: dict[str, Tensor], untrained: list[str]) -> list[str]:
    found = []
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        found.append(f"{len(broken)} tensors hold NaN or infinity, the first: {broken[0]}; the file is useless")
    if len(untrained) == len(grouped.unet) + len(grouped.text):
        found.append("untrained: ΔW = 0 in every module")
    elif untrained:
        found.append(f"{len(untrained)} modules are untrained (ΔW = 0), the first: {untrained[0]}")
    return found


def _kind(path: str) -> str:
    for pattern, kind in ((r"\.attn[12]\.", "attention"), (r"\.ff\.", "feed-forward"), (r"\.proj_(in|out)$", "proj")):
        if re.search(pattern, path):
            return kind
    return "other"


def _counts(counts: dict[int, int] | dict[str, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    shown = [f"{count} × {name}" for name, count in list(counts.items())[:6]]
    return ", ".join(shown) + (" …" if len(counts) > 6 else "")


def _share(block: Block) -> str:
    note = f" ({block.untrained} untrained)" if 0 < block.untrained < block.modules else ""
    return "untrained" if block.untrained == block.modules else f"{block.share:.1%}{note}"


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= 100 else f"{line[:80]}… ({len(value):,} characters)"
