"""Whole runs on a tiny base: the run folder, its files, resuming, and refusals before any work."""

import errno
import json
import os
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, MachineError, OutOfMemory, UserError
from unziplora.formats.files import read_lora
from unziplora.images.sheet import GAP, LARGEST
from unziplora.methods.unziplora.method import split
from unziplora.models.text import Prompts
from unziplora.training import runner as job
from unziplora.training.method import View
from unziplora.training.sample_sheet import LONGEST, _scaled, generate_samples
from unziplora.utils.progress import Progress

WORDS = {"content": "cat", "style": "ink"}
SMALL = {
    "rank": 2,
    "steps": 6,
    "column_periods": 2,
    "column_warmup": 1,
    "score_timesteps": 1,
    "checkpoint_every": 2,
    "sample_steps": 2,
    "generated_steps": 2,
    "sample_seeds": [0],
    "content_learning_rate": 1e-2,
    "style_learning_rate": 1e-2,
    "save_precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.effect_mandelbrot((96, 80), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(path)
    return path


@pytest.fixture
def config(picture, tiny_folder, tmp_path):
    def make(**changes: object) -> SplitConfig:
        values = {"images": [picture], "base": str(tiny_folder), "out": tmp_path / "run", **WORDS, **SMALL, **changes}
        return resolve(SplitConfig, values)

    return make


def tensors(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_run_writes_loras_card_log_and_samples(config, tmp_path):
    events: list[Progress] = []
    run = split(config(formats=["kohya", "diffusers"], sample_every=4), progress=events.append)
    files = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert files == {
        "README.md",
        "config.toml",
        "log.jsonl",
        "run-content.safetensors",
        "run-style.safetensors",
        "run-content.diffusers.safetensors",
        "run-style.diffusers.safetensors",
        "checkpoints/step-000006.safetensors",
        "samples/run-step000004.png",
        "samples/run-step000006.png",
    }
    losses = [json.loads(line)["loss"] for line in run.log_file.read_text().splitlines()]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    assert [event.step for event in events if event.loss == event.loss] == [1, 2, 3, 4, 5, 6]
    content = read_lora(run.content)
    assert content.metadata["modelspec.trigger_phrase"] == "a sks cat"
    assert json.loads(content.metadata["unziplora.settings"])["rank"] == 2
    twin = read_lora(run.path / "run-content.diffusers.safetensors")
    assert twin.modules.keys() == content.modules.keys()
    for path, (down, up) in content.modules.items():
        torch.testing.assert_close(twin.modules[path][1] @ twin.modules[path][0], up @ down)
    assert any(up.abs().max() > 0 for _, up in content.modules.values())


def test_sheet_with_many_seeds_shrinks_its_images():
    large, small = Image.new("RGB", (1024, 1024)), Image.new("RGB", (64, 64))
    assert _scaled(large, LONGEST // 16 - GAP).size == (871, 871)
    assert _scaled(large, 1024).size == (1024, 1024)
    assert _scaled(small, 1024).size == (256, 256)
    assert _scaled(small, 66).size == (66, 66)
    assert 200 * (LONGEST // 200) < LARGEST  # as many seeds as a recipe takes


def test_finished_run_is_not_overwritten(config):
    run = split(config(steps=4, column_periods=1, sample_seeds=[]))
    before = run.content.read_bytes()
    with pytest.raises(UserError, match="contains a finished run: choose another --out"):
        split(config(steps=4, column_periods=1, sample_seeds=[]))
    with pytest.raises(UserError, match="finished"):
        split(config(steps=4, column_periods=1, sample_seeds=[]), resume=True)
    assert run.content.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, stop):
    whole = split(config(out=tmp_path / "whole", sample_seeds=[]))

    def interrupt(event: Progress) -> None:
        if event.step == stop and event.loss == event.loss:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"stopped after step {stop} of 6(.|\n)*--resume"):
        split(config(out=tmp_path / "cut", sample_seeds=[]), progress=interrupt)
    cut = split(config(out=tmp_path / "cut", sample_seeds=[]), resume=True)
    for name in ("content", "style"):
        one, two = tensors(getattr(whole, name)), tensors(getattr(cut, name))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert [json.loads(line)["step"] for line in cut.log_file.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_killed_run_continues_from_its_last_whole_checkpoint(config, tmp_path):
    """A killed run saves nothing: it ends between checkpoints, with a half-written one next to them."""
    whole = split(config(out=tmp_path / "whole", sample_seeds=[]))

    class Killed(BaseException):
        pass

    def kill(event: Progress) -> None:
        if event.step == 5 and event.loss == event.loss:
            raise Killed

    with pytest.raises(Killed):
        split(config(out=tmp_path / "cut", sample_seeds=[]), progress=kill)
    (tmp_path / "cut" / "checkpoints" / ".step-000006.safetensors.0123abcd").write_bytes(b"half")
    cut = split(config(out=tmp_path / "cut", sample_seeds=[]), resume=True)
    for name in ("content", "style"):
        one, two = tensors(getattr(whole, name)), tensors(getattr(cut, name))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "number"), [("loading base", signal.SIGHUP), ("wrote ", signal.SIGTERM)])
def test_run_stopped_outside_its_steps_can_be_resumed(config, tmp_path, when, number):
    whole = split(config(out=tmp_path / "whole", sample_seeds=[]))
    steps: list[int] = []

    def stop(event: Progress) -> None:
        if (event.message or "").startswith(when):
            os.kill(os.getpid(), number)

    def count(event: Progress) -> None:
        steps.extend([event.step] if event.loss == event.loss else [])

    with pytest.raises(Interrupted, match=r"unziplora split --resume --out .*/cut"):
        split(config(out=tmp_path / "cut", sample_seeds=[]), progress=stop)
    cut = split(config(out=tmp_path / "cut", sample_seeds=[]), resume=True, progress=count)
    assert steps == ([1, 2, 3, 4, 5, 6] if when == "loading base" else [])
    one, two = tensors(whole.content), tensors(cut.content)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_running_out_of_memory_in_samples_does_not_fail_the_run(config, monkeypatch):
    def full(*_: object) -> None:
        raise OutOfMemory("out of memory (decoding a picture)")

    monkeypatch.setattr("unziplora.training.runner.generate_samples", full)
    with pytest.warns(UserWarning, match=r"no samples: out of memory(.|\n)*LoRAs are complete; try `unziplora sample"):
        run = split(config())
    assert run.card.is_file()
    assert run.steps() == [6]
    assert not any(run.samples.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("error", [UserError, OutOfMemory, torch.OutOfMemoryError, MemoryError])
def test_a_check_that_is_not_possible_does_not_fail_the_run(config, monkeypatch, error):
    def failing(*_: object) -> None:
        raise error("no room")

    monkeypatch.setattr("unziplora.methods.unziplora.method.check_models", lambda _: None)
    monkeypatch.setattr("unziplora.methods.unziplora.method.check_loras", failing)
    with pytest.warns(UserWarning, match="no check of the LoRAs, which are complete: .*no room"):
        run = split(config(dino="d", clip="c"))
    assert run.card.is_file()


@pytest.mark.slow
def test_checkpoint_without_a_loss_scaler_is_resumed_with_one(config, monkeypatch):
    """A run may be resumed in another number format: `auto` depends on the device."""

    def stop(event: Progress) -> None:
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        split(config(sample_seeds=[]), progress=stop)
    monkeypatch.setattr(job, "make_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    assert split(config(sample_seeds=[]), resume=True).card.is_file()


def test_resuming_with_another_recipe_is_refused(config):
    def kill(event: Progress) -> None:
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        split(config(), progress=kill)
    with pytest.raises(UserError, match="content_learning_rate"):
        split(config(content_learning_rate=0.5), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["prompt_separation", "column_separation", "block_separation"])
def test_switches_masks_and_priors_run_through(config, picture, tmp_path, switch):
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 80), 255).save(mask)
    changes = {switch: False, "masks": [mask], "content_prior": 1.0, "style_prior": 0.5, "prior_images": 1}
    changes |= {"content_alone": 0.3, "style_alone": 0.3}
    run = split(config(steps=4, sample_seeds=[], **changes))
    assert all(up.isfinite().all() for _, up in read_lora(run.style).modules.values())


@pytest.mark.slow
def test_mask_of_ones_and_gradient_checkpointing_change_nothing(config, tmp_path):
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 80), 255).save(mask)
    plain = split(config(out=tmp_path / "a", steps=4, sample_seeds=[]))
    other = split(config(out=tmp_path / "b", steps=4, sample_seeds=[], masks=[mask], gradient_checkpointing=True))
    one, two = tensors(plain.content), tensors(other.content)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_low_precision_trains_both_loras(config):
    run = split(config(precision="bf16", steps=4, sample_seeds=[]))
    for path in (run.content, run.style):
        assert any(up.abs().max() > 0 for _, up in read_lora(path).modules.values())


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "passes"), [(1, 12), (4, 8), (8, 4)])
def test_samples_use_batches_no_larger_than_the_training(config, shared_base, batch_size, passes):
    """With guidance each sample counts twice: a batch of 4 computes two of three seeds at once, a batch of 8 all.

    There are two columns: the base without LoRA, and the method's own.
    """

    class Plain:
        images = ()
        views = staticmethod(lambda: [View("the base", Prompts("a cat"))])
        off = staticmethod(lambda names: nullcontext())

    rows = []
    handle = shared_base.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        recipe = config(batch_size=batch_size, sample_seeds=[0, 1, 2])
        sheet = generate_samples(shared_base, Plain(), recipe).sheet(Plain(), recipe)
    finally:
        handle.remove()
    assert len(rows) == passes
    assert max(rows) <= max(2, batch_size)
    alone = generate_samples(shared_base, Plain(), config(sample_seeds=[0, 1, 2])).sheet(Plain(), recipe)
    assert ImageChops.difference(sheet, alone).convert("L").getextrema()[1] <= 1  # but for rounding


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"resolution": 72}, UserError, "multiple of 32"),
        ({"blocks": "nowhere.toml"}, UserError, "nowhere.toml"),
        ({"full_prompt": "a {thing}"}, UserError, "is not known here"),
        ({"base": "no/where/at all"}, UserError, "no such file or folder"),
        ({"precision": "fp16"}, UserError, "needs a GPU"),
        ({"trackers": ["trackio"]}, UserError, "not installed"),
        ({"device": "cuda:99"}, UserError, "device"),
        ({"content_learning_rate": 1e30}, UserError, "loss is"),
    ],
)
def test_failed_run_names_its_fault_and_writes_no_lora(config, changes, error, message):
    recipe = config(**changes)
    with pytest.raises(error, match=message):
        split(recipe)
    assert not list(recipe.out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_prompt": "a {thing}"}, "is not known here"),
        ({"style_prompt": " "}, "the style prompt is empty"),
        ({"style_prior": 1.0, "style_class_prompt": "a {thing}"}, "is not known here"),
    ],
)
def test_unusable_prompts_are_refused_before_a_folder_is_made(config, changes, message):
    recipe = config(**changes)
    with pytest.raises(UserError, match=message):
        split(recipe)
    assert not recipe.out.exists()


