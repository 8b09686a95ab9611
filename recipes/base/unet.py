"""Stage `unet`: v-prediction on latents in memory, conditioned by the frozen text encoders."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from recipes.base.captions import Kind, wordings
from recipes.base.config import Recipe, UnetSettings
from recipes.base.dataset import training_images
from recipes.base.draws import Batch, Batches, Deck
from recipes.base.latents import stored_latents
from recipes.base.loop import Figures, Stage
from recipes.base.optimizers import MuonAdamW, adamw
from recipes.base.sheets import sheet
from recipes.base.text import TextEncoders
from recipes.base.vae import broad_images, open_vae
from recipes.base.widen import widen_first_level, widen_unet
from recipes.base.world import World
from unziplora.errors import UserError

SHEET_STEPS = 20
"""Sampling steps of the images on a sheet."""

TIME_WIDTH = 256
"""Width of the timestep embedding, whatever the width of the first level."""


def build_unet(settings: UnetSettings, latent_channels: int, text_width: int, pooled: int) -> UNet2DConditionModel:
    """Return an untrained UNet of SDXL's topology: every block name of SDXL exists."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(settings.channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=tuple(settings.transformer_layers),
        attention_head_dim=tuple(settings.heads),
        cross_attention_dim=text_width,
        time_embedding_dim=TIME_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=settings.time_embedding,
        projection_class_embeddings_input_dim=6 * settings.time_embedding + pooled,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def check_levels(unet: UNet2DConditionModel, settings: UnetSettings, init: Path) -> None:
    """Raise UserError if a recipe would not build this UNet: its checkpoint could not be exported."""
    for key, name in (
        ("channels", "block_out_channels"),
        ("heads", "attention_head_dim"),
        ("transformer_layers", "transformer_layers_per_block"),
    ):
        has, asked = list(unet.config[name]), getattr(settings, key)
        if has != asked:
            raise UserError(f"unet.{key} is {asked} in the recipe and {has} in {init}: set it to {has}")


def build_scheduler() -> DDIMScheduler:
    """Return a v-prediction scheduler with SDXL's betas, rescaled so that the last step is pure noise.

    The words alone then decide the background, a dark one too (Lin et al. 2023,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def assemble(text: TextEncoders, vae: AutoencoderTiny, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """Return the parts as a diffusers pipeline."""
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text.encoders[0],
        text_encoder_2=text.encoders[1],
        tokenizer=text.tokenizers[0],
        tokenizer_2=text.tokenizers[1],
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained_pipeline(recipe: Recipe) -> tuple[StableDiffusionXLPipeline, int]:
    """Return the pipeline of a recipe's checkpoint, with averaged weights, and the number of its steps.

    Raises:
        UserError: there is no checkpoint.
    """
    cpu, checkpoint = torch.device("cpu"), recipe.output / "unet" / "checkpoint.pt"
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing: run `python -m recipes.base.train` with this recipe first")
    text = TextEncoders.load(recipe.output / "clip", cpu)
    vae = open_vae(recipe)
    width = sum(encoder.config.hidden_size for encoder in text.encoders)
    unet = build_unet(recipe.unet, vae.config.latent_channels, width, text.encoders[1].config.projection_dim)
    unet.register_to_config(sample_size=recipe.world.resolution // 8)
    state = torch.load(checkpoint, map_location=cpu, weights_only=True)
    unet.load_state_dict(state["modules"]["ema"])
    return assemble(text, vae.eval(), unet.eval()), state["step"]


def take_over(recipe: Recipe, init: Path) -> None:
    """Copy an exported base's text encoders and autoencoder, where the recipe has not trained its own."""
    clip, vae = recipe.output / "clip", recipe.output / "vae" / "vae"
    if not (clip / "text_encoder").exists():
        TextEncoders.load(init, torch.device("cpu")).save(clip)
    if not vae.exists():
        AutoencoderTiny.from_pretrained(init, subfolder="vae", torch_dtype=torch.float32).save_pretrained(vae)


