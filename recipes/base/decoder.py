"""Stage `decoder` (optional): the decoder learns texture from a patch critic.

The encoder and its latents do not change, so this may run before, during or after the UNet's training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from recipes.base.config import Recipe
from recipes.base.grades import grade_some
from recipes.base.loop import Stage
from recipes.base.optimizers import adamw
from recipes.base.vae import broad_images, crop_batch, edge_loss, report_reconstructions, to_tensor


class Critic(nn.Sequential):
    """Critic of images [N, 3, R, R]: scores of overlapping patches [N, 1, R/4, R/4], high for real ones."""

    def __init__(self, width: int):
        super().__init__(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module but not into its weights."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class DecoderStage(Stage):
    """Training of the decoder: L1 on pixels and edges, and the critic's opinion (hinge loss)."""

    name = "decoder"

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        s = self.settings = recipe.decoder
        vae = AutoencoderTiny.from_pretrained(recipe.output / "vae", subfolder="vae", torch_dtype=torch.float32)
        self.vae = vae.to(self.device, memory_format=torch.channels_last)
        self.vae.encoder.requires_grad_(False)
        torch.manual_seed(recipe.seed)
        self.critic = Critic(s.critic_width).to(self.device, memory_format=torch.channels_last)
        self.modules = {"vae": self.vae, "critic": self.critic}
        self.optimizer = adamw(self.modules, s.lr, betas=(0.5, 0.99))
        self.pixels = broad_images(recipe).pixels

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        s = self.settings
        rng = self.draw(step)
        crops = grade_some(crop_batch(self.pixels, s.batch, s.crop, rng), s.graded, rng)
        real = to_tensor(crops, self.device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = self.vae.encode(real).latents
        output = self.vae.decode(latents + s.latent_noise * torch.randn_like(latents)).sample.float()
        with frozen(self.critic):
            opinion = -self.critic(output).float().mean()
        real_scores, fake_scores = (self.critic(x).float() for x in (real, output.detach()))
        critic = F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
        pixel, edge = (output - real).abs().mean(), edge_loss(output, real)
        weight = s.adversarial * min(1.0, step / max(s.critic_start, 1))
        loss = pixel + 0.5 * edge + weight * opinion + critic
        return loss, {"l1": pixel.item(), "edge": edge.item(), "opinion": opinion.item(), "critic": critic.item()}

    def report(self, step: int) -> None:
        """Log PSNR and write a sheet of reconstructions."""
        report_reconstructions(self, self.vae, self.pixels, step)

    def finish(self) -> None:
        """Save the autoencoder with the new decoder."""
        self.vae.save_pretrained(self.folder / "vae")
