"""Latents in the scaling that the UNet was trained with, and conditioning."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from unziplora.images.preprocess import to_tensor
from unziplora.models.text import Prompts, embed, image_conditioning, time_ids
from unziplora.models.vae import encode_images
from unziplora.sampling.pipeline import decode
from unziplora.training.loss import loss_weights


@pytest.fixture
def image(shared_base) -> Image.Image:
    return Image.effect_mandelbrot((shared_base.resolution,) * 2, (-2, -1.5, 1, 1.5), 20).convert("RGB")


def with_vae(base, vae=None, **changes):
    """Copy a base with another VAE, or with changes to its VAE's configuration."""
    other = copy.copy(base)
    other.pipe = copy.copy(base.pipe)
    other.pipe.vae = vae or copy.deepcopy(base.vae)
    other.pipe.vae.register_to_config(**changes)
    return other


def difference(one: Image.Image, two: Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(two, dtype=float)).max())


def test_decoding_undoes_the_scaling_of_encoding(shared_base, image):
    x = to_tensor(image)
    plain = shared_base.vae.decode(shared_base.vae.encode(x[None]).latent_dist.mode()).sample
    expected = shared_base.pipe.image_processor.postprocess(plain.detach(), output_type="pil")[0]
    assert difference(decode(shared_base, encode_images(shared_base, [x]))[0], expected) <= 1
    channels = shared_base.unet.config.in_channels
    shifted = with_vae(shared_base, latents_mean=[0.3] * channels, latents_std=[1.7] * channels, scaling_factor=0.5)
    assert difference(decode(shifted, encode_images(shifted, [x]))[0], expected) <= 1
    latents = encode_images(with_vae(shared_base, scaling_factor=1.0), [x])
    by_hand = (latents - 0.3) / 1.7 * 0.5
    torch.testing.assert_close(encode_images(shifted, [x]), by_hand)


def test_autoencoder_without_distribution_works(shared_base, image):
    torch.manual_seed(0)
    channels = shared_base.unet.config.in_channels
    vae = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        scaling_factor=2.0,
    )
    base = with_vae(shared_base, vae)
    x = to_tensor(image)
    latents = encode_images(base, [x, x])
    torch.testing.assert_close(latents[1], vae.encode(x[None]).latents[0] * 2.0)
    assert latents.shape == (2, channels, x.shape[1] // 8, x.shape[2] // 8)


def test_image_conditioning_joins_embeddings_and_repeats_rows(shared_base):
    prompts = Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")
    conditioning = image_conditioning(shared_base, prompts, time_ids(64, 64, 3))
    streams = embed(shared_base, [prompts.full, prompts.content or "", prompts.style or ""])
    width = streams.tokens.shape[-1]
    assert conditioning.tokens.shape[::2] == (3, 3 * width)
    for index in range(3):
        torch.testing.assert_close(
            conditioning.tokens[2, :, index * width : (index + 1) * width], streams.tokens[index]
        )
    torch.testing.assert_close(conditioning.pooled[1], streams.pooled[0])
    assert conditioning.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    plain = image_conditioning(shared_base, Prompts(prompts.full), time_ids(64, 64))
    torch.testing.assert_close(plain.tokens, streams.tokens[:1])


def test_masks_become_weights_of_latent_pixels():
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :] = 1
    mask[:, 32:40, :4] = 1  # half of one latent pixel
    weights = loss_weights([mask], torch.zeros(1, 4, 8, 8), 0.2)
    assert weights is not None
    assert weights[0, 0, :4].eq(1).all()
    assert weights[0, 0, 4, 0].item() == pytest.approx(0.2 + 0.8 * 0.5)
    assert weights[0, 0, 5:].eq(0.2).all()
    assert loss_weights([], torch.zeros(1, 4, 8, 8), 0.2) is None
