"""The demo, on the stand-in base."""

from pathlib import Path

import pytest
from PIL import Image

from unziplora import demo
from unziplora.progress import Progress
from unziplora.run import RunFolder


def test_makes_both_loras_and_a_strip_and_says_that_it_is_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BUNDLED", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    told: list[Progress] = []
    done = demo.demo("runs/demo", steps=36, progress=told.append)
    run = RunFolder(done.run)
    assert done.run == Path("runs/demo")
    assert run.content.is_file()
    assert run.style.is_file()
    assert done.noise
    assert "NOISE" in str(done)
    assert told[0].message == demo.NOISE
    with Image.open(done.strip) as strip:
        assert strip.width > 4 * 64
    assert demo.free_folder(Path("runs/demo")) == Path("runs/demo-2")


def test_the_picture_ships_with_its_words() -> None:
    with Image.open(demo.DEMO / "picture.png") as picture:
        assert min(picture.size) >= 512
    assert 'content = "' in (demo.DEMO / "words.toml").read_text()
