"""Images and prompts encoded once, as examples to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.images.preprocess import load_image, load_mask, to_tensor
from unziplora.methods.class_images import class_images
from unziplora.models.base import Base
from unziplora.models.offload import text_encoders_ready, vae_ready
from unziplora.models.text import Conditioning, Prompts, embed, image_conditioning, time_ids
from unziplora.models.vae import encode_images
from unziplora.sampling.pipeline import Settings
from unziplora.training.loss import Examples, loss_weights, to_device
from unziplora.training.method import Setup


def load_images(config: ImageConfig, size: int) -> list[Image.Image]:
    """The configured pictures, square, of a side in pixels."""
    return [load_image(path, size) for path in config.images]


def latents_of(base: Base, images: Sequence[Image.Image]) -> Tensor:
    """Encode images, [N, C, h, w]; the UNet makes room on a GPU."""
    with vae_ready(base):
        return encode_images(base, [to_tensor(image) for image in images])


def conditioning_of(base: Base, prompts: Prompts | list[str], size: int, count: int) -> Conditioning:
    """Encode the prompts of `count` square images of a side in pixels, shared by all or one each."""
    with text_encoders_ready(base):
        if isinstance(prompts, Prompts):
            return image_conditioning(base, prompts, size, count)
        return embed(base, prompts).with_time_ids(time_ids(size, size, count))


def image_examples(
    setup: Setup, config: ImageConfig, pictures: list[Image.Image], prompts: Prompts | list[str]
) -> Examples:
    """The pictures as latents, the prompts (for all, or one each) as conditioning, masks as weights of the loss."""
    latents = latents_of(setup.base, pictures)
    masks = [load_mask(mask, setup.size) for mask in config.masks[: len(config.images)]]
    weights = loss_weights(masks, latents, config.background_weight)
    seen = conditioning_of(setup.base, prompts, setup.size, len(pictures))
    return to_device(Examples(latents, seen, weights), setup.base)


def class_examples(
    setup: Setup, config: TrainingConfig, prompts: Prompts, count: int, folder: Path | None = None
) -> Examples:
    """Class pictures by the base itself, as latents, for prior preservation (DreamBooth, arXiv 2208.12242)."""
    size = setup.size
    settings = Settings.square(
        size, steps=config.generated_steps, guidance=config.generated_guidance, batch_size=config.batch_size
    )
    pictures = class_images(setup.base, prompts.full, count, settings, setup.report, folder)
    latents = latents_of(setup.base, pictures)
    return to_device(Examples(latents, conditioning_of(setup.base, prompts, size, count)), setup.base)
