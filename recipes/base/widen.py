"""More latent channels for a trained base. The new channels have no effect at first."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn


@torch.no_grad()
def copy_corner(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy smaller tensors of the same names into the leading corner of a module's tensors."""
    for name, wide in module.state_dict().items():
        old = state[name]
        wide[tuple(slice(size) for size in old.shape)] = old


@torch.no_grad()
def widen_vae(vae: AutoencoderTiny, channels: int) -> AutoencoderTiny:
    """Return the autoencoder with more latent channels, which its decoder ignores at first."""
    wide = AutoencoderTiny.from_config({**vae.config, "latent_channels": channels})
    nn.init.zeros_(wide.decoder.layers[0].weight)
    copy_corner(wide, vae.state_dict())
    return wide


@torch.no_grad()
def widen_unet(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """Return the UNet with more latent channels, for which it predicts zero at first."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": channels, "out_channels": channels})
    for parameter in (wide.conv_in.weight, wide.conv_out.weight, wide.conv_out.bias):
        nn.init.zeros_(parameter)
    copy_corner(wide, unet.state_dict())
    return wide
