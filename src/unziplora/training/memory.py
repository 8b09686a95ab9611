"""A forecast of the memory that a run needs: sizes are exact, activations are estimated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import psutil
import torch
from pydantic import BaseModel

from unziplora.config.recipe import KINDS
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.lora.blocks import is_inside
from unziplora.lora.inject import filter_targets
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.sizes import Sizes
from unziplora.training.cuda_graphs import uses_cuda_graphs
from unziplora.utils.progress import size

_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
"""State per trained number: two moments in fp32, two in 8 bits, or two moments, a start and a sum."""

_CUDA_CONTEXT = 600 * 2**20
_RECORDED = 256 * 2**20
"""Memory of recorded steps in addition to separate gradients (profiling/results/sdxl-gpu.json)."""

_PROMPT_TOKENS = 77

_ENCODING_MAPS = 5 * 128
"""Maps of the full resolution that exist at once while SDXL's VAE encodes: five of its 128 channels."""

_DECODING_MAPS = 6 * 128
"""Maps that exist at once while it decodes; where they do not fit, it decodes tiles of 512 pixels."""

_TILE = 512
_DENOISING = 700 * 2**20
"""Activations of the UNet while it samples at 1024 pixels with guidance, in half precision."""


class Line(BaseModel):
    """One part of the memory."""

    part: str
    bytes: int
    exact: bool


