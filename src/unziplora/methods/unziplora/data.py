"""Training data of `split`: images and prompts encoded once, class images, and the learned style phrase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image
from torch import Tensor

from unziplora.config.split import SplitConfig
from unziplora.methods.data import class_examples, conditioning_of, image_examples, load_images
from unziplora.methods.unziplora.style_phrase import learn_style_phrase
from unziplora.models.text import Conditioning, Prompts
from unziplora.training.loss import Examples, to_device
from unziplora.training.method import Setup
from unziplora.training.text_encoder_lora import TextLora


@dataclass(frozen=True)
class TrainingData:
    """Everything that a content and a style LoRA learn from.

    Attributes:
        examples: the images with the three prompts' embeddings joined (`join_streams`), or the full prompt's alone.
        alone: examples of the steps in which a LoRA learns alone, by LoRA name; default: `examples`.
        priors: class images, by the name of the LoRA whose prior they preserve.
        text: text-encoder part of the style LoRA. Already trained, and used to compute the conditioning.
    """

    examples: Examples
    alone: Mapping[str, Examples] = field(default_factory=dict)
    priors: Mapping[str, Examples] = field(default_factory=dict)
    text: TextLora | None = None
    images: Sequence[Image.Image] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the embeddings computed with the text encoders' LoRA by name; none without such a LoRA.

        Learning them again takes minutes, and on another device gives other last digits.
        """
        if self.text is None:
            return {}
        return {
            f"conditioning.{name}.{part}": getattr(examples.conditioning, part)
            for part in ("tokens", "pooled")
            for name, examples in {"full": self.examples, **self.alone}.items()
        }

    def restored(self, state: Mapping[str, Tensor]) -> TrainingData:
        """Return a copy with the embeddings of a checkpoint."""
        if self.text is None:
            return self

        def restore(name: str, examples: Examples) -> Examples:
            now = examples.conditioning
            tokens, pooled = (state[f"conditioning.{name}.{part}"] for part in ("tokens", "pooled"))
            conditioning = Conditioning(tokens.to(now.tokens), pooled.to(now.pooled), now.time_ids)
            return replace(examples, conditioning=conditioning)

        alone = {name: restore(name, examples) for name, examples in self.alone.items()}
        return replace(self, examples=restore("full", self.examples), alone=alone)


def encode_training_data(config: SplitConfig, setup: Setup) -> TrainingData:
    """Generate class images, encode images and prompts, and learn the style phrase if configured."""
    images, texts = load_images(config, setup.size), config.prompts()
    prompts = Prompts(**texts) if config.prompt_separation else Prompts(texts["full"])
    priors = {  # before the phrase is learned: class images are the base's own
        name: class_examples(setup, config, text, config.prior_images) for name, text in _class_prompts(config).items()
    }
    examples = image_examples(setup, config, images, prompts)

    def with_prompts(prompts: Prompts) -> Examples:
        rows = conditioning_of(setup.base, prompts, setup.size, len(images))
        return to_device(replace(examples, conditioning=rows), setup.base)

    text, alone = None, {}
    if config.phrase_steps:
        text, variants = learn_style_phrase(setup, config, images, examples)
        examples = with_prompts(prompts)
        if variants is not None:
            alone["content"] = variants
    if config.style_alone:  # not the full prompt, which names the content
        alone["style"] = with_prompts(_shared(config, texts["style"]))
    return TrainingData(examples, alone, priors, text, images)


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
    return Prompts(text, text, text) if config.prompt_separation else Prompts(text)
