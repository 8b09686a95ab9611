"""What `split` learns from: pictures and prompts encoded once, class pictures, the style's words."""

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
        examples: the pictures; their conditioning is the three prompts' embeddings joined, or the full prompt's
            alone (no prompt separation).
        alone: by LoRA name, what is seen in the steps in which it learns alone; default: the examples.
        priors: by LoRA name, class pictures for those whose prior is preserved.
        text: the style LoRA's part in the text encoders, which the conditioning was made with; it is done.
        pictures: what the examples were made from, for the sample sheet.
    """

    examples: Examples
    alone: Mapping[str, Examples] = field(default_factory=dict)
    priors: Mapping[str, Examples] = field(default_factory=dict)
    text: TextLora | None = None
    pictures: Sequence[Image.Image] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned before the first step: the text encoders' LoRA and the embeddings made with it, by name.

        LearnedExamples anew it would take minutes, and on another device not be the same to the last digit.
        """
        if self.text is None:
            return {}
        told = {"full": self.examples, **self.alone}
        tokens = {f"told.{name}.tokens": examples.conditioning.tokens for name, examples in told.items()}
        pooled = {f"told.{name}.pooled": examples.conditioning.pooled for name, examples in told.items()}
        return {**self.text.state_dict(), **tokens, **pooled}

    def restored(self, state: Mapping[str, Tensor]) -> TrainingData:
        """The same with what `state_dict` told; the text encoders are changed in place."""
        if self.text is None:
            return self
        self.text.load_state_dict(state)

        def told(name: str, examples: Examples) -> Examples:
            now = examples.conditioning
            tokens, pooled = (state[f"told.{name}.{part}"] for part in ("tokens", "pooled"))
            return replace(
                examples, conditioning=Conditioning(tokens.to(now.tokens), pooled.to(now.pooled), now.time_ids)
            )

        alone = {name: told(name, examples) for name, examples in self.alone.items()}
        return replace(self, examples=told("full", self.examples), alone=alone)


def encode_training_data(config: SplitConfig, setup: Setup) -> TrainingData:
    """Make class pictures, encode pictures and prompts, learn the style's words if the recipe asks for it."""
    pictures, words = load_images(config, setup.size), config.prompts()
    prompts = Prompts(**words) if config.prompt_separation else Prompts(words["full"])
    priors = _priors(config, setup)  # before the words are learned: class pictures are the base's own
    examples = image_examples(setup, config, pictures, prompts)

    def with_prompts(prompts: Prompts) -> Examples:
        rows = conditioning_of(setup.base, prompts, setup.size, len(pictures))
        return to_device(replace(examples, conditioning=rows), setup.base)

    text, alone = None, {}
    if config.phrase_steps:
        text, variants = learn_style_phrase(setup, config, pictures, examples)
        examples = with_prompts(prompts)
        if variants is not None:
            alone["content"] = variants
    if config.style_alone:  # away from the full prompt, which names the content
        alone["style"] = with_prompts(_alike(config, words["style"]))
    return TrainingData(examples, alone, priors, text, pictures)


def check_prompts(config: SplitConfig) -> None:
    """Fill in all prompts.

    Raises:
        UserError: one is not usable.
    """
    Prompts(**config.prompts())
    _class_prompts(config)


def _class_prompts(config: SplitConfig) -> dict[str, Prompts]:
    """What the class pictures of each LoRA whose prior is preserved show."""
    templates = {"content": config.content_class_prompt, "style": config.style_class_prompt}
    wanted = [name for name, weight in config.prior_weights().items() if weight > 0]
    return {name: _alike(config, config.fill(templates[name])) for name in wanted}


def _priors(config: SplitConfig, setup: Setup) -> dict[str, Examples]:
    prompts = _class_prompts(config)
    return {name: class_examples(setup, config, text, config.prior_images) for name, text in prompts.items()}


def _alike(config: SplitConfig, text: str) -> Prompts:
    """One prompt for all to see."""
    return Prompts(text, text, text) if config.prompt_separation else Prompts(text)
