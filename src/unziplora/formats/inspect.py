"""Inspection of a LoRA file: layout, base, ranks, alphas, blocks, metadata, and the programs that load it."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from unziplora.formats.convert import count, dtype_name
from unziplora.formats.files import not_finite, read_adapter, read_modules
from unziplora.formats.header import trigger_words
from unziplora.formats.programs import Verdict, verdicts_on
from unziplora.formats.readers import StoredFactors, shown
from unziplora.formats.sdxl import has_sdxl_widths
from unziplora.lora.algebra import norm
from unziplora.lora.blocks import block_of

_KINDS = {
    "attention": r"\.attn[12]\.",
    "feed-forward": r"\.ff\.",
    "proj": r"\.proj_(in|out)$",
    "convolution": r"\.conv\w*$",
}
"""Kinds of modules → patterns of their paths."""


class Block(BaseModel):
    """Modules of one block and their share of the whole update: Σ‖ΔW‖² of the block over that of the file."""

    modules: int
    untrained: int
    share: float


class Inspection(BaseModel):
    """Contents of a LoRA file and the verdicts on it."""

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
        """Return the contents as plain text, one fact per line."""
        metadata = [f"  {key}: {_short(value)}" for key, value in sorted(self.metadata.items())]
        return [
            f"{self.path}  {self.bytes / 1e6:.1f} MB",
            f"layout    {self.layout}",
            f"base      {self.base}" + (f", trained on {self.trained_on}" if self.trained_on else ""),
            f"modules   {self.modules} of the UNet ({_counts(self.kinds)}), {self.text_modules} of text encoders",
            f"rank      {_counts(self.ranks)}",
            f"alpha     {_counts(self.alphas)}; strength {_counts(self.strengths)}",
            f"stored as {_counts(self.dtypes)}, {self.parameters:,} parameters",
            f"trigger   {', '.join(self.trigger_words) or 'none'}",
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
    """Read a LoRA file of any layout and describe it.

    Raises:
        UserError: the file is missing, damaged or not a LoRA for SDXL; the message names what it is instead.
        MachineError: the file cannot be read.
    """
    path = Path(path).expanduser()
    tensors, metadata = read_adapter(path)
    modules = read_modules(path, tensors, metadata)
    factors = modules.all
    untrained = [name for name, f in factors.items() if not f.up.float().any() or not f.down.float().any()]
    full_size, broken = has_sdxl_widths(modules.shapes), not_finite(tensors)
    return Inspection(
        path=path,
        bytes=path.stat().st_size,
        layout=modules.layout,
        base="SDXL" if full_size else "a base of SDXL's topology, of another size",
        trained_on=metadata.get("ss_sd_model_name", ""),
        modules=len(modules.unet),
        text_modules=len(modules.text),
        parameters=sum(f.down.numel() + f.up.numel() for f in factors.values()),
        ranks=count(f.rank for f in factors.values()),
        alphas=count("none" if f.alpha is None else f"{f.alpha:g}" for f in factors.values()),
        strengths=count(f"{f.strength:g}" for f in factors.values()),
        dtypes=count(dtype_name(f.down) for f in factors.values()),
        kinds=count(_kind(name) for name in modules.unet),
        blocks=_blocks(modules.unet, set(untrained)),
        untrained=untrained,
        trigger_words=trigger_words(metadata),
        metadata=metadata,
        loads_in=verdicts_on(modules, full_size, metadata, tensors, not broken),
        problems=_problems(broken, len(untrained) == len(factors), modules.unread),
    )


def _blocks(unet: dict[str, StoredFactors], untrained: set[str]) -> dict[str, Block]:
    members: dict[str, list[str]] = {}
    energy = {name: norm(factors.pair()) ** 2 for name, factors in unet.items()}
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


def _problems(broken: list[str], untrained: bool, unread: list[str]) -> list[str]:
    problems = []
    if broken:
        problems.append(f"{len(broken)} tensors contain NaN or infinity, the first: {broken[0]}; the file is useless")
    if untrained:
        problems.append("untrained: ΔW = 0 in every module")
    if unread:
        problems.append(f"{len(unread)} tensors are not part of the LoRA, the first: {shown(unread[:1])}")
    return problems


def _kind(path: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, path)), "other")


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
