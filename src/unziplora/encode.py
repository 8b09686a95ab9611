"""Pictures and prompts encoded once: latents, the joined embeddings of the three prompts, size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unziplora.base import Base
from unziplora.objective import Conditioning, Examples
from unziplora.prompts import Prompts, condition, time_ids
from unziplora.residency import away


@torch.no_grad()
def encode_pictures(base: Base, pictures: Sequence[Tensor]) -> Tensor:
    """Latents of pictures, [N, 3, H, W] in −1…1 → [N, C, h, w] in the UNet's scaling.

    The mode of the VAE's distribution is taken, not a sample: the same picture has the same latents.
    """
    vae: Any = base.vae
    latents = []
    with away([base.unet]):
        for picture in pictures:  # one by one: at 1024 px the encoder takes 2.5 GiB for each
            encoded = vae.encode(picture[None].to(vae.device, vae.dtype))
            # AutoencoderKL gives a distribution, AutoencoderTiny (TAESDXL and the bundled base) plain latents.
            latents.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents)
    return scale_latents(base, torch.cat(latents).float())


def scale_latents(base: Base, latents: Tensor) -> Tensor:
    """The VAE's latents in the UNet's scaling; the inverse of what the pipeline does before decoding."""
    config: Any = base.vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[f"latents_{key}"]).view(1, -1, 1, 1) for key in ("mean", "std"))
        latents = (latents - mean.to(latents.device)) / std.to(latents.device)
    return latents * config["scaling_factor"]


def conditioning(base: Base, prompts: Prompts, resolution: int, count: int) -> Conditioning:
    """Conditioning of `count` uncropped square pictures of a side in pixels that share the prompts."""
    embedded = condition(base, prompts).repeat(count)
    return Conditioning(embedded.tokens, embedded.pooled, time_ids(resolution, resolution, count))


def loss_weights(masks: Sequence[Tensor], latents: Tensor, background: float) -> Tensor | None:
    """Weights of the loss from subject masks, N × [1, H, W] in 0…1 → [N, 1, h, w], or None without masks."""
    if not masks:
        return None
    small = F.interpolate(torch.stack(list(masks)).float(), latents.shape[-2:], mode="area")
    return background + (1 - background) * small


def to_device(examples: Examples, base: Base) -> Examples:
    """The examples where the UNet is, in its number format; latents stay in fp32."""
    weights = None if examples.weights is None else examples.weights.to(base.device)
    return Examples(
        examples.latents.to(base.device, torch.float32),
        examples.conditioning.to(base.device, base.dtype),
        weights,
    )
