"""`unziplora zip` in this process, on the tiny base: its result, settings from runs and files, and wrong requests."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from PIL import Image

from unziplora.config.zip import ZipConfig
from unziplora.formats.files import read_lora, write_lora
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.utils.inputs import read_toml

Call = Callable[..., tuple[int, str, str]]
PROMPTS = ["--content-prompt", "a sks cat", "--style-prompt", "an image in ink style"]
FILES = ["cat.safetensors", "fox.safetensors"]


@pytest.fixture(name="call")
def zip_call(call: Call, shared_base: Base, tiny_folder: Path) -> Call:
    """Run `zip` in a folder with two LoRA files and a picture, on the tiny base."""
    Image.linear_gradient("L").convert("RGB").resize((80, 80)).save("cat.png")
    for seed, file in enumerate(FILES):
        write_lora(Lora(tiny.random_lora(shared_base.unet, seed)), file)
    quick = {"steps": 2, "sample_steps": 1, "sample_guidance": 1.0, "generated_steps": 1, "generated_guidance": 1.0}
    quick |= {"device": "cpu", "base": str(tiny_folder)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in quick.items()]
    Path("quick.toml").write_text("\n".join([*lines, "sample_seeds = [0]", "teacher_images = 1"]))

    return partial(call, "zip")


@pytest.mark.slow
def test_two_files_become_one_with_samples_and_a_card(call: Call):
    code, out, err = call(
        *FILES, *PROMPTS, "--config", "quick.toml", "--content-images", "cat.png", "--out", "runs/zip"
    )
    assert code == 0, err
    assert out.splitlines() == [
        "lora     runs/zip/zip-lora.safetensors",
        "sample   runs/zip/samples/zip-step000002.png",
    ]
    assert "step 2/2" in err
    assert "generating 1 images with the style LoRA" in err
    assert "How to use it: runs/zip/README.md" in err
    assert {down.shape[0] for down, _ in read_lora("runs/zip/zip-lora.safetensors").modules.values()} == {4}
    saved = read_toml(Path("runs/zip/config.toml"))
    assert Path(saved["content_lora"]).is_absolute()
    assert saved["full_prompt"] == "a sks cat in ink style"
    code, _, err = call("--resume", "--out", "runs/zip")
    assert (code, "this run is finished" in err) == (2, True)
    assert call(*FILES, *PROMPTS, "--config", "quick.toml", "--out", "runs/zip")[0] == 2


def test_json_of_a_plain_sum_and_its_folder(call: Call):
    code, out, _ = call(*FILES, *PROMPTS, "--method", "direct", "--parts", "--json", "--quiet")
    assert code == 0
    told = json.loads(out)
    assert told == {
        "run": "runs/cat-fox",
        **{name: f"runs/cat-fox/cat-fox-{name}.safetensors" for name in ("lora", "content", "style")},
        "samples": [],
        "card": "runs/cat-fox/README.md",
    }
    assert all(Path(told[name]).is_file() for name in ("lora", "content", "style", "card"))


def test_run_folders_tell_words_and_base(call: Call, tiny_folder: Path):
    """A merge with its parts is such a folder itself."""
    args = ["--config", "quick.toml", "--method", "direct", "--parts", "--out", "first"]
    assert call(*FILES, *PROMPTS, *args)[0] == 0
    code, out, err = call("first", "first", "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["prompts"] == {
        "full": "a sks cat in ink style",
        "content": "a sks cat",
        "style": "an image in ink style",
    }
    assert told["config"]["base"] == str(tiny_folder)
    assert not Path("runs").exists()


def test_dry_run_shows_settings_and_prompts_and_makes_nothing(call: Call, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    code, out, err = call(*FILES, *PROMPTS, "--config", "quick.toml", "--steps", "7", "--dry-run")
    assert code == 0, err
    assert "steps = 7" in out
    assert 'out = "runs/cat-fox"' in out
    assert "# full: a sks cat in ink style" in out
    assert sorted(tmp_path.iterdir()) == before


def test_every_key_is_a_flag_and_the_help_shows_an_example(call: Call):
    code, out, _ = call("--help-all")
    assert code == 0
    assert all(name.replace("_", "-") in out for name in ZipConfig.model_fields)
    assert "unziplora zip runs/cat runs/fox" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "two LoRAs are needed: unziplora zip CONTENT STYLE"),
        (["a.safetensors"], "two LoRAs are needed: unziplora zip CONTENT STYLE"),
        (["gone.safetensors", "fox.safetensors"], "gone.safetensors: no such run folder or LoRA file"),
        (["cat.png", "fox.safetensors", *PROMPTS], "cat.png: not a safetensors file"),
        (
            FILES,
            "cat.safetensors and fox.safetensors: training prompt unknown; give the prompt that the LoRA learned as "
            "--content-prompt and --style-prompt",
        ),
        ([*FILES, *PROMPTS, "--base", "nowhere"], "base 'nowhere': no such file or folder"),
        ([*FILES, *PROMPTS, "--base", "bundled", "--device", "cpu"], "cat.safetensors does not fit base bundled"),
        ([*FILES, *PROMPTS, "--content-images", "gone.png", "--config", "quick.toml"], "gone.png: no such image"),
        (["--resume"], "--resume needs the run folder"),
        (["--resume", "--out", "gone"], "gone: no run to resume here"),
        ([*FILES, "--method", "average"], "'average' is not one of"),
    ],
)
def test_wrong_requests_are_reported_in_one_message(call: Call, args: list[str], message: str):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(Path().rglob("*-lora.safetensors"))
