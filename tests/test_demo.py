"""The demo, on the stand-in base."""

from pathlib import Path

import pytest
from PIL import Image

from unziplora import demo
from unziplora.config import read_toml, resolve
from unziplora.config_split import SplitConfig
from unziplora.images import load_picture
from unziplora.progress import Progress


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
        assert load_picture(config.images[0], 64).size == (64, 64)
