"""Open a base model of SDXL's topology, whatever form it comes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn


@dataclass
class Base:
    """A frozen base model, ready for use.

    Attributes:
        pipe: diffusers' own pipeline; everything in it is in eval mode and asks for no gradient.
        name: what the user called it: 'bundled', a folder's or file's name, or a hub id.
        resolution: side of the pictures it was trained on, in pixels.
        prediction_type: 'epsilon' or 'v_prediction', from the scheduler's configuration.
    """

    pipe: StableDiffusionXLPipeline
    name: str
    resolution: int
    prediction_type: str

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipe.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    @property
    def tokenizers(self) -> list:
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    @property
    def scheduler(self):  # type: ignore[no-untyped-def]
        return self.pipe.scheduler

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise (arXiv 2305.08891)."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype


def load_base(source: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Base:
    """Open 'bundled', a diffusers folder, a hub id or a single .safetensors checkpoint."""
    pipe = StableDiffusionXLPipeline.from_pretrained(
        source, torch_dtype=dtype, use_safetensors=True, add_watermarker=False
    )
    return _finish(pipe, Path(source).name, device)


def _finish(pipe: StableDiffusionXLPipeline, name: str, device: str | torch.device) -> Base:
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.eval().requires_grad_(False).to(device)
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return Base(pipe, name, resolution, pipe.scheduler.config.get("prediction_type", "epsilon"))
