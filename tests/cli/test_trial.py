"""`unziplora trial` in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from unziplora.bench import trial_run
from unziplora.bench.trial_report import ArmReport, TrialReport
from unziplora.config.trial import TrialConfig

Call = Callable[..., tuple[int, str, str]]
SCORE = {"image": 1, "arm": "default", "seed": 0, "figures": {"style CSD": 0.25}}
ARM = {"name": "default", "trainings": [], "scored": 1, "planned": 1}
COST = {"minutes": 1.5, "sampling_minutes": 1.0, "memory": 2**30}
FACTS = {"versions": {}, "device": "cpu", "device_memory": None, "precision": "float32"}
FACTS |= {"base": "x", "base_fingerprint": "0", "models": {}, "images": 1, "seeds": [0]}
SAMPLED = {"samples": 1, "sample_steps": 1, "guidance": 1.0, "reference": None}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "cat.png")
    (tmp_path / "photos" / "words.toml").write_text('["cat.png"]\ncontent = "cat"\nstyle = "ink"\n')
    return tmp_path / "photos"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrialConfig]:
    """Replace the trial by a report; return the recipes that were run."""
    configs: list[TrialConfig] = []

    def run(config: TrialConfig, progress: object) -> TrialReport:
        configs.append(config)
        return TrialReport(**FACTS, **SAMPLED, arms=[ArmReport(**ARM, **COST)], scores=[SCORE])

    monkeypatch.setattr(trial_run, "run_trial", run)
    return configs


def test_prints_the_table_and_the_file_to_send(call: Call, photos: Path, asked: list[TrialConfig]):
    code, out, err = call("trial", "photos", "--csd", "models/csd", "--seeds", "0", "--arms", "default")
    assert code == 0, err
    assert "| default | 0.250 |" in out
    assert "to send  trial/report.zip" in out
    assert "trial/report.zip: no image, word, name or path is in it" in err
    (config,) = asked
    assert (config.pictures, config.csd, config.arms) == (Path("photos"), "models/csd", ["default"])
    code, out, _ = call("trial", "--pictures", "photos", "--csd", "models/csd", "--json")
    assert json.loads(out)["scores"] == [SCORE]


def test_settings_come_from_a_file_too(call: Call, photos: Path, tmp_path: Path, asked: list[TrialConfig]):
    (tmp_path / "night.toml").write_text('pictures = "photos"\ncsd = "models/csd"\nseeds = [5]\n')
    assert call("trial", "--config", "night.toml")[0] == 0
    assert asked[0].seeds == [5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no folder of images: unziplora trial FOLDER"),
        (["photos"], "give --clip and --dino, or --csd"),
        (["photos", "--clip", "x"], "give both, or neither"),
        (["photos", "--csd", "x", "--arms", "magic"], "'magic' is not one of"),
        (["nowhere", "--csd", "x"], "nowhere: no such folder"),
        (["photos", "--csd", "x", "--base", "nowhere"], "base 'nowhere': no such file or folder"),
        (["photos", "--csd", "photos"], "no model can be loaded from here"),
        (["photos", "--csd", "x", "--out", "photos/cat.png"], "is a file; name a folder"),
    ],
)
def test_wrong_requests_are_reported_in_one_message(call: Call, photos: Path, args: list[str], message: str):
    code, out, err = call("trial", *args, "--quiet")
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("trial").exists()


def test_every_key_is_a_flag(call: Call):
    code, out, _ = call("trial", "--help-all")
    assert code == 0
    assert all(
        f"--{name.replace('_', '-')}" in out or f"--[no-]{name.replace('_', '-')}" in out
        for name in TrialConfig.model_fields
    )
