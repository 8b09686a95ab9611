"""Obedience of the shipped weights to prompts: a right prompt has a lower loss than a wrong one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from recipes.base.captions import wordings
from recipes.base.filters import FILTERS
from recipes.base.filters.common import finish, over
from recipes.base.vae import psnr, to_tensor
from unziplora.config.bases import BUNDLED_BASE

FOLDER = BUNDLED_BASE
DRAWINGS = sorted((Path(__file__).parent / "drawings").glob("*.webp"))
STYLES = ("flat", "watercolor", "neon", "pixelart")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no bundled base in this checkout")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)


def test_it_loads_without_a_number_format_and_computes_alike(pipe: StableDiffusionXLPipeline) -> None:
    plain = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    assert {getattr(plain, name).dtype for name in parts} == {torch.float32}
    images = []
    for each in (plain, pipe):
        each.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        images.append(each("a cactus", num_inference_steps=1, generator=draw, output_type="pt").images)
    assert torch.equal(*images)


def image(path: Path, style: str, size: int) -> np.ndarray:
    """Render a drawing in a style, uint8 [size, size, 3]."""
    rgba = np.asarray(Image.open(path).convert("RGBA"))
    rgb = finish(over(rgba)) if style == "flat" else FILTERS[style](rgba, np.random.default_rng(0))
    return cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)


@torch.no_grad()
def losses(pipe: StableDiffusionXLPipeline, pixels: np.ndarray, prompts: list[str]) -> torch.Tensor:
    """Compute the v-prediction error of each image under its prompt, with the same noise for every call; [N]."""
    latents = pipe.vae.encode(to_tensor(pixels, torch.device("cpu"))).latents * pipe.vae.config.scaling_factor
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    size = pixels.shape[1]
    ids = torch.tensor([[size, size, 0, 0, size, size]] * len(prompts)).float()
    total = torch.zeros(len(prompts))
    for n, t in enumerate((500, 850)):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(n))
        steps = torch.full((len(prompts),), t)
        noisy = pipe.scheduler.add_noise(latents, noise, steps)
        target = pipe.scheduler.get_velocity(latents, noise, steps)
        added = {"text_embeds": pooled, "time_ids": ids}
        predicted = pipe.unet(noisy, steps, hidden, added_cond_kwargs=added).sample
        total += (predicted - target).pow(2).mean((1, 2, 3))
    return total


@pytest.mark.slow
def test_right_prompt_has_lower_loss_than_prompts_of_another_content_or_style(pipe: StableDiffusionXLPipeline) -> None:
    cases = [(path, style) for path in DRAWINGS for style in STYLES]
    size = pipe.default_sample_size * pipe.vae_scale_factor
    pixels = np.stack([image(path, style, size) for path, style in cases])
    captions = [path.stem.replace("-", " ") for path, _ in cases]
    styles = [style for _, style in cases]
    others = captions[3 * len(STYLES) :] + captions[: 3 * len(STYLES)]
    right, content, style = (
        losses(pipe, pixels, [wordings("full", *words)[0] for words in zip(*columns, strict=True)])
        for columns in ((captions, styles), (others, styles), (captions, styles[1:] + styles[:1]))
    )
    assert (right < content).float().mean() > 0.9
    assert (right < style).float().mean() > 0.9


def test_reconstruction_keeps_drawings(pipe: StableDiffusionXLPipeline) -> None:
    size = pipe.default_sample_size * pipe.vae_scale_factor
    real = to_tensor(np.stack([image(path, "flat", size) for path in DRAWINGS]), torch.device("cpu"))
    with torch.no_grad():
        assert psnr(real, pipe.vae(real).sample) > 20


def test_bundled_base_is_small_and_has_safe_formats() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".txt"}
