"""Node 3: the arguments of the command, the run folder, and the files in ComfyUI's loras folder."""

from pathlib import Path

import pytest
import torch

from unziplora.cli.split import split_command
from unziplora.config.recipe import resolve, to_toml
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.runs.folder import RunFolder

WORDS = {"name": "my cat!", "content": "cat", "style": "ink", "base": "bundled", "preset": "auto"}
NUMBERS = {"steps": 0, "seed": 7, "save_memory": True}


@pytest.fixture
def request_(nodes, tmp_path):
    return nodes.split.Request([tmp_path / "a.png", tmp_path / "b.png"], **WORDS, **NUMBERS)


def test_command_line_gives_the_recipe_of_the_node(request_, tmp_path):
    run = RunFolder(request_.folder(tmp_path))
    command, *arguments = request_.arguments(run)
    context = split_command.make_context(command, arguments)
    recipe = split_command.recipe(context)
    assert recipe == resolve(SplitConfig, request_.settings(run))
    assert recipe.gradient_checkpointing
    assert recipe.seed == 7
    assert recipe.steps == 240  # the preset's
    assert recipe.out == tmp_path / "unziplora" / "my-cat"
    assert recipe.images == request_.images


def begun(request, output, finished):
    """A run folder as `unziplora split` leaves it, without training."""
    run = RunFolder(request.folder(output))
    (run.path / "checkpoints").mkdir(parents=True)
    run.config_file.write_text(to_toml(resolve(SplitConfig, request.settings(run))))
    if finished:
        run.card.write_text("done")
        for kind in ("content", "style"):
            run.lora(kind).write_bytes(kind.encode())
    return run


def test_stopped_run_goes_on(request_, tmp_path):
    run = begun(request_, tmp_path, finished=False)
    assert request_.arguments(run)[-1] == "--resume"
    assert not request_.is_done(run)


def test_finished_run_is_not_trained_again(nodes, request_, tmp_path):
    run = begun(request_, tmp_path, finished=True)
    assert request_.is_done(run)
    other = nodes.split.Request(request_.images, **{**WORDS, "style": "chalk"}, **{**NUMBERS, "steps": 9})
    with pytest.raises(UserError, match=r"is finished, with other settings \(steps, style\): write another name"):
        other.is_done(run)


def test_files_are_copied_to_the_loras_folder(nodes, request_, tmp_path):
    run = begun(request_, tmp_path / "output", finished=True)
    for _ in range(2):
        names = nodes.split.install(run, tmp_path / "loras")
        content = str(Path("unziplora") / "my-cat" / "my-cat-content.safetensors")
        assert names["content"] == content
        assert (tmp_path / "loras" / content).read_bytes() == b"content"
    (tmp_path / "loras" / content).write_bytes(b"another run")
    with pytest.raises(UserError, match="is not this run's: choose another name"):
        nodes.split.install(run, tmp_path / "loras")


@pytest.mark.parametrize("word", ["name", "content", "style"])
def test_missing_words_are_refused_before_anything_is_written(nodes, state, word):
    with pytest.raises(UserError, match=f"^{word} is empty: write a word or phrase, such as"):
        nodes.nodes.UnziploraSplit.execute(torch.zeros(1, 8, 8, 3), **{**WORDS, word: " "}, **NUMBERS)
    assert not (state.root / "output" / "unziplora").exists()


def test_images_are_named_by_their_content(nodes, tmp_path):
    images = torch.rand(2, 8, 6, 3, generator=torch.Generator().manual_seed(0))
    first = nodes.images.store_inputs(images, tmp_path)
    assert nodes.images.store_inputs(images[1:], tmp_path) == first[1:]
    assert len(list(tmp_path.iterdir())) == 2
    from PIL import Image

    with Image.open(first[0]) as image:
        assert image.size == (6, 8)
        assert image.getpixel((5, 0)) == tuple((images[0, 0, 5] * 255).round().int().tolist())


def test_node_frees_the_model_and_returns_the_names(nodes, state, monkeypatch):
    def trained(arguments, report, check):
        assert state.unloaded == 1
        report(1, 2)
        request = nodes.split.Request([Path(arguments[arguments.index("--images") + 1])], **WORDS, **NUMBERS)
        begun(request, state.root / "output", finished=True)

    monkeypatch.setattr(nodes.process, "run", trained)
    result = nodes.nodes.UnziploraSplit.execute(torch.zeros(1, 8, 8, 3), **WORDS, **NUMBERS)
    assert [Path(name).name for name in result.args] == ["my-cat-content.safetensors", "my-cat-style.safetensors"]
    assert all((state.root / "loras" / name).is_file() for name in result.args)
    assert state.steps == [(1, 2)]
    again = nodes.nodes.UnziploraSplit.execute(torch.zeros(1, 8, 8, 3), **WORDS, **NUMBERS)
    assert again.args == result.args
    assert state.unloaded == 1
