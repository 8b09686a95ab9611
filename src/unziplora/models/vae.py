"""Latents of images, in the scaling that the UNet was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unziplora.models.base import Base


@torch.no_grad()
def encode_images(base: Base, images: Sequence[Tensor]) -> Tensor:
    """Encode images on the VAE's device, [N, 3, H, W] in −1…1 → latents [N, C, h, w] in the UNet's scaling.

    The result is the mode of the VAE's distribution, not a sample: the same image always has the same latents.
    """
    vae = base.vae
    latents = []
    for image in images:  # one by one: at 1024 px the encoder takes 2.5 GiB for each
        encoded = vae.encode(image[None].to(vae.device, vae.dtype))
        # AutoencoderKL returns a distribution, AutoencoderTiny (TAESDXL and the bundled base) plain latents.
        latents.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents)
    return scale_latents(base, torch.cat(latents).float())


def scale_latents(base: Base, latents: Tensor) -> Tensor:
    """Convert the VAE's latents to the UNet's scaling."""
    if statistics := _statistics(base, latents):
        latents = (latents - statistics[0]) / statistics[1]
    return latents * base.vae.config["scaling_factor"]


def unscale_latents(base: Base, latents: Tensor) -> Tensor:
    """Convert latents from the UNet's scaling back to the VAE's; the inverse of `scale_latents`."""
    latents = latents / base.vae.config["scaling_factor"]
    if statistics := _statistics(base, latents):
        latents = latents * statistics[1] + statistics[0]
    return latents


def _statistics(base: Base, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of each channel, [1, C, 1, 1], where the VAE's configuration has them."""
    values = base.vae.config.get("latents_mean"), base.vae.config.get("latents_std")
    if not all(values):
        return None
    mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in values)
    return mean, std
