"""Pictures and prompts encoded once: latents, the joined embeddings of the three prompts, size conditioning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unziplora.models.base import Base
from unziplora.models.offload import on_cpu


@torch.no_grad()
def encode_images(base: Base, pictures: Sequence[Tensor]) -> Tensor:
    """Latents of pictures, [N, 3, H, W] in −1…1 → [N, C, h, w] in the UNet's scaling.

    The mode of the VAE's distribution is taken, not a sample: the same picture has the same latents.
    """
    vae = base.vae
    latents = []
    with on_cpu([base.unet]):
        for picture in pictures:  # one by one: at 1024 px the encoder takes 2.5 GiB for each
            encoded = vae.encode(picture[None].to(vae.device, vae.dtype))
            # AutoencoderKL gives a distribution, AutoencoderTiny (TAESDXL and the bundled base) plain latents.
            latents.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents)
    return scale_latents(base, torch.cat(latents).float())


def scale_latents(base: Base, latents: Tensor) -> Tensor:
    """The VAE's latents in the UNet's scaling."""
    config = base.vae.config
    if statistics := _statistics(base, latents):
        latents = (latents - statistics[0]) / statistics[1]
    return latents * config["scaling_factor"]


def unscale_latents(base: Base, latents: Tensor) -> Tensor:
    """Latents in the UNet's scaling as the VAE made them; the inverse of `scale_latents`."""
    latents = latents / base.vae.config["scaling_factor"]
    if statistics := _statistics(base, latents):
        latents = latents * statistics[1] + statistics[0]
    return latents


def _statistics(base: Base, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each channel, for VAEs whose configuration has them, [1, C, 1, 1]."""
    values = base.vae.config.get("latents_mean"), base.vae.config.get("latents_std")
    if not all(values):
        return None
    mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in values)
    return mean, std
