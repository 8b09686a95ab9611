import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from unziplora.errors import UserError
from unziplora.metrics.clip import Clip
from unziplora.metrics.statistics import Statistics

Shape = Callable[[ImageDraw.ImageDraw, str], None]


def house(draw: ImageDraw.ImageDraw, ink: str) -> None:
    draw.polygon([(10, 32), (32, 8), (54, 32)], ink)
    draw.rectangle((16, 32, 48, 56), ink)


def bars(draw: ImageDraw.ImageDraw, ink: str) -> None:
    for x in (8, 26, 44):
        draw.rectangle((x, 6, x + 8, 58), ink)


def drawn(shape: Shape, ink: str, paper: str, hatched: bool = False, side: int = 64) -> Image.Image:
    """A shape in two colors, with or without diagonal lines over all of it."""
    made = Image.new("RGB", (64, 64), paper)
    draw = ImageDraw.Draw(made)
    shape(draw, ink)
    if hatched:
        for x in range(-64, 64, 6):
            draw.line((x, 64, x + 64, 0), "black")
    return made.resize((side, side), Image.Resampling.BICUBIC)


def distance(features: torch.Tensor, first: int, second: int) -> float:
    return (features[first] - features[second]).norm().item()


class TestStatistics:
    images = (
        drawn(house, "red", "white"),
        drawn(house, "cyan", "navy", hatched=True),
        drawn(bars, "red", "white"),
        drawn(bars, "cyan", "navy", hatched=True),
    )

    def test_rows_have_unit_length_one_per_picture(self):
        for features in (Statistics().content(self.images), Statistics().style(self.images)):
            assert features.shape[0] == 4
            torch.testing.assert_close(features.norm(dim=1), torch.ones(4))

    def test_content_is_the_shape_style_is_colors_and_texture(self):
        content, style = Statistics().content(self.images), Statistics().style(self.images)
        same_shape, same_look = (0, 1), (0, 2)
        assert distance(content, *same_shape) < 0.8 * distance(content, *same_look)
        assert distance(style, *same_look) < 0.7 * distance(style, *same_shape)
        assert distance(content, 2, 3) < 0.9 * distance(content, 1, 3)
        assert distance(style, 1, 3) < 0.7 * distance(style, 2, 3)

    def test_content_ignores_light_contrast_and_inversion(self):
        plain = drawn(house, "#404040", "#e0e0e0")
        others = [
            ImageOps.invert(plain),
            ImageEnhance.Contrast(plain).enhance(0.5),
            drawn(bars, "#404040", "#e0e0e0"),
        ]
        content = Statistics().content([plain, *others])
        assert distance(content, 0, 1) < 1e-3
        assert distance(content, 0, 2) < 0.02
        assert distance(content, 0, 3) > 0.5

    def test_texture_counts_where_colors_are_the_same(self):
        gray = [drawn(house, "#404040", "#e0e0e0"), drawn(house, "#404040", "#e0e0e0", hatched=True)]
        style = Statistics().style([*gray, drawn(bars, "#404040", "#e0e0e0")])
        assert distance(style, 0, 2) < distance(style, 0, 1)

    def test_size_of_the_images_matters_little(self):
        large = drawn(house, "red", "white", side=256)
        for axis in ("content", "style"):
            features = getattr(Statistics(), axis)([*self.images, large])
            assert distance(features, 0, 4) < 0.5 * min(distance(features, 0, other) for other in (1, 2, 3))

    def test_blank_image_has_zero_content(self):
        white = Image.new("RGB", (64, 64), "white")
        assert Statistics().content([white]).abs().max() == 0
        assert torch.isfinite(Statistics().style([white])).all()


@pytest.fixture
def clip_folder(vision_models: dict[str, str]) -> Path:
    """A tiny random CLIP model with its processor."""
    return Path(vision_models["clip"])


class TestClip:
    images = (drawn(house, "red", "white"), drawn(bars, "cyan", "navy", hatched=True))

    def test_features_are_the_similarities_to_the_words(self, clip_folder: Path):
        measure = Clip(str(clip_folder), ["cat", "dog", "fox"], ["ink", "oil paint"], "cpu")
        model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
        texts = ["a picture of a cat", "a picture of a dog", "a picture of a fox"]
        inputs = processor(text=texts, images=list(self.images), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image / model.logit_scale.exp()
        torch.testing.assert_close(measure.content(self.images), F.normalize(logits, dim=1))
        assert measure.style(self.images).shape == (2, 2)
        assert not torch.allclose(*measure.content(self.images))

    def test_batches_make_no_difference(self, clip_folder: Path):
        measure = Clip(str(clip_folder), ["cat", "dog"], ["ink", "oil"], "cpu")
        many = measure.content([*self.images] * 9)  # 18 pictures, in batches of 16
        torch.testing.assert_close(many[16:], measure.content(self.images))

    def test_unloadable_models_are_refused(self, clip_folder: Path, tiny_folder: Path, tmp_path: Path):
        def refused(source: Path, message: str) -> None:
            with pytest.raises(UserError, match=message):
                Clip(str(source), ["cat", "dog"], ["ink", "oil"], "cpu")

        refused(tmp_path / "no" / "such" / "folder", "no model can be loaded from here")
        refused(tmp_path, "no model can be loaded from here")
        refused(tiny_folder / "text_encoder", "this is a clip_text_model model; give a CLIP model")
        pickled = tmp_path / "pickled"
        shutil.copytree(clip_folder, pickled)
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        refused(pickled, "leave --clip out")

    def test_unreachable_hub_is_named(self, monkeypatch: pytest.MonkeyPatch):
        def unreachable(*_: object, **__: object) -> None:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
        with pytest.raises(UserError, match=r"some/clip: .*couldn't connect.*while online the hub id"):
            Clip("some/clip", ["cat", "dog"], ["ink", "oil"], "cpu")
