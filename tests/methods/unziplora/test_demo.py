"""The demo on the tiny base."""

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, UserError
from unziplora.images.preprocess import load_image
from unziplora.methods.unziplora import demo
from unziplora.models.base import Base
from unziplora.utils.files import free_folder
from unziplora.utils.inputs import read_toml
from unziplora.utils.progress import Progress

TINY = {"steps": 2, "rank": 2, "column_separation": False, "sample_seeds": []}


def configs(base: Path, folder: Path, **settings: object) -> list[SplitConfig]:
    """Both recipes of the demo on a tiny base."""
    return [
        resolve(
            SplitConfig,
            {"images": [demo.DEMO / f"{name}.png"], "out": folder / name},
            words,
            {"base": str(base), **TINY, **settings},
        )
        for name, words in read_toml(demo.DEMO / "words.toml").items()
    ]


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_demo_writes_both_pairs_and_a_strip(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(base: Base, config: SplitConfig, sample: SampleConfig) -> Image.Image:
        return draw_slowly(base, config.model_copy(update={"sample_steps": 1}), sample)

    draw_slowly = demo._draw
    monkeypatch.setattr(demo, "_draw", draw)
    monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 1)
    monkeypatch.chdir(tmp_path)
    result = demo.demo("runs/demo", base=str(tiny_folder), steps=2)
    assert result.runs == [Path("runs/demo/first"), Path("runs/demo/second")]
    for run in result.runs:
        assert (run / f"{run.name}-content.safetensors").is_file()
        assert (run / f"{run.name}-style.safetensors").is_file()
    with Image.open(result.strip) as strip:
        assert strip.width > 6 * demo.READABLE
    assert free_folder(Path("runs/demo")) == Path("runs/demo-2")


def test_images_ship_with_their_words() -> None:
    words = read_toml(demo.DEMO / "words.toml")
    assert list(words) == ["first", "second"]
    for name, keys in words.items():
        config = resolve(SplitConfig, {"images": [demo.DEMO / f"{name}.png"], "out": "runs/x"}, keys)
        assert load_image(config.images[0], 64).size == (64, 64)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tiny_folder: Path, tmp_path: Path, two_threads: None) -> None:
    events: list[Progress] = []
    demo.split_both(*configs(tiny_folder, tmp_path / "two"), events.append)
    assert torch.get_num_threads() == 2
    assert any("second process" in (event.message or "") for event in events)
    torch.set_num_threads(1)
    demo.split_both(*configs(tiny_folder, tmp_path / "one"), lambda _: None)
    for name in ("first", "second"):
        for kind in ("content", "style"):
            one, two = (tmp_path / folder / name / f"{name}-{kind}.safetensors" for folder in ("one", "two"))
            torch.testing.assert_close(load_file(one), load_file(two), rtol=0, atol=0)


def test_second_process_reports_its_fault(
    tiny_folder: Path, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = configs(tiny_folder, tmp_path)

    def split(config: SplitConfig, progress: object = None) -> None:
        if config is second:
            raise pickle.loads(pickle.dumps(UserError("none.png: no such image")))

    monkeypatch.setattr(demo, "split", split)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    with pytest.raises(UserError, match=r"none\.png"):
        demo.split_both(first, second, lambda _: None)


@pytest.mark.slow
def test_stop_saves_the_step_of_the_second_process(tiny_folder: Path, tmp_path: Path, two_threads: None) -> None:
    first, second = configs(tiny_folder, tmp_path, steps=100_000)
    log = second.out / "log.jsonl"

    def stop_when_both_train() -> None:
        end = time.monotonic() + 120
        while not (log.is_file() and log.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_both_train, daemon=True).start()
    with pytest.raises(Interrupted):
        demo.split_both(first, second, lambda _: None)
    for config in (first, second):
        assert list((config.out / "checkpoints").glob("step-*.safetensors"))
