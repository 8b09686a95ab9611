"""Head start for the autoencoder: an encoder that begins as the principal components of 8 × 8 patches."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from unziplora.errors import UserError

PATCH = 8


def patches(pixels: np.ndarray) -> Tensor:
    """Cut images uint8 [N, R, R, 3] into patches [N · (R / 8)², 8, 8, 3] in 0…1."""
    count, size = len(pixels), pixels.shape[1] // PATCH
    parts = torch.from_numpy(np.ascontiguousarray(pixels)).reshape(count, size, PATCH, size, PATCH, 3)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, PATCH, PATCH, 3).double() / 255


def principal_components(pixels: np.ndarray, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [192], leading directions [count, 192] and their variances [count] of patches."""
    rows = patches(pixels).flatten(1)
    mean = rows.mean(0)
    variances, directions = torch.linalg.eigh((rows - mean).T.cov())
    return mean, directions.T.flip(0)[:count], variances.flip(0)[:count]


def latent_spread(variances: Tensor) -> Tensor:
    """Return the latents' standard deviations, mean square 1; strong components stay stronger, less so than in pixels.

    With equal spreads a diffusion model would spend as much on the weakest component, grain, as on color.
    """
    spread = variances**0.25
    return spread / spread.square().mean().sqrt()


@torch.no_grad()
def _gather(layer: nn.Conv2d, channels: int) -> None:
    """Make a strided convolution move its four pixels into channels: (row, column, channel) in this order."""
    layer.weight[: 4 * channels] = 0
    for place in range(4):
        for channel in range(channels):
            layer.weight[place * channels + channel, channel, 1 + place // 2, 1 + place % 2] = 1


@torch.no_grad()
def start_as_pca(vae: AutoencoderTiny, pixels: np.ndarray) -> Tensor:
    """Set the encoder so that latents are scaled principal components; return their standard deviations, [C].

    The pixels reach the last strided convolution unchanged, because all of them are positive and residual branches
    start at zero. There each component takes two channels, its positive and its negative part. Further channels stay
    random.

    Raises:
        UserError: the encoder is too narrow: it needs 48 channels, and two for each latent channel.
    """
    latents, width = vae.config.latent_channels, vae.config.encoder_block_out_channels[-1]
    if width < max(48, 2 * latents):
        raise UserError(f"vae channels {width} are too few to start from {latents} principal components")
    mean, directions, variances = principal_components(pixels, latents)
    spread = latent_spread(variances)
    maps = directions * (spread / variances.sqrt())[:, None]
    first, second, third, fourth, last = (layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d))
    for block in vae.encoder.layers:
        if not isinstance(block, nn.Conv2d):
            nn.init.zeros_(block.conv[4].weight)
            nn.init.zeros_(block.conv[4].bias)
    first.weight[:3], first.bias[:3] = 0, 0
    first.weight[range(3), range(3), 1, 1] = 1
    _gather(second, 3)
    _gather(third, 12)
    # The 48 channels before the last stride are (row, column) in a 2 × 2, of (row, column) in a 2 × 2, of colors;
    # a patch is [y, x, color] with y = (place in the last 2 × 2, then third's, then second's).
    by_place = maps.reshape(latents, 2, 2, 2, 2, 2, 2, 3)  # y: last, third, second; x: last, third, second; color
    ordered = by_place.permute(0, 2, 5, 3, 6, 7, 1, 4).reshape(latents, 48, 2, 2).float()
    fourth.weight[: 2 * latents] = 0
    fourth.weight[:latents, :48, 1:, 1:] = ordered
    fourth.weight[latents : 2 * latents, :48, 1:, 1:] = -ordered
    nn.init.zeros_(last.weight)
    last.weight[range(latents), range(latents), 1, 1] = 1
    last.weight[range(latents), range(latents, 2 * latents), 1, 1] = -1
    last.bias.copy_(-(maps @ mean))
    return spread.float()
