"""The settings of one recipe: a TOML file read into pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from unziplora.errors import UserError
from unziplora.utils.inputs import read_toml


class Strict(BaseModel):
    """Base of all settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Style(Strict):
    """Sources of the images of one style: drawing sets as they are, or a filter over drawings."""

    sets: list[str] = []
    filter: str | None = None
    natural: bool = False
    """If true, images of this style also answer prompts that name no style."""


class WorldSettings(Strict):
    """Part of the world that a recipe trains on."""

    zip: Path
    meta: Path
    resolution: int = 64
    concepts: list[str] | Literal["all"] = "all"
    drawings: list[str] = ["noto", "twemoji", "fluent-emoji-flat", "emojione"]
    styles: dict[str, Style]
    variants: int = 2
    """Random renderings of each drawing by each filter."""
    held_out_pairs: float = 0.1
    """Share of (concept, style) pairs never trained."""
    seed: int = 0


class StageSettings(Strict):
    """Settings that every training stage has."""

    batch: int = 32
    lr: float = 5e-4
    warmup: int = 300
    steps: int = 10_000
    cooldown: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 5 %."""
    checkpoint_minutes: float = 3
    sample_minutes: float = 10
    log_every: int = 50


class VaeSettings(StageSettings):
    """Autoencoder: f = 8, trained on crops."""

    channels: int = 48
    start: Literal["random", "pca"] = "random"
    """`pca`: the encoder begins as the principal components of patches (at least 48 channels, two per latent)."""
    encoder_blocks: list[int] = [0, 1, 3, 4]
    decoder_blocks: list[int] = [4, 3, 2, 1]
    latent_channels: int = 16
    crop: int = 64
    pictures: int = 6000
    """Images added to the recipe's own, of all concepts that are not held out."""
    graded: float = 0.6
    """Share of crops on other paper, in other pigments and textures. An autoencoder reconstructs unknown looks as
    known ones, and no LoRA can then learn them."""
    latent_penalty: float = 0.03
    latent_noise: float = 0.1


class DecoderSettings(StageSettings):
    """Training of the decoder alone, for texture."""

    batch: int = 16
    lr: float = 3e-4
    warmup: int = 50
    steps: int = 2000
    crop: int = 64
    graded: float = 0.6
    latent_noise: float = 0.15
    critic_width: int = 24
    critic_start: int = 300
    """Steps over which the critic's weight rises."""
    adversarial: float = 0.03


class ClipSettings(StageSettings):
    """Tokenizer and the two text encoders, trained against a small image encoder."""

    merges: int = 3500
    widths: list[int] = [96, 160]
    layers: list[int] = [3, 4]
    heads: list[int] = [3, 5]
    embedding: int = 160
    """Width of the common space and of the pooled output of the second encoder."""
    own: float = 0.6
    """Share of each batch that is drawn from the recipe's own images instead of the broad ones."""


class UnetSettings(StageSettings):
    """SDXL's topology, small."""

    channels: list[int] = [64, 128, 192]
    heads: list[int] = [2, 4, 6]
    transformer_layers: list[int] = [1, 1, 2]
    time_embedding: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices, AdamW for the rest; needs torch 2.9."""
    ema_every: int = 8
    ema_decay: float = 0.995
    kinds: dict[str, float] = {"full": 0.63, "content": 0.15, "style": 0.1, "empty": 0.12}
    """Shares of the kinds of prompts."""
    graded: float = 0.0
    """Share of images on other paper, in other pigments and textures. Their prompts name it: "… on blue paper"."""
    blended: float = 0.0
    """Share of the prompts with a style that are embedded on the way to another style, less far more often. A learned
    phrase may lie between styles, where a base has to draw things too."""
    before: int = 0
    """Steps that the base of `--init` was trained for; the model card counts them."""
    before_batch: int | None = None
    """Batch size of these steps, if it was another."""
    broad: float = 0.0
    """Share of images from the `[vae] images` images of other concepts: shapes beyond the recipe's."""
    timestep_shift: float = 1.0
    """Above 1, noisy timesteps come more often. Larger latents need more noise to hide a shape, and a small model
    learns shapes last. 2 for twice the side (arXiv 2403.03206, section 5.3.2)."""
    guidance: float = 4.0
    """Classifier-free guidance of the sheets."""
    compile: bool = False
    workers: int = 0
    """Processes that draw batches ahead so that a GPU need not wait; with 0, each batch is drawn when needed."""

    def seen(self, steps: int) -> int:
        """Count the images seen after `steps` steps of this recipe, including those of `before`."""
        return steps * self.batch + self.before * (self.before_batch or self.batch)


class JudgeSettings(StageSettings):
    """The two classifiers of concept and style."""

    batch: int = 64
    lr: float = 2e-3
    warmup: int = 50
    steps: int = 900
    cooldown: float = 0.5
    width: int = 24
    test_drawings: list[str] = ["fxemoji", "noto-v1"]
    """Drawing sets that no judge is trained on; their accuracy is measured on these."""
    test_filters: list[str] = ["stained", "clay", "linocut"]


class Recipe(Strict):
    """Recipe of one TOML file: the world, and a table for each stage."""

    name: str
    output: Path
    threads: int = 2
    seed: int = 0
    world: WorldSettings
    vae: VaeSettings = VaeSettings()
    decoder: DecoderSettings = DecoderSettings()
    clip: ClipSettings = ClipSettings()
    unet: UnetSettings = UnetSettings()
    judges: JudgeSettings = JudgeSettings()

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a TOML; relative paths inside are relative to the current folder.

        Raises:
            UserError: it is missing, not TOML, or a key is unknown, missing or out of bounds.
        """
        try:
            return cls.model_validate(read_toml(Path(path)))
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise UserError("\n".join([f"{path}:", *faults])) from None
