"""Encoders that start as principal components, against a plain computation of the components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.base.config import Recipe, VaeSettings
from recipes.base.loop import update
from recipes.base.pca import latent_spread, start_as_pca
from recipes.base.vae import VaeStage, build_vae, to_tensor
from unziplora.errors import UserError

SETTINGS = VaeSettings(channels=48, latent_channels=6, encoder_blocks=[0, 1, 2, 1], decoder_blocks=[1, 1, 1, 0])


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth random images, uint8 [40, 32, 32, 3]: neighboring pixels go together."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (40, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return (0.8 * coarse + 0.2 * rng.integers(0, 256, coarse.shape)).astype(np.uint8)


def numpy_components(pixels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Components [N, 4, 4, count] of 8 × 8 patches by singular values, and their variances, strongest first."""
    rows = np.stack(
        [p[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel() for p in pixels / 255 for y in range(4) for x in range(4)]
    )
    centerd = rows - rows.mean(0)
    _, singular, directions = np.linalg.svd(centerd, full_matrices=False)
    return (centerd @ directions[:count].T).reshape(-1, 4, 4, count), singular[:count] ** 2 / (len(rows) - 1)


def test_latents_are_scaled_principal_components(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    vae = build_vae(SETTINGS)
    spread = start_as_pca(vae, pixels)
    with torch.no_grad():
        latents = vae.encode(to_tensor(pixels, torch.device("cpu"))).latents.permute(0, 2, 3, 1).numpy()
    components, variances = numpy_components(pixels, 6)
    for k in range(6):
        mine, theirs = latents[..., k].ravel(), components[..., k].ravel()
        assert abs(np.corrcoef(mine, theirs)[0, 1]) == pytest.approx(1, abs=1e-4)
        assert mine.std() == pytest.approx(float(spread[k]), rel=1e-2)
        assert abs(mine.mean()) < 1e-3
    assert np.allclose(spread.numpy() / spread[0].item(), (variances / variances[0]) ** 0.25, rtol=1e-3)


def test_spreads_have_mean_square_one_and_fall_slower_than_deviations() -> None:
    spread = latent_spread(torch.tensor([16.0, 1.0]))
    assert spread.square().mean() == pytest.approx(1)
    assert spread[0] / spread[1] == pytest.approx(2)  # standard deviations differ by a factor of 4


def test_narrow_encoder_raises(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="too few to start from 30"):
        start_as_pca(build_vae(SETTINGS.model_copy(update={"latent_channels": 30})), pixels)


def test_stage_starts_from_components_and_trains_every_parameter(recipe: Recipe) -> None:
    vae = recipe.vae.model_copy(update={"start": "pca", "channels": 48, "latent_channels": 6, "warmup": 1})
    stage = VaeStage(recipe.model_copy(update={"vae": vae}))
    assert stage.spread[0] > stage.spread[-1]
    before = {name: p.detach().clone() for name, p in stage.vae.named_parameters()}
    for step in range(2):
        assert update(stage, step)["l1"] > 0
    moved = [name for name, p in stage.vae.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