class UnetStage(Stage):
    """Training of the UNet. Text encoders and autoencoder are frozen, so their outputs are computed once."""

    name = "unet"

    def __init__(self, recipe: Recipe, init: Path | None = None):
        super().__init__(recipe)
        s = self.settings = recipe.unet
        if init:
            take_over(recipe, init)
        self.text = TextEncoders.load(recipe.output / "clip", self.device)
        self.vae = open_vae(recipe).to(self.device).eval().requires_grad_(False)
        torch.manual_seed(recipe.seed)
        self.unet = self.start(init).to(self.device)
        self.ema = copy.deepcopy(self.unet).eval().requires_grad_(False)
        self.modules = {"unet": self.unet, "ema": self.ema}
        muon = s.optimizer == "muon"
        self.optimizer = MuonAdamW(self.unet, s.lr) if muon else adamw({"unet": self.unet}, s.lr)
        self.forward = torch.compile(self.unet) if s.compile else self.unet
        self.scheduler = build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(self.device)
        self.world = World(recipe.world)
        self.tokens = (recipe.world.resolution // 8 // 2) ** 2  # attention starts at the second level
        own = training_images(recipe)
        images = broad_images(recipe) if s.broad else own
        self.latents, papers = stored_latents(recipe, self.vae, images.pixels, s.graded > 0, self.device)
        deck = Deck(images, self.world, s, papers, len(own))
        self.batches = Batches(deck, s, recipe.seed, self.text.tokenizers)

    def start(self, init: Path | None) -> UNet2DConditionModel:
        """Return an untrained UNet or that of an exported base, widened to the autoencoder and the recipe.

        Raises:
            ValueError: the base's UNet has other levels than the recipe, besides a narrower first one.
        """
        channels, first_level = self.vae.config.latent_channels, self.settings.channels[0]
        if init:
            unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet", torch_dtype=torch.float32)
            unet = widen_unet(unet, channels) if unet.config.in_channels < channels else unet
            if unet.config.block_out_channels[0] < first_level:
                unet = widen_first_level(unet, first_level)
            check_levels(unet, self.settings, init)
            return unet
        width = sum(encoder.config.hidden_size for encoder in self.text.encoders)
        return build_unet(self.settings, channels, width, self.text.encoders[1].config.projection_dim)

    def conditions(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hidden states and the added conditions of a batch."""
        hidden, pooled = self.text.encode(batch.texts) if batch.ids is None else self.text.encode_ids(*batch.ids)
        if batch.blend:
            weights = batch.blend.weights.to(hidden)
            hidden = torch.lerp(*hidden.chunk(2), weights[:, None, None])
            pooled = torch.lerp(*pooled.chunk(2), weights[:, None])
        keep, size = batch.mask.to(self.device), float(self.recipe.world.resolution)
        ids = torch.tensor([size, size, 0, 0, size, size], device=self.device).repeat(len(keep), 1)
        return hidden * keep[:, None, None], {"text_embeds": pooled * keep[:, None], "time_ids": ids}

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        batch = self.batches.at(step)
        self.draw(step)  # seeds the noise
        latents = self.latents[batch.indices.to(self.device)]
        hidden, added = self.conditions(batch)
        t = batch.timesteps.to(self.device)
        noise = torch.randn_like(latents)
        a, b = (x[:, None, None, None] for x in (self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()))
        predicted = self.forward(a * latents + b * noise, t, hidden, added_cond_kwargs=added).sample
        loss = (predicted.float() - (a * noise - b * latents)).pow(2).mean()
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the averaged weights every `ema_every` steps."""
        if (step + 1) % self.settings.ema_every:
            return
        moves = (step + 1) // self.settings.ema_every
        weight = 1 - min(self.settings.ema_decay, (1 + moves) / (10 + moves))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), weight)

    def report(self, step: int) -> None:
        """Write a sheet of concepts × styles; the last two columns name no style, the last row no content."""
        pipe = assemble(self.text, self.vae, self.ema)
        concepts = self.world.trained_concepts[:: max(1, len(self.world.trained_concepts) // 10)][:10]
        styles = list(self.recipe.world.styles)
        rows = []
        for concept in [*concepts, None]:
            caption = self.world.caption(concept) if concept else None
            kind: Kind = "full" if concept else "style"
            prompts = [wordings(kind, caption, style)[0] for style in styles]
            prompts += [wordings("content", caption)[0]] * 2 if caption else ["", ""]
            rows.append(sample(pipe, prompts, self.recipe.world.resolution, self.settings.guidance, 7, SHEET_STEPS))
        sheet(rows, self.folder / f"sheet-{step:06d}.png")


def sample(
    pipe: StableDiffusionXLPipeline, prompts: list[str], size: int, guidance: float, seed: int, steps: int = 20
) -> np.ndarray:
    """Sample images uint8 [N, size, size, 3] for prompts, with a fixed noise for each place in the list."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipe(
        prompts,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=noise,
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)