class Memory(BaseModel):
    """Memory of a run at its peak.

    Attributes:
        assumed: the base is not on this machine, so SDXL's sizes are assumed.
        lines: the parts; `exact` ones follow from sizes, the others are estimates.
        available: bytes free on the device now; None if unknown.
        advice: the setting to change first if that is too little.
    """

    base: str
    assumed: bool
    device: str
    precision: str
    size: tuple[int, int]
    lines: list[Line]
    available: int | None
    advice: str | None = None

    @property
    def total(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def fits(self) -> bool | None:
        """True if that much is free now; None if unknown."""
        return None if self.available is None else self.total <= self.available

    @property
    def needs_less(self) -> str:
        """The advice as the end of a sentence; empty if there is none."""
        return f"; needs less: {self.advice}" if self.advice else ""

    def table(self) -> str:
        width = max(len(line.part) for line in self.lines)
        rows = [f"Memory on {self.device} ({self.precision}, {self.size[0]}×{self.size[1]} px), at the peak:"]
        rows += [
            f"  {line.part:<{width}}  {size(line.bytes):>10}" + ("" if line.exact else "  (estimate)")
            for line in self.lines
        ]
        rows.append(f"  {'together':<{width}}  {size(self.total):>10}")
        if self.available is not None:
            verdict = "fits" if self.fits else f"does not fit{self.needs_less}"
            rows.append(f"  {'free now':<{width}}  {size(self.available):>10}  ({verdict})")
        if self.assumed:
            rows.append(f"{self.base} is not on this machine: the sizes are SDXL's own.")
        return "\n".join(rows)


def estimate(
    config: ImageConfig,
    sizes: Sizes,
    loras: Mapping[str, Sequence[str]],
    shape: tuple[int, int] | None = None,
) -> Memory:
    """Forecast the memory that a training needs at its peak, part by part.

    Weights, LoRAs, gradients and optimizer follow from sizes. Activations are estimated by `activation_bytes`, with an
    allowance for work in progress.

    Args:
        loras: by LoRA the paths of the layers that it adapts (see `Method.layers`).
        shape: width and height of the training images in pixels; default: a square.

    Raises:
        UserError: no such device.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    gpu, each = device.type == "cuda", 4 if dtype == torch.float32 else 2
    shape = shape or _square(config, sizes)
    pixels = shape[0] * shape[1]
    exact = _exact(config, sizes, loras, each, gpu)
    about = {"activations": activation_bytes(config, sizes, loras, each == 2, shape)}
    about["work in progress"] = about["activations"] // 4 + _CUDA_CONTEXT * gpu
    if gpu and uses_cuda_graphs(config):
        losses = 1.0 + sum(weight > 0 for weight in config.prior_weights().values())
        losses += 0.5 * sum(bool(getattr(config, f"{name}_alone", False)) for name in KINDS)  # one of two LoRAs
        about["CUDA graphs"] = round(exact["gradients"] * losses) + _RECORDED
    training = sum(exact.values()) + sum(about.values())
    about["encoding at the start, beyond that"] = max(0, _encoding(pixels, sizes, each, gpu) - training)
    if gpu and getattr(config, "phrase_steps", False):  # the text encoders learn on the GPU, before there are LoRAs
        phrase = exact["UNet"] + sizes.text * each + about["activations"] + about["work in progress"]
        about["the phrase, beyond that"] = max(0, phrase - training)
    if gpu and config.sample_seeds:
        about["samples, beyond that"] = max(0, _sampling(config, pixels, sizes, exact) - training)
    lines = [Line(part=part, bytes=count, exact=True) for part, count in exact.items() if count]
    lines += [Line(part=part, bytes=count, exact=False) for part, count in about.items() if count]
    return Memory(
        base=config.base,
        assumed=sizes.assumed,
        device=str(device),
        precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"),
        size=shape,
        lines=lines,
        available=free_bytes(device),
        advice=smaller(config, sizes.resolution),
    )


def _exact(
    config: ImageConfig, sizes: Sizes, loras: Mapping[str, Sequence[str]], each: int, gpu: bool
) -> dict[str, int]:
    text_trains = bool(getattr(config, "text_encoders", False))  # DreamBooth may train them too
    trained = sum(sizes.adapter(config.rank, paths) for paths in loras.values())
    trained += config.rank * sizes.text_features * text_trains
    scaled = [path for paths in loras.values() for path in paths] if getattr(config, "column_separation", False) else []
    columns = sum(sizes.layers[path][1] for path in scaled)
    text = sizes.text * each
    return {
        "UNet": sizes.unet * each,
        # Both leave a GPU once latents and embeddings are computed.
        "VAE and text encoders": text * text_trains if gpu else text + _vae(sizes),
        "LoRAs, scales and masks": 4 * trained + 9 * columns,
        "gradients": 4 * (trained + columns),
        "optimizer": _OPTIMIZER_BYTES[config.optimizer] * trained + 8 * columns,
    }


def _square(config: ImageConfig, sizes: Sizes) -> tuple[int, int]:
    return (config.resolution or sizes.resolution,) * 2


def activation_bytes(
    config: ImageConfig,
    sizes: Sizes,
    loras: Mapping[str, Sequence[str]],
    half: bool,
    shape: tuple[int, int] | None = None,
) -> int:
    """Estimate the bytes of activations that a forward pass keeps for the backward pass.

    The factors are fitted to counts of all tensors that autograd saves in the UNets of SDXL and of the bundled base,
    at ranks 8 to 128, batches 1 to 4, 128 to 1024 pixels. The formula is within 3 % of these counts. With
    gradient checkpointing it is within 4 % for SDXL in half precision. LoRAs on feed-forward layers and
    convolutions too were counted for the bundled base alone: within 6 %.

    Args:
        loras: by LoRA the paths of the layers that it adapts; blocks before the first of them keep nothing.
        half: the base computes in bf16 or fp16.
        shape: width and height of the training images in pixels; default: a square.
    """
    adapted = [path for paths in loras.values() for path in paths]
    wide, convolved = (
        sum(bool(filter_targets(paths, [kind])) for paths in loras.values())
        for kind in ("feed-forward", "convolutions")
    )
    batch, (width, height) = config.batch_size, (side // sizes.latent_scale for side in shape or _square(config, sizes))
    transformers = resnets = inner = prompt = 0

    def is_frozen(block: _Block) -> bool:
        return not any(is_inside(path, part) for path in adapted for part in block.parts)

    for block in dropwhile(is_frozen, _blocks(sizes.unet_config)):
        tokens = batch * (width >> block.level) * (height >> block.level)
        resnets += tokens * block.width
        transformers += block.depth * tokens * block.width
        inner += block.depth * tokens * config.rank * (7 * len(loras) + 2 * wide)
        inner += 5 * tokens * config.rank * convolved // 2
        prompt += block.depth * batch * _PROMPT_TOKENS * block.width
    each = 2 if half else 4
    if config.gradient_checkpointing:
        return round(each * (transformers + 6.6 * resnets))
    # More numbers in half precision: norms read a copy in fp32.
    blocks = 26 * transformers + 14 * resnets if half else 22 * transformers + 10 * resnets
    blocks += 5 * transformers * bool(wide) + resnets * bool(convolved)
    factors = 0.875 * sizes.adapter(config.rank, adapted)
    return round(each * (blocks + inner + 3 * prompt + factors))


@dataclass(frozen=True)
class _Block:
    """A residual block of a UNet and the transformer after it."""

    parts: tuple[str, ...]  # paths of the residual block and the transformer
    level: int  # number of times that the latents were halved
    width: int  # channels
    depth: int  # layers of the transformer; 0 if there is none


def _blocks(config: Mapping[str, Any]) -> Iterator[_Block]:
    """Yield a UNet's blocks in the order of a forward pass."""
    widths, count, depths = (
        config["block_out_channels"],
        config["layers_per_block"],
        config["transformer_layers_per_block"],
    )
    last = len(widths) - 1
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    attended = [depth * ("CrossAttn" in kind) for depth, kind in zip(depths, config["down_block_types"], strict=True)]
    for level, width in enumerate(widths):
        for number in range(count):
            yield _Block(_parts(f"down_blocks.{level}", number), level, width, attended[level])
    yield _Block(("mid_block",), last, widths[last], depths[last])
    for level in reversed(range(len(widths))):
        for number in range(count + 1):
            yield _Block(_parts(f"up_blocks.{last - level}", number), level, widths[level], attended[level])


def _parts(block: str, number: int) -> tuple[str, ...]:
    return f"{block}.resnets.{number}", f"{block}.attentions.{number}"


def _encoding(pixels: int, sizes: Sizes, each: int, gpu: bool) -> int:
    """Estimate the bytes while images and prompts are encoded; the UNet is not on a GPU then."""
    maps = _ENCODING_MAPS * 4 * pixels
    rest = _CUDA_CONTEXT if gpu else sizes.unet * each
    return rest + sizes.text * each + _vae(sizes) + maps


def _sampling(config: ImageConfig, pixels: int, sizes: Sizes, exact: Mapping[str, int]) -> int:
    """Estimate the bytes on a GPU while it samples; the optimizer is gone before the last samples."""
    maps = 4 * pixels
    decoding = _vae(sizes) + _DECODING_MAPS * min(maps, 4 * _TILE**2)
    weights = exact["UNet"] + exact["LoRAs, scales and masks"] + exact["optimizer"] * bool(config.sample_every)
    return _CUDA_CONTEXT + weights + max(_DENOISING * config.samples_at_once() * maps // 2**22, decoding)


def _vae(sizes: Sizes) -> int:
    return sizes.vae * 4  # always fp32


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device now; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def smaller(config: TrainingConfig, side: int) -> str | None:
    """Return the gentlest change that needs less memory, as flags; None if nothing is left.

    Args:
        side: the base's own resolution in pixels.
    """
    if config.batch_size > 1:
        return f"--batch-size {max(1, config.batch_size // 2)}"
    device = pick_device(config.device)
    if device.type == "cuda" and uses_cuda_graphs(config):
        return "--no-cuda-graphs (slower, the same result)"
    if not config.gradient_checkpointing:
        return "--gradient-checkpointing (slower, the same result)"
    if device.type == "cuda" and config.precision == "fp32":
        return "--precision bf16"
    if device.type == "cuda" and config.optimizer != "adamw8bit":
        return "--optimizer adamw8bit (first: pip install bitsandbytes)"
    if lower := next((pixels for pixels in (768, 512) if pixels < (config.resolution or side)), None):
        return f"--resolution {lower}"
    if isinstance(config, ImageConfig) and config.rank > 8:
        return f"--rank {config.rank // 2}"
    return None
