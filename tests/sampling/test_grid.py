import json
from pathlib import Path

import pytest
import tiny
from PIL import Image

from unziplora.config.recipe import resolve
from unziplora.config.sample import GridConfig
from unziplora.errors import UserError
from unziplora.formats.files import write_lora
from unziplora.images.sheet import sheet
from unziplora.lora.inject import adapted_layers, add_lora
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.sampling.grid import grid
from unziplora.sampling.pipeline import Settings, generate


def tile(red: int, side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), (red, 0, 0))


@pytest.fixture
def loras(tiny_base: Base, tmp_path: Path) -> dict[str, Path]:
    files = {}
    for kind, seed in (("content", 1), ("style", 2)):
        files[kind] = tmp_path / f"{kind}-lora.safetensors"
        write_lora(Lora(tiny.random_lora(tiny_base.unet, seed)), files[kind], dtype="fp32")
    return files


def cells(image: Image.Image, side: int, rows: int, columns: int) -> list[Image.Image]:
    """Cut the images out of a sheet, row by row: they lie at the lower right, 4 pixels apart."""
    left, top = image.width - columns * (side + 4), image.height - rows * (side + 4)
    corners = [(left + x * (side + 4), top + y * (side + 4)) for y in range(rows) for x in range(columns)]
    return [image.crop((x, y, x + side, y + side)) for x, y in corners]


def test_sheet_without_labels_has_images_and_gaps():
    image = sheet([[tile(10), tile(20)], [tile(30), None]])
    assert image.size == (2 * 36 + 4, 2 * 36 + 4)
    assert image.getpixel((4, 4)) == (10, 0, 0)
    assert image.getpixel((40, 4)) == (20, 0, 0)
    assert image.getpixel((4, 40)) == (30, 0, 0)
    assert image.getpixel((40, 40)) == (255, 255, 255)


def test_labels_are_drawn_above_and_left():
    plain, labeled = sheet([[tile(1)]]), sheet([[tile(1)]], ["content 0.5"], ["style 1"])
    assert labeled.width > plain.width
    assert labeled.height > plain.height
    left, top = labeled.width - plain.width, labeled.height - plain.height
    assert labeled.crop((0, top, left, labeled.height)).getextrema()[0][0] < 128
    assert labeled.crop((left, 0, labeled.width, top)).getextrema()[0][0] < 128
    assert labeled.getpixel((left + 4, top + 4)) == (1, 0, 0)


def test_long_labels_are_wrapped_and_cut():
    short = sheet([[tile(1, 128)]], ["a cat"], ["a cat"])
    long = sheet([[tile(1, 128)]], ["a cat " * 99], ["a cat " * 99])
    assert long.width <= short.width + 200
    assert long.height <= short.height + 60


def test_smaller_images_are_centered_and_converted_to_rgb():
    image = sheet([[tile(9, 32), Image.new("L", (16, 16), 50)]])
    assert image.getpixel((40 + 16, 4 + 16)) == (50, 50, 50)
    assert image.getpixel((40, 4)) == (255, 255, 255)


def test_empty_and_oversized_sheets_are_refused():
    with pytest.raises(UserError, match="at least one"):
        sheet([[None]])
    with pytest.raises(UserError, match="fewer or smaller"):
        sheet([[tile(1, 1000)] * 20])


@pytest.mark.slow
def test_strength_grid_shows_every_pair(fresh_base, loras: dict[str, Path], tmp_path: Path):
    base = fresh_base()
    config = GridConfig(
        **loras,
        prompts=["a cat"],
        steps=1,
        content_strengths=[0, 1],
        style_strengths=[0, 0.5, 1],
        out=tmp_path / "g.png",
    )
    assert config.axes() == ("content_strength", "style_strength")
    reports = []
    path = grid(config, base, lambda *report: reports.append(report))
    assert reports[-1] == (6, 6)
    assert not adapted_layers(base.unet)
    with Image.open(path) as image:
        image.load()
        assert json.loads(image.text["unziplora"])["style_strengths"] == [0, 0.5, 1]
    shown = cells(image, 64, 2, 3)
    pairs = {name: tiny.random_lora(base.unet, seed) for name, seed in (("content", 1), ("style", 2))}
    for name, lora in pairs.items():
        add_lora(base.unet, name, lora)
    expected = []
    for content in (0.0, 1.0):
        for style in (0.0, 0.5, 1.0):
            for layer in adapted_layers(base.unet).values():
                layer.branches["content"].strength, layer.branches["style"].strength = content, style
            expected += generate(base, "a cat", [0], Settings(steps=1))
    assert [cell.tobytes() for cell in shown] == [image.tobytes() for image in expected]
    assert len({cell.tobytes() for cell in shown}) == 6


