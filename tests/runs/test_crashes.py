"""A run is killed before each of its file operations; it then goes on to the same result, or starts again."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import KILLED, fill_disk, in_fork, kill, leftovers, operations, snapshots, strike_at, watched
from PIL import Image
from safetensors.torch import load_file
from tiny import random_lora

from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import Interrupted, MachineError, UserError
from unziplora.formats.files import write_lora
from unziplora.lora.weights import Lora
from unziplora.methods.blora import train_blora
from unziplora.methods.dreambooth import train_dreambooth
from unziplora.methods.unziplora.method import split
from unziplora.methods.ziplora.method import zip_loras
from unziplora.models.base import Base
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress

METHODS: dict[str, tuple[Callable[..., RunFolder], type, dict[str, Any]]] = {
    "split": (split, SplitConfig, {"content": "cat", "style": "ink", "column_periods": 1, "column_warmup": 1}),
    "dreambooth": (train_dreambooth, DreamBoothConfig, {"content": "cat", "text_encoders": True}),
    "blora": (train_blora, BLoraConfig, {}),
    "zip": (zip_loras, ZipConfig, {"content_prompt": "a cat", "style_prompt": "ink", "full_prompt": "a cat in ink"}),
    "direct": (zip_loras, ZipConfig, {"method": "direct", "content_prompt": "a cat", "style_prompt": "ink"}),
}


@pytest.fixture
def files(tmp_path: Path, shared_base: Base) -> dict[str, Any]:
    """The inputs of all methods."""
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")
    files: dict[str, Any] = {"images": [tmp_path / "cat.png"]}
    for number, name in enumerate(("content", "style")):
        write_lora(Lora(random_lora(shared_base.unet, number)), tmp_path / f"{name}.safetensors")
        files |= {f"{name}_lora": tmp_path / f"{name}.safetensors", f"{name}_images": files["images"]}
    return files


def train(
    method: str,
    files: dict[str, Any],
    out: Path,
    base: Base,
    resume: bool = False,
    progress: Callback | None = None,
) -> RunFolder:
    function, model, keys = METHODS[method]
    common = {"base": "tiny", "steps": 3, "checkpoint_every": 1, "sample_steps": 1, "sample_guidance": 1}
    keys = {**common, "sample_seeds": [0], "rank": 2, "score_timesteps": 1, "out": out, **keys, **files}
    config = model(**{name: value for name, value in keys.items() if name in model.model_fields})
    return function(config, resume=resume, progress=progress, base=base)


def train_on(method: str, files: dict[str, Any], out: Path, base: Base) -> RunFolder:
    """Resume a run, or start it again if there is nothing to resume."""
    run = RunFolder(out)
    if run.card.exists():
        return run
    if run.config_file.is_file():
        return train(method, files, out, base, resume=True)
    with pytest.raises(UserError, match="no run to resume here"):
        train(method, files, out, base, resume=True)
    return train(method, files, out, base)


def tensors(run: RunFolder) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(run.path.glob("*.safetensors")):
        yield from ((f"{file.name} {name}", tensor) for name, tensor in load_file(file).items())


def check(run: RunFolder, expected: dict[str, torch.Tensor]) -> None:
    results = dict(tensors(run))
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert run.card.is_file()
    assert leftovers(run.path.parent) == []


def check_kills(method: str, share: int, files: dict[str, Any], base: Base, folder: Path) -> None:
    """Go on from every state that a kill leaves behind, or from one in `share`."""
    whole = folder / "whole" / "run"
    states = snapshots(whole.parent, lambda: train(method, files, whole, base), folder / "killed")
    expected = dict(tensors(RunFolder(whole)))
    assert len(states) > 10
    for state in states[len(method) % share :: share]:
        check(train_on(method, files, state / "run", base), expected)


def check_fills(method: str, share: int, files: dict[str, Any], base: Base, folder: Path) -> None:
    """Go on after the disk was full from any operation on, or from one in `share`."""
    whole = folder / "whole" / "run"
    count = len(operations(whole.parent, lambda: train(method, files, whole, base)))
    expected = dict(tensors(RunFolder(whole)))
    assert count > 20
    for number in range(share // 2, count, share):
        out = folder / str(number) / "run"
        with suppress(MachineError), watched(out.parent, strike_at(number, fill_disk, lasting=True)):
            train(method, files, out, base)
        check(train_on(method, files, out, base), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["split", "dreambooth"])
def test_killed_run_goes_on(method: str, files: dict[str, Any], tiny_base: Base, tmp_path: Path) -> None:
    check_kills(method, 12, {**files, "sample_seeds": []}, tiny_base, tmp_path)


@pytest.mark.slow
def test_run_goes_on_after_the_disk_was_full(files: dict[str, Any], tiny_base: Base, tmp_path: Path) -> None:
    check_fills("split", 30, {**files, "sample_seeds": []}, tiny_base, tmp_path)


def test_process_that_is_killed_leaves_the_same_as_a_snapshot(
    files: dict[str, Any], tiny_base: Base, tmp_path: Path
) -> None:
    def work() -> None:
        with watched(tmp_path / "killed", strike_at(12, kill)):
            train("direct", files, tmp_path / "killed" / "run", tiny_base)

    assert in_fork(work) == KILLED
    whole = train("direct", files, tmp_path / "whole" / "run", tiny_base)
    check(train_on("direct", files, tmp_path / "killed" / "run", tiny_base), dict(tensors(whole)))


@pytest.mark.slow
def test_changes_are_noticed_and_damage_is_survived(
    files: dict[str, Any], tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with two checkpoints is resumed after each change of what it was learning from, and after damage."""
    monkeypatch.setenv("UNZIPLORA_CACHE", str(tmp_path / "cache"))
    files |= {"prior": 1.0, "prior_images": 1, "generated_steps": 1, "generated_guidance": 1, "sample_seeds": []}
    whole = train("dreambooth", files, tmp_path / "whole" / "run", tiny_base)
    cut = tmp_path / "cut" / "run"

    def stop(event: Progress) -> None:
        if event.step == 2 and event.loss == event.loss:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train("dreambooth", files, cut, tiny_base, progress=stop)
    assert RunFolder(cut).steps() == [1, 2]

    def refuse(change: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=rf"these differ: {change}\. Leave changed settings out"):
            train("dreambooth", {**files, **settings}, cut, tiny_base, resume=True)

    refuse("seed: 0 → 1, rank: 2 → 4", seed=1, rank=4)
    (class_image,) = (tmp_path / "cache").rglob("*.png")
    for file, name in ((files["images"][0], "images"), (class_image, "class images of 'a cat'")):
        content = file.read_bytes()
        Image.new("RGB", (64, 64), "red").save(file)
        refuse(f"{name}: different content")
        file.write_bytes(content)
    weight = tiny_base.unet.conv_out.weight.data
    before = weight.clone()
    weight += 1
    refuse(".*base: different weights")
    weight.copy_(before)
    newest = RunFolder(cut).checkpoint_file(2)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-000002\.safetensors is damaged; going on from the one after step 1"):
        check(train("dreambooth", files, cut, tiny_base, resume=True), dict(tensors(whole)))


@pytest.mark.torture
@pytest.mark.parametrize("check_crashes", [check_kills, check_fills])
@pytest.mark.parametrize("method", METHODS)
def test_run_goes_on_after_a_crash_at_any_operation(
    check_crashes: Any, method: str, files: dict[str, Any], tiny_base: Base, tmp_path: Path
) -> None:
    check_crashes(method, 1, files, tiny_base, tmp_path)
