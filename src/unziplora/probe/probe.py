"""B-LoRA's probe: one block at a time receives another prompt, and the change of the image is measured.

Source: arXiv 2403.14572, section 4. There, too, the other prompt goes into one block of the UNet, but CLIP compares the
image with the prompt. Here any `Measure` compares images with images.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unziplora.config.probe import ProbeConfig, WordPair
from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.lora.blocks import block_of
from unziplora.lora.layer import STREAMS
from unziplora.metrics.clip import Clip
from unziplora.metrics.measures import Measure
from unziplora.metrics.statistics import Statistics
from unziplora.models.base import Base, open_base
from unziplora.models.device import computing_on, pick_device
from unziplora.models.text import Prompts
from unziplora.probe.plot import image_sheet, plot
from unziplora.probe.scores import ALL, Findings, judge, movement, score_rows, to_lists, to_toml
from unziplora.sampling.pipeline import Settings, StepCallback, decode, generate_latents, nested_progress
from unziplora.utils.files import atomic_write, explain, explained, write_png

PARTS = ("down_blocks", "mid_block", "up_blocks")
SHEET_SEEDS = 2
"""Number of seeds of the first pair on the sheet."""

PairImages = dict[str, list[list[Image.Image]]]
"""Images of one pair by axis, a row of seeds each: prompt P, each block swapped, all blocks swapped, prompt Q."""

FILES = {"map": "blocks.toml", "figures": "probe.json", "plot": "probe.png", "pictures": "pictures.png"}
"""Files of a result, the map being the last to be written."""


def find_blocks(
    config: ProbeConfig,
    base: Base | None = None,
    measure: Measure | None = None,
    progress: StepCallback | None = None,
) -> Findings:
    """Score every attention block; write blocks.toml, probe.json, probe.png and pictures.png.

    Args:
        base: base to probe; default: load the configured one.
        measure: default: the configured one.
        progress: called with the finished and the total number of denoising steps.

    Raises:
        UserError: the folder is not empty; base, measure or a size is not usable; the base makes the same images
            whatever the words.
        MachineError: out of memory, disk full, no permission.
    """
    _check_out(config)
    device = pick_device(config.device) if base is None else base.device
    if measure is None:
        words = (config.contents, config.styles)
        measure = Statistics() if config.clip is None else Clip(config.clip, *words, device)
    base = base or open_base(config.base, config.precision, config.device)
    blocks = attention_blocks(base.unet)
    with explained(config.out):  # before the long work, so that an unusable path fails at once
        config.out.mkdir(parents=True, exist_ok=True)
    pairs = config.word_pairs()
    values: dict[str, list[Tensor]] = {axis: [] for axis in KINDS}
    first: PairImages = {}
    with computing_on(base.device):
        for number, pair in enumerate(pairs):
            images = generate_pair(base, config, pair, blocks, nested_progress(progress, number, len(pairs)))
            first = first or images
            for axis in KINDS:
                values[axis].append(movements(measure, axis, images[axis]))
    stacked = {axis: torch.stack(values[axis], dim=1) for axis in KINDS}  # [blocks + all, pairs, seeds]
    rows = score_rows([*blocks, ALL], stacked, base.name)
    findings = judge(rows, config.content_blocks, config.style_blocks, base.name, type(measure).__name__.lower())
    return write_findings(config, findings, stacked, first)


def attention_blocks(unet: nn.Module) -> list[str]:
    """List the blocks with cross-attention, such as `up_blocks.0.attentions.1`, in the order of computation."""
    blocks = dict.fromkeys(block_of(name) for name, _ in unet.named_modules() if name.endswith(".attn2"))
    return sorted(blocks, key=lambda block: PARTS.index(block.split(".")[0]))


@contextmanager
def swapped(unet: nn.Module, blocks: Collection[str]) -> Iterator[None]:
    """Temporarily give the cross-attention of some blocks the second of the joined embeddings instead of the first.

    The hook is on `attn2` as a whole, in which only to_k and to_v read the embedding.
    """
    with ExitStack() as hooks:
        for name, module in unet.named_modules():
            if name.endswith(".attn2") and block_of(name) in blocks:
                hooks.enter_context(module.register_forward_pre_hook(_second, with_kwargs=True))
        yield


def _second(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tokens: Tensor = kwargs["encoder_hidden_states"]
    return args, {**kwargs, "encoder_hidden_states": tokens.chunk(len(STREAMS), dim=-1)[1]}


def swap(
    base: Base,
    prompt: str,
    other: str,
    blocks: Collection[str],
    seeds: Sequence[int],
    settings: Settings | None = None,
    progress: StepCallback | None = None,
) -> Tensor:
    """Generate latents of a prompt, [N, C, h, w], while the cross-attention of some blocks receives another prompt."""
    with swapped(base.unet, blocks):
        return generate_latents(base, Prompts(prompt, other, prompt), seeds, settings, progress)


def generate_pair(
    base: Base, config: ProbeConfig, pair: WordPair, blocks: Sequence[str], progress: StepCallback | None = None
) -> PairImages:
    """Generate all images of one pair; both axes share the images of P."""
    side = config.resolution
    settings = Settings(
        steps=config.steps, guidance=config.guidance, width=side, height=side, batch_size=config.batch_size
    )
    prompt = config.fill(pair.content, pair.style)
    tasks: list[tuple[str, str, Sequence[str]]] = [(prompt, prompt, ())]
    for other in (config.fill(pair.other_content, pair.style), config.fill(pair.content, pair.other_style)):
        tasks += [(prompt, other, choice) for choice in [*([block] for block in blocks), blocks]]
        tasks.append((other, other, ()))
    images = [
        decode(base, swap(base, *task, config.seeds, settings, nested_progress(progress, number, len(tasks))))
        for number, task in enumerate(tasks)
    ]
    half = len(blocks) + 2
    return {"content": images[: half + 1], "style": [images[0], *images[half + 1 :]]}


def movements(measure: Measure, axis: str, rows: Sequence[Sequence[Image.Image]]) -> Tensor:
    """Return the movements of one pair on an axis, [rows − 2, seeds], from images as in `PairImages`."""
    features = getattr(measure, axis)([image for row in rows for image in row])
    features = features.float().reshape(len(rows), len(rows[0]), -1)
    return movement(features[1:-1], features[0], features[-1])


def write_findings(config: ProbeConfig, findings: Findings, values: dict[str, Tensor], images: PairImages) -> Findings:
    """Write all files, the block map last; return the findings with the paths of the files."""
    files = {name: config.out / file for name, file in FILES.items()}
    pairs, blocks = config.word_pairs(), [*findings.blocks, ALL]
    figures = {
        **findings.model_dump(mode="json", exclude={"files"}),
        "pairs": [pair._asdict() for pair in pairs],
        "movements": {axis: dict(zip(blocks, to_lists(values[axis]), strict=True)) for axis in KINDS},
        "config": config.model_dump(mode="json"),
        "version": version("unziplora"),
    }
    write_png(files["pictures"], _sheet(config, findings, images))
    write_png(files["plot"], plot(findings))
    atomic_write(files["figures"], json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    atomic_write(files["map"], to_toml(findings))
    return findings.model_copy(update={"files": {name: str(path) for name, path in files.items()}})


def _sheet(config: ProbeConfig, findings: Findings, images: PairImages) -> Image.Image:
    pair, seeds = config.word_pairs()[0], config.seeds[:SHEET_SEEDS]
    swaps = {"content": f"{pair.other_content} for {pair.content}", "style": f"{pair.other_style} for {pair.style}"}
    columns = [[row[index] for row in images[axis]] for axis in KINDS for index in range(len(seeds))]
    heads = [f"{swaps[axis]}, seed {seed}" for axis in KINDS for seed in seeds]
    return image_sheet(columns, ["first prompt", *findings.blocks, ALL, "other prompt"], heads)


def _check_out(config: ProbeConfig) -> None:
    try:
        names = {entry.name for entry in config.out.iterdir()} if config.out.exists() else set()
        # without its map, which is written last, the result of a probe was interrupted
        occupied = FILES["map"] in names or any(name not in FILES.values() for name in names if name[0] != ".")
    except NotADirectoryError:
        occupied = True
    except OSError as error:
        raise explain(config.out, error) from None
    if occupied:
        raise UserError(f"--out {config.out} exists and is not an empty folder: choose another")