def test_prompt_grid_shows_every_prompt_with_every_seed(shared_base: Base, tmp_path: Path):
    config = GridConfig(prompts=["a cat", "a dog"], seeds=[1, 2, 3], steps=1, out=tmp_path / "g.png")
    assert config.axes() == ("prompt", "seed")
    with Image.open(grid(config, shared_base)) as image:
        shown = cells(image.convert("RGB"), 64, 2, 3)
    expected = [p for prompt in config.prompts for p in generate(shared_base, prompt, [1, 2, 3], Settings(steps=1))]
    assert [cell.tobytes() for cell in shown] == [image.tobytes() for image in expected]


def test_labels_show_seeds_to_the_last_digit(shared_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels: list[list[str]] = []
    monkeypatch.setattr(
        "unziplora.sampling.grid.sheet", lambda images, down, across: labels.append(across) or sheet(images)
    )
    seeds = [1234567, 1234568]
    grid(GridConfig(prompts=["a cat"], seeds=seeds, steps=1, out=tmp_path / "g.png"), shared_base)
    assert labels == [["seed 1234567", "seed 1234568"]]


def test_too_large_a_grid_is_refused_before_anything_is_generated(
    shared_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("unziplora.sampling.grid.generate_latents", lambda *_: 1 / 0)
    for keys in (
        {"seeds": list(range(300))},
        {"seeds": [1, 2, 3], "width": 8000},
        {"height": 8000, "rows": "seed", "columns": "prompt"},
    ):
        config = GridConfig(**{"prompts": ["a cat"], "seeds": [1, 2, 3], "out": tmp_path / "g.png", **keys})
        with pytest.raises(UserError, match=r"the grid would be .* \(at most 16000 a side\)"):
            grid(config, shared_base)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts": ["x"], "rows": "seed", "columns": "seed"}, "choose two different"),
        ({"prompts": ["x"], "rows": "content_strength"}, "needs --content"),
        ({"content": "a", "style": "b", "seeds": [1, 2]}, "2 seeds, but no axis shows them"),
        ({"content": "a", "content_strengths": []}, "content_strengths"),
        ({"content": "a", "style": "b", "style_strength": 0.85}, "give style_strengths, or choose another axis"),
        ({"content": "a", "content_strengths": [0, 1], "columns": "seed"}, "add --columns content_strength"),
    ],
)
def test_contradictory_grids_are_refused(keys: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve(GridConfig, keys)


def test_grid_is_written_to_a_png_file_only(tmp_path: Path):
    for out in (tmp_path, tmp_path / "grid.jpg"):
        with pytest.raises(UserError, match=r"out: give the name of a \.png file"):
            resolve(GridConfig, {"prompts": ["x"], "out": out})


def test_default_axes_depend_on_the_loras():
    assert GridConfig(content="a", style="b", rows="seed").axes() == ("seed", "style_strength")
    assert GridConfig(content="a", columns="content_strength").axes() == ("prompt", "content_strength")
    assert GridConfig(style="a", style_strengths=[0, 1]).axes() == ("prompt", "style_strength")
    assert GridConfig(style="a", style_strengths=[0, 0.5, 1]).axes() == ("prompt", "style_strength")
    assert GridConfig(style="a", style_strength=0.85).axes() == ("prompt", "seed")
    assert GridConfig(content="a", style="b", prompts=["x", "y"], seeds=[1, 2]).axes() == ("prompt", "seed")
