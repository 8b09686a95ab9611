"""Scripts of the recipes: what a person got wrong is told in one message, without a traceback."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

import recipes
from recipes.base import export, train
from recipes.bench import csd

SMALL = Path(__file__).parents[2] / "recipes" / "base" / "small.toml"


class Code:
    """An object whose pickle runs a function when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("code of a checkpoint was run",)


def message(script: object, arguments: list[object], capsys: pytest.CaptureFixture) -> str:
    sys.argv[:] = ["script", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        recipes.run(script.main)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.chdir(tmp_path)


def test_faults_of_a_recipe_are_listed_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert message(train, ["gone.toml"], capsys) == "error: gone.toml: no such configuration file\n"
    (tmp_path / "a.toml").write_text(SMALL.read_text().replace("[judges]\n", "[judges]\nbatch = 'x'\nsteep = 1\n"))
    text = message(train, ["a.toml"], capsys)
    assert text.startswith("error: a.toml:\n")
    assert "judges.batch: " in text
    assert "judges.steep: " in text


def test_unknown_stages_missing_bases_and_checkpoints_are_named(capsys: pytest.CaptureFixture):
    assert "no stage vea: there are vae, decoder" in message(train, [SMALL, "vea"], capsys)
    assert "gone: not a folder that" in message(train, [SMALL, "unet", "--init", "gone"], capsys)
    assert "checkpoint.pt is missing: run" in message(export, [SMALL, "out"], capsys)


def test_checkpoints_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model_state_dict": Code()}, protocol=2))
    assert "a.pth: not a checkpoint of tensors" in message(csd, ["a.pth", "out"], capsys)
    assert "gone.pth: no such file" in message(csd, ["gone.pth", "out"], capsys)
    assert not (tmp_path / "out").exists()
