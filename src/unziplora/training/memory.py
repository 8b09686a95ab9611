"""How much memory a run needs, before it starts: what follows from sizes exactly, and what is estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel

from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.sizes import Sizes
from unziplora.training.cuda_graphs import graphs_wanted
from unziplora.utils.progress import size

_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
"""State per trained number: two moments in fp32, two in 8 bits, or two moments, a start and a sum."""

_CUDA_CONTEXT = 600 * 2**20
_RECORDED = 256 * 2**20
"""What recorded steps hold besides a place of their own for the gradients (profiling/results/sdxl-gpu.json)."""

_ENCODING_MAPS = 5 * 128
"""Maps of the full resolution that SDXL's VAE holds at once while it encodes: five of its 128 channels."""

_DECODING_MAPS = 6 * 128
"""The same while it decodes; where they do not fit, it decodes tiles of 512 pixels (`generate.decode`)."""

_TILE = 512
_DENOISING = 700 * 2**20
"""What the UNet holds while it samples at 1024 pixels with guidance, in half precision."""


class Line(BaseModel):
    """One part of the memory."""

    part: str
    bytes: int
    exact: bool


class Memory(BaseModel):
    """Memory of a run at its peak.

    Attributes:
        base: the base's name.
        assumed: see `Sizes`.
        device: where it is needed.
        precision: of the frozen base.
        resolution: pixels.
        lines: the parts; `exact` ones follow from sizes, the others are estimates.
        available: bytes free on the device now, if that can be told.
        advice: the setting to change first if that is too little.
    """

    base: str
    assumed: bool
    device: str
    precision: str
    resolution: int
    lines: list[Line]
    available: int | None
    advice: str | None = None

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(line.bytes for line in self.lines)

    @property
    def fits(self) -> bool | None:
        """Whether that is free now; None if it cannot be told."""
        return None if self.available is None else self.total <= self.available

    @property
    def needs_less(self) -> str:
        """The advice as the end of a sentence; empty if there is none."""
        return f"; needs less: {self.advice}" if self.advice else ""

    def table(self, prefix: str = "") -> str:
        """Plain text, one part per line."""
        width = max(len(line.part) for line in self.lines)
        rows = [f"Memory on {self.device} ({self.precision}, {self.resolution} px), at the peak:"]
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
        return "\n".join(prefix + row for row in rows)


def estimate(config: ImageConfig, sizes: Sizes, loras: Mapping[str, Sequence[str]]) -> Memory:
    """The memory that a training needs at its peak, part by part.

    Weights, LoRAs, gradients and optimizer follow from sizes; activations are read off the graph of a
    training step (see `activations.kept_bytes`), to which an allowance for work in progress is added.

    Args:
        loras: by LoRA the paths of the layers that it adapts (see `Method.layers`).

    Raises:
        UserError: no such device.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    gpu, each = device.type == "cuda", 4 if dtype == torch.float32 else 2
    exact = _exact(config, sizes, loras, each, gpu)
    about = _activations(config, sizes, each, gpu)
    if gpu and graphs_wanted(config):
        losses = 1 + sum(weight > 0 for weight in config.prior_weights().values())
        about["CUDA graphs"] = exact["gradients"] * losses + _RECORDED
    training = sum(exact.values()) + sum(about.values())
    about["encoding at the start, beyond that"] = max(0, _encoding(config, sizes, each, gpu) - training)
    if gpu and config.sample_seeds:
        about["samples, beyond that"] = max(0, _sampling(config, sizes, exact) - training)
    lines = [Line(part=part, bytes=count, exact=True) for part, count in exact.items() if count]
    lines += [Line(part=part, bytes=count, exact=False) for part, count in about.items() if count]
    return Memory(
        base=config.base,
        assumed=sizes.assumed,
        device=str(device),
        precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"),
        resolution=_resolution(config, sizes),
        lines=lines,
        available=free_bytes(device),
        advice=smaller(config, sizes.resolution),
    )


def _resolution(config: ImageConfig, sizes: Sizes) -> int:
    return config.resolution or sizes.resolution


def _exact(
    config: ImageConfig, sizes: Sizes, loras: Mapping[str, Sequence[str]], each: int, gpu: bool
) -> dict[str, int]:
    """Bytes that follow from sizes; the frozen base has `each` of them per number."""
    reads = bool(getattr(config, "text_encoders", False))  # DreamBooth may train them too
    trained = sum(sizes.adapter(config.rank, paths) for paths in loras.values())
    trained += config.rank * sizes.text_features * reads
    scaled = [path for paths in loras.values() for path in paths] if getattr(config, "column_separation", False) else []
    columns = sum(sizes.layers[path][1] for path in scaled)
    text = sizes.text * each
    return {
        "UNet": sizes.unet * each,
        # On a GPU both leave once latents and embeddings are computed.
        "VAE and text encoders": text * reads if gpu else text + _vae(sizes),
        "LoRAs, scales and masks": 4 * trained + 9 * columns,
        "gradients": 4 * (trained + columns),
        "optimizer": _OPTIMIZER_BYTES[config.optimizer] * trained + 8 * columns,
    }


def _activations(config: ImageConfig, sizes: Sizes, each: int, gpu: bool) -> dict[str, int]:
    """Estimated bytes that a step needs beside them."""
    from unziplora.training.activations import kept_bytes

    kept = kept_bytes(
        sizes.unet_config,
        rank=config.rank,
        latent=_resolution(config, sizes) // sizes.latent_scale,
        batch=config.batch_size,
        half=each == 2,
        checkpointing=config.gradient_checkpointing,
        streams=3 if getattr(config, "prompt_separation", False) else 1,
    )
    return {"activations": kept, "work in progress": kept // 4 + _CUDA_CONTEXT * gpu}


def _encoding(config: ImageConfig, sizes: Sizes, each: int, gpu: bool) -> int:
    """Estimated bytes while pictures and prompts are encoded; from a GPU the UNet is away then."""
    maps = _ENCODING_MAPS * 4 * _resolution(config, sizes) ** 2
    held = _CUDA_CONTEXT if gpu else sizes.unet * each
    return held + sizes.text * each + _vae(sizes) + maps


def _sampling(config: ImageConfig, sizes: Sizes, exact: Mapping[str, int]) -> int:
    """Estimated bytes on a GPU while samples are made; at the last ones the optimizer is gone."""
    maps = 4 * _resolution(config, sizes) ** 2
    decoding = _vae(sizes) + _DECODING_MAPS * min(maps, 4 * _TILE**2)
    kept = exact["UNet"] + exact["LoRAs, scales and masks"] + exact["optimizer"] * bool(config.sample_every)
    return _CUDA_CONTEXT + kept + max(_DENOISING * config.samples_at_once() * maps // 2**22, decoding)


def _vae(sizes: Sizes) -> int:
    return sizes.vae * 4  # it stays in fp32


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device now; for a GPU its own memory, else the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def smaller(config: TrainingConfig, side: int) -> str | None:
    """The next setting that needs less memory, as flags, the gentlest first; None if nothing is left.

    Args:
        side: pixels that the base is made for.
    """
    if config.batch_size > 1:
        return f"--batch-size {max(1, config.batch_size // 2)}"
    device = pick_device(config.device)
    if device.type == "cuda" and graphs_wanted(config):
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
