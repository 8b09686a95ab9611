"""The denoising loss, with noise that depends on (seed, purpose, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from unziplora.models.base import Base
from unziplora.models.text import Conditioning, ConditioningSource
from unziplora.training.cuda_graphs import Predict

ArrayT = TypeVar("ArrayT", Tensor, "np.ndarray[Any, Any]")


@dataclass(frozen=True)
class Examples:
    """Training images, encoded once."""

    latents: Tensor  # [N, C, h, w], in the UNet's scaling
    conditioning: Conditioning  # one row per image
    weights: Tensor | None = None  # of the loss per latent pixel, [N, 1, h, w]; None: equal


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator whose stream depends on the key alone.

    With the key (seed, purpose, step), a resumed run draws what the uninterrupted one would have drawn. Switching one
    part of the loss on or off does not change the noise of the others.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def denoising_loss(
    predict: Predict,
    scheduler: DDPMScheduler,
    examples: Examples,
    *,
    batch_size: int,
    draw: torch.Generator,
    min_snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    timestep_shift: float = 1.0,
    conditioning: ConditioningSource | None = None,
) -> Tensor:
    """Return the mean squared error of the UNet's prediction on noisy latents at random timesteps, a scalar.

    The target is the noise, the velocity or the clean latent, as `scheduler.config.prediction_type` says.

    Args:
        predict: the UNet, or its recorded passes.
        batch_size: number of noisy latents; images are taken in turn from a random start.
        draw: generator of images, timesteps and noise.
        min_snr_gamma: γ of min-SNR weighting (arXiv 2303.09556), or None for equal weights.
        noise_offset: size of additional noise that is constant over each latent channel.
        timestep_shift: see `shifted`.
        conditioning: used instead of the examples' own.
    """
    drawn = noised(scheduler, examples, batch_size, draw, noise_offset, timestep_shift)
    clean, timesteps = examples.latents[drawn.index], drawn.timesteps
    (prediction, *_) = predict(**drawn.unet_inputs(conditioning or examples.conditioning))
    error = (prediction.float() - target(scheduler, clean, drawn.noise, timesteps).float()).square()
    if examples.weights is not None:
        weights = examples.weights[drawn.index]
        # Normalized per image, so that a small subject counts as much as a large one.
        error = error * (weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6))
    error = error.mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        error = error * snr_weights(scheduler, timesteps, min_snr_gamma)
    return error.mean()


@dataclass(frozen=True)
class Noised:
    """Noisy latents of a batch of images."""

    index: Tensor  # numbers of the images, [B]
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    latents: Tensor  # noisy, [B, C, h, w]

    def unet_inputs(self, conditioning: ConditioningSource) -> dict[str, Any]:
        """Return the inputs of the UNet by name, from the conditioning of all images."""
        rows = conditioning.take(self.index)
        return {
            "sample": self.latents,
            "timestep": self.timesteps,
            "encoder_hidden_states": rows.tokens,
            "added_cond_kwargs": {"text_embeds": rows.pooled, "time_ids": rows.time_ids},
            "return_dict": False,
        }


def noised(
    scheduler: DDPMScheduler,
    examples: Examples,
    batch_size: int,
    draw: torch.Generator,
    noise_offset: float = 0.0,
    timestep_shift: float = 1.0,
) -> Noised:
    """Draw images in turn from a random start, timesteps and noise, on the CPU so that all devices agree."""
    device, count = examples.latents.device, len(examples.latents)
    start = int(torch.randint(count, (1,), generator=draw))
    index = ((start + torch.arange(batch_size)) % count).to(device)
    clean = examples.latents[index]
    steps = int(scheduler.config["num_train_timesteps"])
    timesteps = shifted(torch.randint(steps, (batch_size,), generator=draw), steps, timestep_shift).to(device)
    noise = torch.randn(clean.shape, generator=draw)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*clean.shape[:2], 1, 1, generator=draw)
    noise = noise.to(device, clean.dtype)
    return Noised(index, noise, timesteps, scheduler.add_noise(clean, noise, timesteps))


def shifted(timesteps: Tensor, steps: int, shift: float) -> Tensor:
    """Move uniform timesteps 0…steps − 1, [B], towards noise by a shift above 1 (arXiv 2403.03206, equation 23)."""
    return towards_noise((timesteps + 0.5) / steps, steps, shift).long()


def towards_noise(fraction: ArrayT, steps: int, shift: float) -> ArrayT:
    """Convert even fractions 0…1 of the way to noise, of any shape, to shifted timesteps, not yet rounded."""
    return steps * shift * fraction / (1 + (shift - 1) * fraction)


def target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target of the UNet's prediction, [B, C, h, w]."""
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if kind == "sample":
        return clean
    raise ValueError(f"unknown prediction type {kind!r}")


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return min-SNR weights per image, [B]; the clean latent's loss has weight min(SNR, γ) (arXiv 2303.09556)."""
    alpha = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, γ) / SNR, also where zero terminal SNR divides by zero
    return snr.clamp(max=gamma) / (snr + 1 if kind == "v_prediction" else 1)


def loss_weights(masks: Sequence[Tensor], latents: Tensor, background: float) -> Tensor | None:
    """Convert subject masks, N × [1, H, W] in 0…1, to weights of the loss, [N, 1, h, w]; None without masks."""
    if not masks:
        return None
    small = F.interpolate(torch.stack(list(masks)).float(), latents.shape[-2:], mode="area")
    return background + (1 - background) * small


def to_device(examples: Examples, base: Base) -> Examples:
    """Move examples to the base's device; the conditioning takes its number format, latents become fp32."""
    weights = None if examples.weights is None else examples.weights.to(base.device)
    return Examples(
        examples.latents.to(base.device, torch.float32),
        examples.conditioning.to(base.device, base.dtype),
        weights,
    )


def orthogonality(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return L⊥, the mean over layers of mean_i |m_c^i · m_s^i| (arXiv 2412.04465; means as in the official code).

    Args:
        pairs: per layer, the effective scales mask ⊙ scale of the content and the style LoRA, [out] each.
    """
    by_width: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        by_width.setdefault(len(pair[0]), []).append(pair)
    # Layers of a width at once: one kernel for each of SDXL's hundreds of layers would cost more than the arithmetic.
    stacks = [map(torch.stack, zip(*alike, strict=True)) for alike in by_width.values()]
    return torch.cat([(content * style).abs().mean(1) for content, style in stacks]).mean()
