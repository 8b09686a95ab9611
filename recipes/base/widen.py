"""More channels for a trained base: in its latents, without effect at first, or in the first level of its UNet."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from unziplora.errors import UserError

TIMESTEPS = 1000
"""Timesteps of the schedule that the base is trained with."""

COPY_NOISE = 0.3
"""Noise on the weights of copied inputs, as a share of their spread. Without it, equal copies would stay equal."""


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


@torch.no_grad()
def widen_first_level(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """Return the UNet with more channels at the latents' full size; its predictions are about the same at first.

    Some channels are copied, and what reads them shares its weights among the copies (Net2Net, arXiv 1511.05641).
    Norms over groups with copied channels and the finer timestep frequencies change the result a little.

    Raises:
        UserError: the second level has as many channels. It would have no shortcut convolution, and the base has one.
    """
    width, second = unet.config.block_out_channels[:2]
    if channels == second:
        raise UserError(f"the first level cannot have {channels} channels, as the second has")
    time_width = unet.time_embedding.linear_1.out_features  # by default four times the width
    levels = (channels, *unet.config.block_out_channels[1:])
    wide = UNet2DConditionModel.from_config(
        {**unet.config, "block_out_channels": levels, "time_embedding_dim": time_width}
    )
    sources = copied_channels(width, channels, unet.config.norm_num_groups)
    draw = torch.Generator().manual_seed(0)
    state = wide.state_dict()
    for name, old in unet.state_dict().items():
        outputs, *inputs = state[name].shape
        if name == "time_embedding.linear_1.weight":
            state[name] = refit_to_frequencies(old, channels)
            continue
        new = old[sources_along(outputs, old.shape[0], width, sources)]
        if inputs:
            new = share_inputs(new, sources_along(inputs[0], old.shape[1], width, sources), draw)
        state[name] = new
    wide.load_state_dict(state)
    return wide


def copied_channels(old: int, new: int, groups: int) -> Tensor:
    """Return the channel that each of the `new` channels copies, in order of the norms' groups.

    Odd groups copy from their second half, so that no place in a group is preferred.
    """
    before, after = old // groups, new // groups
    first = torch.arange(after).repeat(groups, 1)
    shift = (torch.arange(groups) % 2)[:, None] * (before // 2)
    places = torch.where(first < before, first, (first - before + shift) % before)
    return (places + before * torch.arange(groups)[:, None]).flatten()


def sources_along(new: int, old: int, width: int, sources: Tensor) -> Tensor:
    """Return the index that each of `new` indices of an axis copies; the first level's channels are its last ones.

    In front of them may be those of another level: an up block reads its own and the skipped ones together.
    """
    times = (new - old) // (len(sources) - width)
    head = old - times * width
    return torch.cat([torch.arange(head), *(head + number * width + sources for number in range(times))])


def share_inputs(weight: Tensor, index: Tensor, draw: torch.Generator) -> Tensor:
    """Return a weight [out, in, …] whose inputs are copied by `index`: for equal copies the same result."""
    count = torch.bincount(index)
    if len(count) == len(index):
        return weight
    count = count.view(1, -1, *[1] * (weight.ndim - 2)).to(weight)
    copies = (weight / count)[:, index]
    noise = COPY_NOISE * weight.std() * torch.randn(copies.shape, generator=draw)
    mean = torch.zeros_like(weight).index_add_(1, index, noise) / count
    return copies + noise - mean[:, index]


def refit_to_frequencies(weight: Tensor, channels: int) -> Tensor:
    """Return the first layer of the timestep embedding for more sinusoids, fitted to its outputs by least squares."""
    every = torch.arange(TIMESTEPS, dtype=torch.float64)
    before, after = (
        get_timestep_embedding(every, size, flip_sin_to_cos=True, downscale_freq_shift=0).double()
        for size in (weight.shape[1], channels)
    )
    ridge = 1e-6 * torch.eye(channels, dtype=torch.float64)
    fitted = torch.linalg.solve(after.T @ after + ridge, after.T @ before @ weight.double().T)
    return fitted.T.to(weight)
