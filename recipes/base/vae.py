"""Stage `vae`: an AutoencoderTiny whose latents have about zero mean and unit variance."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from recipes.base.config import Recipe, VaeSettings
from recipes.base.dataset import Images, render_items, stored_images, training_images, unseen_drawings
from recipes.base.grades import grade_some
from recipes.base.loop import Log, Stage
from recipes.base.optimizers import adamw
from recipes.base.pca import start_as_pca
from recipes.base.sheets import sheet, to_pixels
from recipes.base.widen import widen_vae
from recipes.base.world import NEVER_FILTERS, World


def build_vae(settings: VaeSettings) -> AutoencoderTiny:
    """Return an untrained autoencoder, f = 8, whose first reconstructions are light gray."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(settings.channels,) * 4,
        decoder_block_out_channels=(settings.channels,) * 4,
        num_encoder_blocks=tuple(settings.encoder_blocks),
        num_decoder_blocks=tuple(settings.decoder_blocks),
        latent_channels=settings.latent_channels,
    )
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if ".conv." in name else "linear")
            if name.endswith("conv.4"):  # end of a residual branch
                layer.weight.data.mul_(0.3)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    last = vae.decoder.layers[-1]
    last.weight.data.mul_(0.3)
    nn.init.constant_(last.bias, 0.8)
    return vae


