"""What `split` learns from: pictures and prompts encoded once, class pictures, the style's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from unziplora.config_split import SplitConfig
from unziplora.encode import picture_conditioning, to_device
from unziplora.methods.common import Setup, class_examples, load_pictures, picture_examples
from unziplora.methods.words import learn_words
from unziplora.objective import Examples
from unziplora.prompts import Prompts
from unziplora.text_lora import TextLora


@dataclass(frozen=True)
class Material:
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


def gather(config: SplitConfig, setup: Setup) -> Material:
    """Make class pictures, encode pictures and prompts, learn the style's words if the recipe asks for it."""
    pictures, words = load_pictures(config, setup.size), config.prompts()
    prompts = Prompts(**words) if config.prompt_separation else Prompts(words["full"])
    priors = _priors(config, setup)  # before the words are learnt: class pictures are the base's own
    examples = picture_examples(setup, config, pictures, prompts)

    def with_prompts(prompts: Prompts) -> Examples:
        rows = picture_conditioning(setup.base, prompts, setup.size, len(pictures))
        return to_device(replace(examples, conditioning=rows), setup.base)

    text, alone = None, {}
    if config.phrase_steps:
        text, variants = learn_words(setup, config, pictures, examples)
        examples = with_prompts(prompts)
        if variants is not None:
            alone["content"] = variants
    if config.style_alone:  # away from the full prompt, which names the content
        alone["style"] = with_prompts(_alike(config, words["style"]))
    return Material(examples, alone, priors, text, pictures)


def _priors(config: SplitConfig, setup: Setup) -> dict[str, Examples]:
    templates = {"content": config.content_class_prompt, "style": config.style_class_prompt}
    return {
        name: class_examples(setup, config, _alike(config, config.fill(templates[name])), config.prior_images)
        for name, weight in config.prior_weights().items()
        if weight > 0
    }


def _alike(config: SplitConfig, text: str) -> Prompts:
    """One prompt for all to see."""
    return Prompts(text, text, text) if config.prompt_separation else Prompts(text)
