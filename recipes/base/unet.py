"""Stage `unet`: v-prediction on latents kept in memory, conditioned by the frozen text encoders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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

from recipes.base.captions import Kind, draw_prompt, wordings
from recipes.base.config import Recipe, UnetSettings
from recipes.base.dataset import Pictures, training_pictures
from recipes.base.grades import grade_each
from recipes.base.loop import Stage, adamw
from recipes.base.sheets import sheet
from recipes.base.text import TextEncoders
from recipes.base.vae import broad_pictures, open_vae, to_tensor
from recipes.base.widen import widen_unet
from recipes.base.world import Item, World
from unziplora.objective import towards_noise


def build_unet(settings: UnetSettings, latent_channels: int, text_width: int, pooled: int) -> UNet2DConditionModel:
    """An untrained UNet of SDXL's topology: every block name of SDXL exists."""
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
        addition_embed_type="text_time",
        addition_time_embed_dim=settings.time_embedding,
        projection_class_embeddings_input_dim=6 * settings.time_embedding + pooled,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SDXL's betas, rescaled so that the last step is pure noise; v-prediction.

    Pure noise at the end makes grounds come from the words alone, dark grounds too (Lin et al. 2023,
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
    """The parts as diffusers' own pipeline."""
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
    """The pipeline of a recipe's checkpoint, with averaged weights, and the steps it was trained for."""
    cpu = torch.device("cpu")
    text = TextEncoders.load(recipe.output / "clip", cpu)
    vae = open_vae(recipe)
    width = sum(encoder.config.hidden_size for encoder in text.encoders)
    unet = build_unet(recipe.unet, vae.config.latent_channels, width, text.encoders[1].config.projection_dim)
    unet.register_to_config(sample_size=recipe.world.resolution // 8)
    state = torch.load(recipe.output / "unet" / "checkpoint.pt", map_location=cpu, weights_only=True)
    unet.load_state_dict(state["modules"]["ema"])
    return assemble(text, vae.eval(), unet.eval()), state["step"]


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Scaled latents [N, C, h, w] of pictures uint8 [N, R, R, 3]."""
    parts = [pixels[i : i + 64] for i in range(0, len(pixels), 64)]
    latents = torch.cat([vae.encode(to_tensor(part, device)).latents for part in parts])
    return latents.float() * vae.config.scaling_factor


class Pool:
    """Some of the pictures, by their numbers: those of each style, and those that answer prompts without a style."""

    def __init__(self, items: Sequence[Item], first: int = 0):
        numbered = list(enumerate(items, first))
        styles = sorted({item.style for item in items})
        self.by_style = [np.array([i for i, x in numbered if x.style == style]) for style in styles]
        self.natural = np.array([i for i, x in numbered if x.natural])

    def draw(self, kind: str, rng: np.random.Generator) -> int:
        """A picture's number: of a random style, or a natural one where the prompt names none."""
        numbers = self.natural if kind == "content" else self.by_style[int(rng.integers(len(self.by_style)))]
        return int(rng.choice(numbers))


class Deck:
    """Draws training examples: the kind of prompt first, then a style, then a picture of it, plain or graded.

    The graded picture of number i is number N + i; `papers` are its words. The recipe's own pictures come first, then
    those of all concepts, which are drawn at the share `broad`.
    """

    def __init__(
        self,
        pictures: Pictures,
        world: World,
        settings: UnetSettings,
        papers: Sequence[str] = (),
        own: int | None = None,
    ):
        self.items, self.world = pictures.items, world
        self.papers, self.graded = papers, settings.graded if papers else 0.0
        self.kinds, shares = list(settings.kinds), np.array(list(settings.kinds.values()))
        self.shares = shares / shares.sum()
        self.own = Pool(self.items[:own])
        self.broad = Pool(self.items[own:], own) if own is not None and settings.broad else None
        self.broad_share = settings.broad

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Indices of pictures and a prompt for each."""
        chosen, prompts = [], []
        for kind in rng.choice(self.kinds, count, p=self.shares):
            broad = self.broad if self.broad and rng.random() < self.broad_share else None
            index = (broad or self.own).draw(kind, rng)
            item, caption = self.items[index], self.world.caption(self.items[index].concept)
            paper = self.papers[index] if self.graded and rng.random() < self.graded else ""
            chosen.append(index + len(self.items) if paper else index)
            prompts.append(draw_prompt(kind, caption, item.style, rng, black=item.black, paper=paper))
        return np.array(chosen), prompts


def timesteps(count: int, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Random timesteps in 0…999, [count]; a shift above 1 prefers noisy ones (arXiv 2403.03206, eq. 23)."""
    return np.floor(towards_noise(rng.random(count), 1000, shift)).astype(np.int64)


def take_over(recipe: Recipe, init: Path) -> None:
    """Copy an exported base's text encoders and autoencoder, where the recipe has not trained its own."""
    clip, vae = recipe.output / "clip", recipe.output / "vae" / "vae"
    if not (clip / "text_encoder").exists():
        TextEncoders.load(init, torch.device("cpu")).save(clip)
    if not vae.exists():
        AutoencoderTiny.from_pretrained(init, subfolder="vae", torch_dtype=torch.float32).save_pretrained(vae)


class UnetStage(Stage):
    """The UNet; text encoders and autoencoder are frozen, so their outputs are computed once."""

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
        self.optimizer = adamw({"unet": self.unet}, s.lr)
        self.forward = torch.compile(self.unet) if s.compile else self.unet
        self.scheduler = build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(self.device)
        self.world = World(recipe.world)
        self.tokens = (recipe.world.resolution // 8 // 2) ** 2  # attention starts at the second level
        own = training_pictures(recipe)
        pictures = broad_pictures(recipe) if s.broad else own
        self.latents = encode_pictures(self.vae, pictures.pixels, self.device)
        papers: list[str] = []
        if s.graded:
            graded, papers = grade_each(pictures.pixels, np.random.default_rng(recipe.seed))
            self.latents = torch.cat([self.latents, encode_pictures(self.vae, graded, self.device)])
        self.deck = Deck(pictures, self.world, s, papers, len(own))

    def start(self, init: Path | None) -> UNet2DConditionModel:
        """An untrained UNet, or that of an exported base, with as many channels as the autoencoder has."""
        channels = self.vae.config.latent_channels
        if init:
            unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet", torch_dtype=torch.float32)
            return widen_unet(unet, channels) if unet.config.in_channels < channels else unet
        width = sum(encoder.config.hidden_size for encoder in self.text.encoders)
        return build_unet(self.settings, channels, width, self.text.encoders[1].config.projection_dim)

    def conditions(self, prompts: list[str], rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What the UNet is told; half of the empty prompts are zeros, as SDXL's may be at sampling."""
        hidden, pooled = self.text.encode(prompts)
        kept = [not (prompt == "" and rng.random() < 0.5) for prompt in prompts]
        keep = torch.tensor(kept, device=self.device).float()
        size = float(self.recipe.world.resolution)
        ids = torch.tensor([size, size, 0, 0, size, size], device=self.device).repeat(len(prompts), 1)
        return hidden * keep[:, None, None], {"text_embeds": pooled * keep[:, None], "time_ids": ids}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = self.draw(step)
        chosen, prompts = self.deck.draw(self.settings.batch, rng)
        latents = self.latents[torch.from_numpy(chosen).to(self.device)]
        hidden, added = self.conditions(prompts, rng)
        t = torch.from_numpy(timesteps(len(latents), self.settings.timestep_shift, rng)).to(self.device)
        noise = torch.randn_like(latents)
        a, b = (x[:, None, None, None] for x in (self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()))
        predicted = self.forward(a * latents + b * noise, t, hidden, added_cond_kwargs=added).sample
        loss = (predicted.float() - (a * noise - b * latents)).pow(2).mean()
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the averaged weights, every few steps."""
        if (step + 1) % self.settings.ema_every:
            return
        moves = (step + 1) // self.settings.ema_every
        weight = 1 - min(self.settings.ema_decay, (1 + moves) / (10 + moves))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), weight)

    def report(self, step: int) -> None:
        """A sheet of concepts × styles; the last two columns name no style, the last row no content."""
        pipe = assemble(self.text, self.vae, self.ema)
        concepts = self.world.trained_concepts[:: max(1, len(self.world.trained_concepts) // 10)][:10]
        styles = list(self.recipe.world.styles)
        rows = []
        for concept in [*concepts, None]:
            caption = self.world.caption(concept) if concept else None
            kind: Kind = "full" if concept else "style"
            prompts = [wordings(kind, caption, style)[0] for style in styles]
            prompts += [wordings("content", caption)[0]] * 2 if caption else ["", ""]
            rows.append(sample(pipe, prompts, self.recipe.world.resolution, self.settings.guidance, seed=7))
        sheet(rows, self.folder / f"sheet-{step:06d}.png")


def sample(
    pipe: StableDiffusionXLPipeline, prompts: list[str], size: int, guidance: float, seed: int, steps: int = 20
) -> np.ndarray:
    """Pictures uint8 [N, size, size, 3] for prompts, one fixed noise for each place in the list."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    made = pipe(
        prompts,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=noise,
        output_type="np",
    ).images
    return np.round(made * 255).astype(np.uint8)