def to_tensor(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [N, R, R, 3] to float [N, 3, R, R] in -1..1."""
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def standardize(vae: AutoencoderTiny, real: Tensor, first: int = 0) -> None:
    """Rescale the encoder's last layer so that latent channels of `real`, from `first` on, have mean 0, variance 1."""
    latents = vae.encode(real).latents.float()[:, first:]
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.bias[first:] = (last.bias[first:] - mean) / spread
    last.weight[first:] /= spread[:, None, None, None]


def broad_images(recipe: Recipe) -> Images:
    """Return the recipe's images, then a random choice of images of all concepts that are not held out."""
    if not recipe.vae.pictures:
        return training_images(recipe)
    settings = recipe.world.model_copy(update={"concepts": "all", "variants": 1})

    def make() -> Images:
        items = list(World(settings).items())
        chosen = np.random.default_rng(recipe.seed).permutation(len(items))[: recipe.vae.pictures]
        more = render_items(settings, [items[i] for i in chosen], workers=recipe.threads)
        mine = training_images(recipe)
        return Images(np.concatenate([mine.pixels, more.pixels]), mine.items + more.items)

    other = [recipe.seed, recipe.vae.pictures]
    return stored_images(recipe.output / "broad-pictures.npy", recipe.world, other, make)


def crop_batch(pixels: np.ndarray, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw random crops [count, size, size, 3], half of them mirrored."""
    chosen = rng.integers(0, len(pixels), count)
    corners = rng.integers(0, pixels.shape[1] - size + 1, (count, 2))
    crops = [pixels[i, y : y + size, x : x + size] for i, (y, x) in zip(chosen, corners, strict=True)]
    return np.stack([c[:, ::-1] if flip else c for c, flip in zip(crops, rng.random(count) < 0.5, strict=True)])


def latent_penalty(latents: Tensor, spread: Tensor) -> Tensor:
    """Penalize each channel's mean other than 0 and variance other than `spread`², both relative to it."""
    mean, variance = latents.float().mean((0, 2, 3)), latents.float().var((0, 2, 3))
    return (mean**2 / spread**2 + (variance / spread**2 - 1) ** 2).mean()


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Compute L1 between differences of neighboring pixels, so that thin lines weigh as much as areas."""
    return sum(((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for d in (2, 3)), torch.zeros((), device=a.device))


def psnr(a: Tensor, b: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB of images in -1..1, averaged over the images."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).float().pow(2).mean((1, 2, 3))
    return float((-10 * torch.log10(error + 1e-8)).mean())


def reconstruction_images(recipe: Recipe, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return training images and never-trained drawings, flat and under new filters, uint8 [N, R, R, 3] each."""
    world = World(recipe.world)
    return {
        "seen": pixels[:: max(1, len(pixels) // 64)][:64],
        "unseen": unseen_drawings(world, 96).pixels,
        "unseen_filters": unseen_drawings(world, 96, filters=sorted(NEVER_FILTERS)).pixels,
    }


@torch.no_grad()
def report_reconstructions(stage: Stage, vae: AutoencoderTiny, pixels: np.ndarray, step: int) -> None:
    """Log PSNR and write a sheet, real images above, reconstructions below."""
    rows, figures = [], {}
    for name, picked in reconstruction_images(stage.recipe, pixels).items():
        real = to_tensor(picked, stage.device)
        output = vae(real).sample
        figures[f"psnr_{name}"] = round(psnr(real, output), 2)
        width = min(16, len(real))
        for i in range(0, min(len(real), 4 * width) - width + 1, width):
            rows += [to_pixels(real[i : i + width]), to_pixels(output[i : i + width])]
    Log(stage.folder).write(stage=stage.name, step=step, **figures)
    width = min(len(row) for row in rows)
    sheet([row[:width] for row in rows], stage.folder / f"sheet-{step:06d}.png")


def open_vae(recipe: Recipe) -> AutoencoderTiny:
    """Read the trained autoencoder of a recipe, with the decoder of stage `decoder` if that has run."""
    folder = next(f for f in (recipe.output / "decoder", recipe.output / "vae") if (f / "vae").exists())
    return AutoencoderTiny.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)


class VaeStage(Stage):
    """Training of the autoencoder: L1 on pixels and edges, a penalty on the latents' spread, a little noise on them.

    From an exported base, the latents of ungraded images stay where they were instead, so that the base's UNet still
    fits the new autoencoder. If the recipe has more latent channels than the base, the missing ones are added.
    """

    name = "vae"

    def __init__(self, recipe: Recipe, init: Path | None = None):
        super().__init__(recipe)
        self.settings = recipe.vae
        torch.manual_seed(recipe.seed)
        vae, self.before, self.old_channels = build_vae(recipe.vae), None, 0
        if init:
            vae = AutoencoderTiny.from_pretrained(init, subfolder="vae", torch_dtype=torch.float32)
            self.before = copy.deepcopy(vae).to(self.device).eval().requires_grad_(False)
            self.old_channels = vae.config.latent_channels
            if recipe.vae.latent_channels > self.old_channels:
                vae = widen_vae(vae, recipe.vae.latent_channels)
        self.vae = vae.to(self.device, memory_format=torch.channels_last).train()
        self.modules = {"vae": self.vae}
        self.optimizer = adamw(self.modules, recipe.vae.lr)
        self.pixels = broad_images(recipe).pixels
        self.spread = torch.ones(self.vae.config.latent_channels - self.old_channels, device=self.device)
        if recipe.vae.start == "pca" and not init:
            self.spread = start_as_pca(self.vae, self.pixels[::40]).to(self.device)
        elif len(self.spread):
            standardize(self.vae, to_tensor(self.pixels[::100], self.device), self.old_channels)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        s, rng = self.settings, self.draw(step)
        plain = crop_batch(self.pixels, s.batch, s.crop, rng)
        real = to_tensor(grade_some(plain, s.graded, rng), self.device).contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(real).latents
        noisy = latents + s.latent_noise * torch.randn_like(latents)
        output = self.vae.decode(noisy).sample.float()
        pixel, edge = (output - real).abs().mean(), edge_loss(output, real)
        drift = latents.new_zeros(()) if self.before is None else self.moved(plain)
        if self.old_channels < latents.shape[1]:
            drift = drift + s.latent_penalty * latent_penalty(latents[:, self.old_channels :], self.spread)
        loss = pixel + 0.5 * edge + drift
        return loss, {"l1": pixel.item(), "edge": edge.item(), "held": drift.item()}

    def moved(self, crops: np.ndarray) -> Tensor:
        """Compute the mean squared change of the latents of ungraded images since the start, a scalar."""
        assert self.before is not None
        real = to_tensor(crops[: len(crops) // 2], self.device)
        with torch.no_grad():
            target = self.before.encode(real).latents
        return (self.vae.encode(real).latents[:, : self.old_channels] - target).float().square().mean()

    def report(self, step: int) -> None:
        """Log PSNR and write a sheet of reconstructions."""
        report_reconstructions(self, self.vae, self.pixels, step)

    @torch.no_grad()
    def finish(self) -> None:
        """Save the autoencoder; measure its scaling factor, unless it comes from an exported base."""
        if self.before is None:
            sample = to_tensor(self.pixels[:2000], self.device)
            spread = torch.cat([self.vae.encode(part).latents for part in sample.split(100)]).float().std()
            self.vae.register_to_config(scaling_factor=round(1 / float(spread), 4))
        self.vae.save_pretrained(self.folder / "vae")


__all__ = ["VaeStage", "build_vae", "psnr", "to_tensor"]
