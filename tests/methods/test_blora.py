"""B-LoRA on a tiny base: only two blocks train, each half is a LoRA, resuming, block maps."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainings import SHORT

from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.errors import Interrupted, UserError
from unziplora.formats.files import read_lora
from unziplora.lora.blocks import BLORA_BLOCKS, read_blocks
from unziplora.lora.weights import lora_blocks
from unziplora.methods.blora import BLora
from unziplora.sampling.prompts import plan_prompts
from unziplora.sampling.sources import find_lora
from unziplora.training.runner import run_training
from unziplora.utils.progress import Progress

Make = Callable[..., BLoraConfig]


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Make:
    Image.effect_mandelbrot((80, 80), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")

    def make(**changes: object) -> BLoraConfig:
        keys: dict[str, object] = {
            "images": [tmp_path / "cat.png"],
            "base": str(tiny_folder),
            "out": tmp_path / "run",
            "rank": 2,
            "learning_rate": 1e-2,
        }
        return resolve(BLoraConfig, {**SHORT, **keys, **changes})

    return make


@pytest.mark.slow
def test_each_half_trains_in_its_own_block_and_nowhere_else(config: Make):
    run = run_training(BLora, config())
    for file, own in ((run.content, BLORA_BLOCKS.content), (run.style, BLORA_BLOCKS.style)):
        lora = read_lora(file)
        assert lora_blocks(lora) == list(own)
        assert all(up.abs().max() > 0 for _, up in lora.modules.values())


@pytest.mark.slow
def test_block_map_file_sets_the_blocks(config: Make, tmp_path: Path):
    (tmp_path / "map.toml").write_text('content = ["mid_block.attentions.0"]\nstyle = ["down_blocks.1"]\n')
    run = run_training(BLora, config(blocks=str(tmp_path / "map.toml")))
    assert lora_blocks(read_lora(run.content)) == ["mid_block.attentions.0"]
    assert lora_blocks(read_lora(run.style)) == ["down_blocks.1.attentions.0", "down_blocks.1.attentions.1"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('content = ["mid_block"]\nstyle = []', "a block for the content and one for the style"),
        ('content = ["up_blocks.0"]\nstyle = ["up_blocks.0.attentions.1"]', r"up_blocks\.0 cannot belong to both"),
        ('content = ["up_blocks.0.attentions.1"]\nstyle = ["up_blocks.0"]', r"attentions\.1 cannot belong to both"),
        ('content = ["up_blocks.7"]\nstyle = ["mid_block"]', r"no layers in 'up_blocks\.7'.*some are down_blocks\.1"),
    ],
)
def test_unusable_block_map_is_refused_before_a_folder_is_made(config: Make, tmp_path: Path, text: str, match: str):
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(UserError, match=match):
        run_training(BLora, config(blocks=str(tmp_path / "map.toml"), out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_default_map_is_the_published_one():
    assert read_blocks("blora") == BLORA_BLOCKS
    assert (BLORA_BLOCKS.content, BLORA_BLOCKS.style) == (("up_blocks.0.attentions.0",), ("up_blocks.0.attentions.1",))


@pytest.mark.slow
def test_card_header_and_sampling_use_its_prompts(config: Make, tmp_path: Path):
    assert BLora.describe(config(style_prompt="a drawing by {token}")).files["style"].trigger == "a drawing by sks"
    run = run_training(BLora, config(sample_seeds=[0], token="v7", sample_guidance=2))
    assert read_lora(run.content).metadata["modelspec.trigger_phrase"] == "A v7"
    assert read_lora(run.style).metadata["modelspec.trigger_phrase"] == "in v7 style"
    assert "B-LoRA" in run.card.read_text()
    content, style = find_lora(run.path, "content"), find_lora(run.path, "style")
    assert plan_prompts(SampleConfig(content=run.path), [content])[0].full == "A v7"
    assert plan_prompts(SampleConfig(style=run.path), [style])[0].full == "an image in v7 style"
    both = plan_prompts(SampleConfig(content=run.path, style=run.path, mode="direct"), [content, style])
    assert both[0].full == "A v7"


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(config: Make, tmp_path: Path):
    whole = run_training(BLora, config(out=tmp_path / "whole"))

    def interrupt(event: Progress) -> None:
        if event.step == 3 and event.loss == event.loss:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="unziplora train blora --resume"):
        run_training(BLora, config(out=tmp_path / "cut"), progress=interrupt)
    cut = run_training(BLora, config(out=tmp_path / "cut"), resume=True)
    for file in ("content", "style"):
        one, two = read_lora(getattr(whole, file)).modules, read_lora(getattr(cut, file)).modules
        assert one.keys() == two.keys()
        assert all(torch.equal(a, b) for path in one for a, b in zip(one[path], two[path], strict=True))


@pytest.mark.parametrize(("name", "text"), [("full", " "), ("full", ""), ("content", ""), ("style", "")])
def test_empty_prompt_is_refused_before_a_folder_is_made(config: Make, tmp_path: Path, name: str, text: str):
    with pytest.raises(UserError, match=f"the {name} prompt is empty"):
        run_training(BLora, config(out=tmp_path / "new", **{f"{name}_prompt": text}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"images": ["gone.png"]}, {"device": "cxu"}])
def test_unusable_setting_of_a_resumed_run_is_named_with_its_file(config: Make, change: dict[str, object]):
    broken = config(**change)
    with pytest.raises(UserError, match=r"(gone\.png|cxu)(.|\n)*settings in .*run/config\.toml"):
        run_training(BLora, broken, resume=True)
    with pytest.raises(UserError) as error:
        run_training(BLora, broken)
    assert "config.toml" not in str(error.value)
