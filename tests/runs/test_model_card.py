"""The card of a run folder."""

import ast
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from unziplora.config.bases import SDXL
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import LoraDescription, RunDescription, argument, card, folder_argument


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "cat")
    run.samples.mkdir(parents=True)
    for path in (run.content, run.style, run.lora("style", "diffusers"), run.sheet(600)):
        path.touch()
    return run


def recipe(run: RunFolder, **changes: object) -> SplitConfig:
    settings = {"images": ["/home/me/cat.jpg"], "content": "cat", "style": 'pencil "sketch"', "out": run.path}
    return resolve(SplitConfig, {**settings, **changes})


def written(run: RunFolder, full_size: bool = True, **changes: object) -> str:
    config = recipe(run, **changes)
    return card(run, config, UnZipLora.describe(config), full_size)


def test_card_explains_the_files_for_every_program(run: RunFolder) -> None:
    text = written(run, full_size=True)
    for program in ("ComfyUI", "Forge", "A1111", "InvokeAI", "diffusers", "unziplora"):
        assert f"**{program}" in text or f", {program}**" in text
    assert "| `cat-content.safetensors` | the content | `a sks cat` |" in text
    assert f"Load the checkpoint of the training, `{SDXL}`. Begin with strength 1, as trained, and CFG\n5;" in text
    assert "--mode direct` does" in text
    assert "--mode direct" not in written(run, full_size=True, prompt_separation=False)
    assert '| `cat-style.diffusers.safetensors` (diffusers layout) | the style | `in pencil "sketch" style` |' in text
    assert "![samples](samples/cat-step000600.png)" in text
    assert f"base_model: {SDXL}" in text
    assert 'instance_prompt: "a sks cat in pencil \\"sketch\\" style"' in text
    assert "rank = 64" in text
    python = text.split("```python\n")[1].split("```")[0]
    assert ast.unparse(ast.parse(python).body[-1]).startswith("pipe('a sks cat in pencil \"sketch\" style'")
    commands = text.split("```sh\n")[1].split("```")[0].splitlines()
    assert shlex.split(commands[-1])[-1] == 'a dog in pencil "sketch" style'


def test_card_without_samples_mentions_no_image(run: RunFolder) -> None:
    run.sheet(600).unlink()
    assert "--mode direct" not in written(run)


def test_card_of_a_small_base_excludes_other_programs(run: RunFolder) -> None:
    text = written(run, full_size=False, base="bundled")
    assert "cannot load it" in " ".join(text.split())
    assert "lora:" not in text.split("Settings")[0]


def test_card_contains_no_path_of_the_machine(run: RunFolder) -> None:
    text = written(run, full_size=False, base=str(run.path))
    assert "/home/me" not in text
    assert f'base = "{run.path.name}"' in text


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("my-xl", 'from_pretrained("PATH/TO/my-xl"'),
        ("my-xl.safetensors", 'from_single_file("PATH/TO/my-xl.safetensors"'),
    ],
)
def test_local_base_is_opened_as_folder_or_file(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    (tmp_path / name).touch()
    assert call in written(run, base=str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    assert call in written(run, base=name)


def test_merged_lora_is_loaded_alone_and_sampled_as_a_run(run: RunFolder) -> None:
    description = RunDescription(
        "ZipLoRA",
        "A LoRA merged",
        "a sks cat in ink style",
        {n: LoraDescription(n, n) for n in ("lora", "content", "style")},
    )
    config = resolve(ZipConfig, {"content_lora": "/home/me/a", "style_lora": "/home/me/b", "out": run.path})
    text = card(run, config, description, full_size=True)
    assert text.count("load_lora_weights") == 1
    assert "unziplora sample .\n" in text
    assert "/home/me" not in text


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("runs/cat-2", "runs/cat-2"),
        ("C:/runs/cat", "C:/runs/cat"),
        ("a sks cat", '"a sks cat"'),
        ('a "cat"', "'a \"cat\"'"),
        ("$HOME", "'$HOME'"),
        ("~/cat", '"~/cat"'),
    ],
)
def test_arguments_are_quoted_as_all_shells_read_them(text: str, typed: str) -> None:
    assert argument(text) == typed
    assert shlex.split(typed) == [text]


def test_folder_that_looks_like_a_flag_is_quoted() -> None:
    assert folder_argument(Path("-cat")) == "./-cat"
    assert folder_argument(Path("runs/my cat")) == '"runs/my cat"'


def test_use_comes_first_and_settings_last(run: RunFolder) -> None:
    text = written(run)
    order = ["# cat, pencil", "| file |", "## Use", "**ComfyUI**", "![samples]", "Two LoRAs split from", "<details>"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize("full_size", [True, False])
def test_card_contains_no_absolute_path(run: RunFolder, tmp_path: Path, full_size: bool) -> None:
    text = written(run, full_size, base=str(tmp_path / "base.safetensors"), blocks=str(tmp_path / "map.toml"))
    assert str(tmp_path) not in text
    assert "/home/me" not in text
    assert "unziplora sample ." in text


HOSTILE = ["a`b``c", "x | y", "<script>alert(1)</script>", "*b* _i_ # [l](u) ![i](u)", "--- \u2028\x85\ufeff: {", "a\\"]


@pytest.mark.parametrize("word", HOSTILE)
def test_words_are_shown_as_they_are(run: RunFolder, word: str) -> None:
    config = recipe(run).model_copy(update={"content": word, "content_prompt": "a {content}"})
    text = card(run, config, UnZipLora.describe(config), True)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["instance_prompt"] == f'a sks {word} in pencil "sketch" style'
    python = body.split("```python\n")[1].split("```")[0]
    assert ast.literal_eval(ast.parse(python).body[-1].value.func.value.value.value.args[0])
    html = MarkdownIt("commonmark").enable("table").render(body)
    shown = unescape(re.sub("<[^>]+>", "", html))
    plain = " ".join(word.split())
    assert f"{plain}, pencil" in shown.splitlines()[0]
    assert "<script>" not in html
    assert "<em>" not in html.split("</h1>")[0]
    cells = re.findall("<td>(.*?)</td>", html)
    assert unescape(re.sub("<[^>]+>", "", cells[2])).strip() == f"a {plain}"
    assert len(cells) == 9
