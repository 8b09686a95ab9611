"""Training data of `split`: the examples from which the style learns alone."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.images.preprocess import to_tensor
from unziplora.methods.adapters import TrainingData
from unziplora.methods.unziplora import data as data_module
from unziplora.methods.unziplora.data import encode_training_data, orientations
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.base import load_base
from unziplora.models.vae import encode_images
from unziplora.training.method import Setup
from unziplora.training.preflight import open_images

WAYS = [None, *Image.Transpose]


def encoded(folder: Path, out: Path, **changes: object) -> tuple[Setup, TrainingData]:
    picture, mask = out / "cat.png", out / "mask.png"
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1.5), 20).convert("RGB").save(picture)
    Image.linear_gradient("L").resize((64, 64)).save(mask)
    values = {"images": [picture], "masks": [mask], "base": str(folder), "out": out / "run", "device": "cpu"}
    values |= {"content": "cat", "style": "ink", "style_alone": 0.2, "background_weight": 0.25, **changes}
    recipe = resolve(SplitConfig, values)
    base = load_base(recipe.base)
    setup = Setup(base, open_images(UnZipLora, recipe, base.scale), nullcontext, lambda _: None)
    return setup, encode_training_data(recipe, setup)


def test_padding_counts_nothing_and_the_mask_inside_it_as_without(tiny_folder: Path, tmp_path: Path):
    Image.effect_noise((64, 32), 90).convert("RGB").save(tmp_path / "wide.png")
    half = Image.new("L", (64, 32))
    half.paste(255, (0, 0, 32, 32))
    half.save(tmp_path / "half.png")
    files = {"images": [tmp_path / "wide.png"], "masks": [tmp_path / "half.png"], "fit": "pad"}
    _, data = encoded(tiny_folder, tmp_path, **files)
    expected = torch.zeros(1, 1, 8, 8)  # 64 × 64 pixels, of which 16 rows above and below are padding
    expected[..., 2:6, :4], expected[..., 2:6, 4:] = 1.0, 0.25
    torch.testing.assert_close(data.examples.weights, expected)
    _, plain = encoded(tiny_folder, tmp_path, **{**files, "masks": []})
    torch.testing.assert_close(plain.examples.weights, (expected > 0).float())


def to_gray(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.getdata())).view(image.height, image.width)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ([[1, 2], [3, 4]], {"1234", "2413", "4321", "3142", "2143", "4231", "3412", "1324"}),
        ([[1, 2, 3], [4, 5, 6]], {"123456", "654321", "321654", "456123"}),
    ],
)
def test_images_are_turned_and_mirrored_in_all_ways_of_their_shape(image: list[list[int]], expected: set[str]):
    ways = orientations(torch.tensor([image]))
    assert ways[0].tolist() == [image]
    assert len(ways) == len(expected)
    assert {"".join(str(number) for number in way.flatten().tolist()) for way in ways} == expected


def test_style_alone_learns_the_image_and_its_mask_in_all_orientations(tiny_folder: Path, tmp_path: Path):
    setup, data = encoded(tiny_folder, tmp_path, style_variants=True)
    (image,), style = setup.images.of(), data.alone["style"]
    turned = [image if way is None else image.transpose(way) for way in WAYS]
    latents = encode_images(setup.base, [to_tensor(way) for way in turned])
    assert len(style.latents) == len(latents) == 8
    assert len({tuple(row.flatten().tolist()) for row in latents}) == 8
    assert style.weights is not None
    assert data.examples.weights is not None
    for way, row in zip(WAYS, latents, strict=True):
        (index,) = [i for i, other in enumerate(style.latents) if torch.equal(other, row)]
        weights = Image.fromarray(data.examples.weights[0, 0].numpy())
        expected = weights if way is None else weights.transpose(way)
        torch.testing.assert_close(style.weights[index, 0], to_gray(expected))
    assert len(style.conditioning.tokens) == len(style.conditioning.pooled) == 8
    assert all(torch.equal(row, style.conditioning.tokens[0]) for row in style.conditioning.tokens)
    assert data.examples.latents.shape[0] == 1


def test_without_variants_style_alone_learns_the_image_as_it_is(tiny_folder: Path, tmp_path: Path):
    _, data = encoded(tiny_folder, tmp_path)
    assert torch.equal(data.alone["style"].latents, data.examples.latents)


def test_variants_without_steps_in_which_the_style_trains_alone_are_refused(tiny_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="style_variants needs steps in which the style LoRA trains alone"):
        encoded(tiny_folder, tmp_path, style_variants=True, style_alone=0.0)


def test_images_are_encoded_before_the_phrase_is_learned_for_which_the_vae_leaves_the_gpu(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def learn(setup: Setup, *_: object) -> tuple[None, None]:
        monkeypatch.setattr(setup.base.vae, "encode", None)
        return None, None

    monkeypatch.setattr(data_module, "learn_style_phrase", learn)
    _, data = encoded(tiny_folder, tmp_path, style_variants=True, phrase_steps=1)
    assert len(data.alone["style"].latents) == 8
