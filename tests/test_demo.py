"""The demo, on the stand-in base."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unziplora import demo
from unziplora.beside import beside
from unziplora.config.recipe import read_toml, resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.images.preprocess import load_image
from unziplora.utils.progress import Progress


def test_makes_both_loras_and_a_strip_and_says_that_it_is_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BUNDLED", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    told: list[Progress] = []
    done = demo.demo("runs/demo", steps=36, progress=told.append)
    assert done.runs == [Path("runs/demo/first"), Path("runs/demo/second")]
    for run in done.runs:
        assert (run / "content.safetensors").is_file()
        assert (run / "style.safetensors").is_file()
    assert done.noise
    assert "NOISE" in str(done)
    assert told[0].message == demo.NOISE
    with Image.open(done.strip) as strip:
        assert strip.width > 6 * demo.READABLE
    assert demo.free_folder(Path("runs/demo")) == Path("runs/demo-2")


def test_the_pictures_ship_with_their_words() -> None:
    words = read_toml(demo.DEMO / "words.toml")
    assert list(words) == ["first", "second"]
    for name, keys in words.items():
        config = resolve(SplitConfig, {"images": [demo.DEMO / f"{name}.png"], "out": "runs/x"}, keys)
        assert load_image(config.images[0], 64).size == (64, 64)


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_two_splits_side_by_side_give_what_they_give_one_after_the_other(tiny_folder: Path, tmp_path: Path) -> None:
    def configs(out: str) -> list[SplitConfig]:
        given = {"base": str(tiny_folder), "steps": 3, "rank": 2, "column_separation": False, "sample_seeds": []}
        return [
            resolve(SplitConfig, {"images": [demo.DEMO / f"{name}.png"], "out": tmp_path / out / name}, words, given)
            for name, words in read_toml(demo.DEMO / "words.toml").items()
        ]

    told: list[Progress] = []
    demo.split_all(configs("turns"), told.append)
    assert not any("another process" in (event.message or "") for event in told)
    with two_threads():
        demo.split_all(configs("beside"), told.append)
        assert torch.get_num_threads() == 2
    assert any("another process" in (event.message or "") for event in told)
    for name in ("first", "second"):
        for kind in ("content", "style"):
            one, two = (tmp_path / out / name / f"{kind}.safetensors" for out in ("turns", "beside"))
            torch.testing.assert_close(load_file(one), load_file(two), rtol=0, atol=0)


def test_a_split_in_another_process_tells_why_it_failed(tiny_folder: Path, tmp_path: Path) -> None:
    config = resolve(
        SplitConfig,
        {"images": [tmp_path / "none.png"], "content": "cat", "style": "ink", "base": str(tiny_folder)},
        {"out": tmp_path / "run"},
    )
    with beside(config, 1) as wait, pytest.raises(UserError, match=r"none\.png"):
        wait()


def test_a_split_in_another_process_stops_and_saves_when_it_is_left(tiny_folder: Path, tmp_path: Path) -> None:
    config = resolve(
        SplitConfig,
        {"images": [demo.DEMO / "first.png"], "content": "cat", "style": "ink", "base": str(tiny_folder)},
        {"out": tmp_path / "run", "steps": 100_000, "sample_seeds": []},
    )
    log = tmp_path / "run" / "log.jsonl"
    with beside(config, 1):
        end = time.monotonic() + 120
        while not (log.is_file() and log.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/method.safetensors"))