def test_missing_image_is_refused_before_a_folder_is_made(config, tmp_path):
    with pytest.raises(UserError, match="no such image"):
        split(config(images=[tmp_path / "nothing.png"]))
    assert not (tmp_path / "run").exists()


def test_failed_download_of_a_base_leaves_no_folder(config, monkeypatch):
    def download(*_: object) -> None:
        raise MachineError("the download failed")

    monkeypatch.setattr("unziplora.models.base.download", download)
    monkeypatch.setattr("unziplora.training.runner.warn_of_memory", lambda *_: None)
    recipe = config(base="someone/some-xl", resolution=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the image is enlarged
        for resume, message in ((False, "the download failed"), (True, "no run|run folder")):
            with pytest.raises((MachineError, UserError), match=message):
                split(recipe, resume=resume)
    assert not recipe.out.exists()


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(config, monkeypatch):
    """The disk fills up while the files are written: the error is the machine's, and resuming finishes the run."""
    opened = Path.open

    def full(self: Path, *args: object, **kwargs: object):
        if self.name.startswith(".run-style.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(MachineError, match=r"no room|full"):
            split(config(sample_seeds=[]))
    run = split(config(sample_seeds=[]), resume=True)
    assert read_lora(run.content).modules.keys() == read_lora(run.style).modules.keys()


def test_prodigy_trains_and_a_missing_optimizer_is_named(config, tmp_path, monkeypatch):
    run = split(
        config(steps=4, optimizer="prodigy", content_learning_rate=1.0, style_learning_rate=1.0, sample_seeds=[])
    )
    assert any(up.abs().max() > 0 for _, up in read_lora(run.content).modules.values())
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        split(config(out=tmp_path / "other", optimizer="adamw8bit"))


@pytest.mark.slow
def test_tensorboard_receives_the_losses(config):
    run = split(config(steps=4, trackers=["tensorboard"], sample_seeds=[]))
    files = list((run.path / "trackers").rglob("events.out.tfevents*"))
    assert any(b"loss" in file.read_bytes() for file in files)
    # A tracker may be a web service.
    assert not any(str(run.path.parent).encode() in file.read_bytes() for file in files)
