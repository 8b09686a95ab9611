"""Loss of a base on held-out images."""

from __future__ import annotations

import copy

import numpy as np
import torch

from recipes.base.config import Recipe
from recipes.base.heldout import held_out_images, held_out_loss, v_loss
from recipes.base.latents import encode_images
from recipes.base.unet import build_scheduler, trained_pipeline
from recipes.base.world import NEVER_FILTERS, NEVER_SETS, is_held_out_pair

COUNT = 4


def test_held_out_images_are_not_training_images(trained: Recipe) -> None:
    pairs, drawings, both = held_out_images(trained, COUNT).values()
    assert all(is_held_out_pair(x.concept, x.style, trained.world.held_out_pairs) for x in pairs.items)
    assert not any(item.natural for item in pairs.items)
    for group in (drawings, both):
        assert {item.drawing for item in group.items} <= NEVER_SETS
    assert {item.filter for item in drawings.items} <= {"pencil", "neon"}
    assert {item.filter for item in both.items} <= NEVER_FILTERS
    assert all(0 < len(group) <= COUNT for group in (pairs, drawings, both))


def test_two_calls_return_equal_losses(trained: Recipe) -> None:
    pipe, _ = trained_pipeline(trained)
    losses = held_out_loss(pipe, trained, COUNT)
    torch.rand(7)
    assert held_out_loss(pipe, trained, COUNT) == losses
    assert all(np.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) == len(losses) == 3


def test_training_on_the_images_lowers_their_loss(trained: Recipe) -> None:
    pipe, _ = trained_pipeline(trained)
    images = held_out_images(trained, COUNT)["never-trained drawings and filters"]
    prompts = ["a key"] * len(images)
    before = v_loss(pipe, images.pixels, prompts)
    pipe.unet = copy.deepcopy(pipe.unet)
    latents = encode_images(pipe.vae, images.pixels, torch.device("cpu"))
    hidden, _, pooled, _ = pipe.encode_prompt("a key", device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    added = {name: value.repeat(len(latents), 1) for name, value in added.items()}
    optimizer = torch.optim.Adam(pipe.unet.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(8):
        t = torch.randint(1000, (len(latents),))
        alpha = build_scheduler().alphas_cumprod[t][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        predicted = pipe.unet(noisy, t, hidden.repeat(len(latents), 1, 1), added_cond_kwargs=added).sample
        (predicted - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert v_loss(pipe, images.pixels, prompts) < before
