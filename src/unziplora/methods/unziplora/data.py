"""Training data of `split`: images and prompts encoded once, class images, and the learned style phrase."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unziplora.config.split import SplitConfig
from unziplora.images.preprocess import to_tensor
from unziplora.methods.adapters import TrainingData
from unziplora.methods.data import class_examples, conditioning_of, image_examples, latents_of_tensors, sizes_of
from unziplora.methods.unziplora.style_phrase import learn_style_phrase
from unziplora.models.text import Prompts
from unziplora.training.loss import Examples, to_device
from unziplora.training.method import IMAGES, Setup


def encode_training_data(config: SplitConfig, setup: Setup) -> TrainingData:
    """Generate class images, encode images and prompts, and learn the style phrase if configured."""
    texts, images = config.prompts(), setup.images.of()
    prompts = Prompts(**texts) if config.separates_prompts else Prompts(texts["full"])
    priors = {  # before the phrase is learned: class images are the base's own
        name: class_examples(setup, config, text, config.prior_images) for name, text in _class_prompts(config).items()
    }
    examples = image_examples(setup, config, prompts)
    style_examples = in_all_orientations(setup, examples) if config.style_variants else examples
    sizes = sizes_of(setup.images.groups[IMAGES])

    def with_prompts(examples: Examples, prompts: Prompts) -> Examples:
        rows = conditioning_of(setup.base, prompts, sizes).repeat(len(examples.latents) // len(sizes))
        return to_device(replace(examples, conditioning=rows), setup.base)

    text, alone = None, {}
    if config.phrase_steps:  # from here on the VAE may be on the CPU
        text, variants = learn_style_phrase(setup, config, images, examples)
        examples = with_prompts(examples, prompts)
        if variants is not None:
            alone["content"] = variants
    if config.style_alone:  # not the full prompt, which names the content
        alone["style"] = with_prompts(style_examples, _shared(config, texts["style"]))
    return TrainingData(examples, alone, priors, text, images)


def in_all_orientations(setup: Setup, examples: Examples) -> Examples:
    """Return the images turned and mirrored, their weights too: all a first way, then all a second, and so on.

    A style stays what it is; a drawing that comes in all orientations is harder to learn. The conditioning is not
    repeated: the caller replaces it.
    """
    ways = zip(*(orientations(to_tensor(image)) for image in setup.images.of()), strict=True)
    latents = latents_of_tensors(setup.base, [image for way in ways for image in way])
    weights = None if examples.weights is None else torch.cat(orientations(examples.weights))
    return replace(examples, latents=latents, weights=weights)


def orientations(image: Tensor) -> list[Tensor]:
    """Turn and mirror an image, [..., H, W]: in eight ways if it is square, else in the four of the same shape."""
    turned = [image.rot90(quarters, (-2, -1)) for quarters in range(4)]
    same = [way for way in turned if way.shape == image.shape]
    return same + [way.flip(-1) for way in same]


def check_prompts(config: SplitConfig) -> None:
    """Fill in all prompts.

    Raises:
        UserError: one is not usable.
    """
    Prompts(**config.prompts())
    _class_prompts(config)


def _class_prompts(config: SplitConfig) -> dict[str, Prompts]:
    """Return the prompts of the class images, by the name of the LoRA whose prior they preserve."""
    templates = {"content": config.content_class_prompt, "style": config.style_class_prompt}
    names = [name for name, weight in config.prior_weights().items() if weight > 0]
    return {name: _shared(config, config.fill(templates[name])) for name in names}


def _shared(config: SplitConfig, text: str) -> Prompts:
    """Return one prompt for the base and both LoRAs."""
    return Prompts(text, text, text) if config.separates_prompts else Prompts(text)
