"""Recipe of `train dreambooth`, and its presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from unziplora.config.recipe import expert, key
from unziplora.config.training import SMALL, ImageConfig, Target


class DreamBoothConfig(ImageConfig):
    """Train one LoRA on images of a subject, of a style, or of both (DreamBooth, arXiv 2208.12242)."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "bundled": {**SMALL, "learning_rate": 1e-3}}

    content: str | None = key(None, 'Word for the subject, such as "cat".', "Input", min_length=1)
    style: str | None = key(None, 'Phrase for the style, such as "pencil sketch".', "Input", min_length=1)
    preset: Literal["auto", "default", "bundled"] = key(
        "auto", "Settings that yours override; auto: bundled on the bundled base, else default.", "Input"
    )
    prompts: list[str] = expert(
        [],
        "Prompt of the images: one for all, or one each; default: 'a {token} {content}', 'an image in {style} "
        "style', or both in one.",
        "Prompts",
    )
    prior: float = key(
        0.0, "Weight of prior preservation on class images, which the base generates; usually 1.", "Method", ge=0
    )
    class_prompt: str | None = expert(
        None, "Prompt of the class images; default: 'a {content}', or 'an image' without a content.", "Prompts"
    )
    prior_images: int = expert(100, "Number of class images.", "Method", ge=1)
    class_folder: Path | None = expert(
        None,
        "Folder of class images; missing ones are generated and stay there; default: a folder in the cache for the "
        "base and the prompt.",
        "Method",
        private=True,
    )
    targets: list[Target] = expert(["attention"], "Layers of the UNet to adapt.", "Method", min_length=1)
    text_encoders: bool = key(False, "Adapt the attentions of the text encoders too.", "Method")

    learning_rate: float = key(1e-4, "Learning rate.", "Training", ge=0)
    text_learning_rate: float = expert(5e-5, "Learning rate of the text encoders' LoRA.", "Training", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _write_prompts(cls, values: Any) -> Any:
        """Add the prompts that follow from the words, so that a run's settings contain them."""
        if not isinstance(values, dict):
            return values
        parts = [values.get("content") and "a {token} {content}", values.get("style") and "in {style} style"]
        prompt = " ".join(part for part in parts if part)
        prompt = prompt if values.get("content") else f"an image {prompt}"
        derived = {"prompts": [prompt], "class_prompt": "a {content}" if values.get("content") else "an image"}
        return {**values, **{name: text for name, text in derived.items() if not values.get(name)}}

    @model_validator(mode="after")
    def _consistent(self) -> DreamBoothConfig:
        if self.content is None and self.style is None:
            raise ValueError("nothing to learn: give a word for the content, a phrase for the style, or both")
        if len(self.prompts) not in (1, len(self.images)):
            raise ValueError(
                f"{len(self.prompts)} prompts for {len(self.images)} images: give one for all, or one per image"
            )
        text = {"text_learning_rate": self.text_learning_rate} if self.text_encoders else {}
        self.check_rates(learning_rate=self.learning_rate, **text)
        return self

    def prior_weights(self) -> dict[str, float]:
        """Return the weight of prior preservation of the one LoRA."""
        return {self.product: self.prior}

    @property
    def product(self) -> str:
        """Kind of the LoRA and name of its file: content, style, or lora for both in one."""
        return "lora" if self.content and self.style else "content" if self.content else "style"

    def filled_prompts(self) -> dict[str, str]:
        """Return the distinct prompts of the images, and that of the class images."""
        prompts = {f"image {number}": text for number, text in enumerate(dict.fromkeys(self.image_prompts()), 1)}
        return {**prompts, **(super().filled_prompts() if self.prior else {})}

    def image_prompts(self) -> list[str]:
        """Return the filled prompt of each image."""
        filled = [self.fill(text) for text in self.prompts]
        return filled * len(self.images) if len(filled) == 1 else filled
