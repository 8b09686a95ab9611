"""LoRAs, recipes and pictures of the tab Play."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_jobs import begin
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

pytest.importorskip("gradio")

from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.errors import UserError
from unziplora.formats.safetensors import body_hash
from unziplora.studio import play

DIALS: dict[str, Any] = {
    "content": "cat", "style": play.NONE, "content_strength": 0.5, "style_strength": 1, "prompts": " ", "negative": "",
    "steps": 4,
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = begin(tmp_path / "cat")
    for number, file in enumerate((run.content, run.style)):
        save_file({"a": torch.full((2,), float(number))}, file)
    begin(tmp_path / "unfinished")
    return tmp_path


def picture(folder: Path, settings: object) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("unziplora", settings if isinstance(settings, str) else json.dumps(settings))
    Image.new("RGB", (16, 16)).save(folder / "made.png", pnginfo=info)
    return folder / "made.png"


def test_runs_with_loras_and_uploaded_files_can_be_chosen(runs: Path) -> None:
    (runs / "loras").mkdir()
    save_file({"a": torch.zeros(1)}, runs / "loras" / "ink.safetensors")
    assert play.lora_names(runs) == ["cat", "loras/ink.safetensors"]
    assert play.lora_path(runs, "cat", "style").name == "cat-style.safetensors"
    assert play.lora_path(runs, "loras/ink.safetensors", "style") == runs / "loras" / "ink.safetensors"


@pytest.mark.parametrize("name", ["../cat", "/etc/passwd", "loras/../../x.safetensors", "unfinished", "none"])
def test_names_outside_the_list_are_no_loras(runs: Path, name: str) -> None:
    with pytest.raises(UserError, match="not there any more"):
        play.lora_path(runs, name, "content")


def test_dials_become_a_sample_configuration(runs: Path) -> None:
    config = resolve(SampleConfig, play.chosen_keys(runs, DIALS, 7, {"content_blocks": ["mid_block=0"]}))
    assert config.content == runs / "cat" / "cat-content.safetensors"
    assert (config.style, config.content_strength, config.seeds, config.steps) == (None, 0.5, [7], 4)
    assert (config.prompts, config.content_blocks) == ([], ["mid_block=0"])


def test_pictures_are_made_on_the_device_and_in_the_format_of_the_settings(tiny_folder: Path) -> None:
    player, keys = play.Player(), {"base": str(tiny_folder), "prompts": ["a cat"], "steps": 1, "seeds": [0]}
    player.make("sample", {**keys, "precision": "bf16"}, lambda _: None)
    first = player.kept.base
    assert first is not None
    assert first.unet.dtype == torch.bfloat16
    player.make("sample", {**keys, "precision": "bf16"}, lambda _: None)
    assert player.kept.base is first
    player.make("sample", keys, lambda _: None)
    assert player.kept.base is not first
    assert player.kept.base is not None
    assert player.kept.base.unet.dtype == torch.float32
    with pytest.raises(UserError, match="'mps' is not available"):
        player.make("sample", {**keys, "device": "mps"}, lambda _: None)


def test_recipe_of_a_picture_names_its_loras_by_their_hashes(runs: Path) -> None:
    run = runs / "cat"
    hashes = {"a": body_hash(run / "cat-style.safetensors"), "b": body_hash(run / "cat-content.safetensors")}
    settings = {"content": "b", "style": "a", "loras": hashes, "seed": 3, "prompt": "a cat", "style_strength": 0.4}
    recipe = play.recipe_of(picture(runs, settings))
    assert (recipe["seed"], recipe["prompt"], recipe["style_strength"]) == (3, "a cat", 0.4)
    assert play.found_loras(runs, recipe) == {"content": "cat", "style": "cat"}


def test_missing_lora_of_a_picture_is_named(runs: Path) -> None:
    settings = {"content": "fox-content", "loras": {"fox-content": "0" * 64}, "prompt": "a fox"}
    with pytest.raises(UserError, match="fox-content"):
        play.found_loras(runs, play.recipe_of(picture(runs, settings)))


@pytest.mark.parametrize(
    "settings",
    [
        "no json",
        [1],
        {"seed": -1, "prompt": "a"},
        {"seed": "x", "prompt": "a"},
        {"steps": "many", "prompt": "a"},
        "[" * 9999,
    ],
)
def test_damaged_recipes_are_refused(tmp_path: Path, settings: object) -> None:
    with pytest.raises(UserError):
        play.recipe_of(picture(tmp_path, settings))


def test_picture_without_a_recipe_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="no recipe"):
        play.recipe_of(tmp_path / "plain.png")


def test_file_that_is_no_lora_is_not_kept(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        play.keep(runs, runs / "cat" / "cat-content.safetensors")  # one tensor named `a`
    assert not (runs / "loras").exists()


def test_uploaded_files_of_one_name_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unziplora.api.read_lora", lambda file: None)
    for data in (b"first", b"second"):
        (tmp_path / "ink.safetensors").write_bytes(data)
        play.keep(tmp_path, tmp_path / "ink.safetensors")
    files = sorted((tmp_path / "loras").iterdir())
    assert [(file.name, file.read_bytes()) for file in files] == [
        ("ink-2.safetensors", b"second"),
        ("ink.safetensors", b"first"),
    ]
