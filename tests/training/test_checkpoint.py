"""Checkpoints: complete, checked before they are used, and bound to the settings and files of their run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unziplora.config.split import SplitConfig
from unziplora.errors import MachineError
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.runs.folder import RunFolder
from unziplora.training.checkpoint import Checkpoint, changes, newest_checkpoint, run_facts

STATE: dict[str, Any] = {
    "method": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0)},
    "optimizers": [{"state": {0: {"step": torch.tensor(2.0), "mask": torch.tensor([True, False])}}, "lr": 0.1}],
    "nothing": None,
    "tiny": 1e-300,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def save(run: RunFolder, step: int) -> Path:
    return run.checkpoint(step, Checkpoint(step, STATE, {"settings": {"seed": 0}}).write)


def test_state_comes_back_as_it_was(run: RunFolder) -> None:
    path = save(run, 7)
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts) == (7, {"settings": {"seed": 0}})
    assert str(checkpoint.state) == str(STATE)
    assert all(saved.dtype == STATE["method"][name].dtype for name, saved in checkpoint.state["method"].items())
    assert load_file(path)["state.method.a"].tolist() == [[0, 1, 2], [3, 4, 5]]  # an ordinary safetensors file


def test_every_flipped_bit_is_noticed_or_harmless(run: RunFolder) -> None:
    path = save(run, 7)
    data = path.read_bytes()
    noticed = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        checkpoint = Checkpoint.read(path)
        noticed += checkpoint is None
        assert checkpoint is None or str(checkpoint) == str(Checkpoint(7, STATE, {"settings": {"seed": 0}}))
    assert noticed > len(data) - 8  # a flipped padding of the header may be another white space


def test_every_truncation_is_noticed(run: RunFolder) -> None:
    path = save(run, 7)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert Checkpoint.read(path) is None


def test_damaged_checkpoint_falls_back_to_the_one_before(run: RunFolder) -> None:
    save(run, 2)
    save(run, 4).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-000004\.safetensors is damaged; going on from the one after step 2"):
        checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_two_damaged_checkpoints_are_a_clear_error(run: RunFolder) -> None:
    for step in (2, 4):
        save(run, step).write_bytes(b"x")
    with pytest.raises(MachineError, match=r"all checkpoints are damaged.*Delete this folder and resume"):
        newest_checkpoint(run)


def test_run_without_checkpoints_has_no_newest(run: RunFolder) -> None:
    assert newest_checkpoint(run) is None


def differences(saved: dict[str, Any], facts: dict[str, Any], step: int = 1) -> list[str]:
    return changes(Checkpoint(step, {}, saved), facts)


class TestFacts:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, Path]:
        files = {name: tmp_path / name for name in ("cat.png", "mask.png", "map.toml")}
        for name, file in files.items():
            file.write_text(name)
        return files

    def facts(self, files: dict[str, Path], **settings: Any) -> dict[str, Any]:
        keys = {"images": [files["cat.png"]], "masks": [files["mask.png"]], "blocks": str(files["map.toml"])}
        config = SplitConfig(**{**keys, "content": "cat", "style": "ink", "out": "run", "base": "b", **settings})
        facts = run_facts(UnZipLora, config) | {"base": {"torch.float32": "f"}, "generated": {"class images": "g"}}
        return json.loads(json.dumps(facts))  # as from a checkpoint

    @pytest.mark.parametrize(
        "settings",
        [
            {"seed": 1},
            {"steps": 700},
            {"style": "oil"},
            {"content_learning_rate": 0.5},
            {"base": "c"},
            {"betas": [0.5, 0.9]},
        ],
    )
    def test_changed_setting_is_named(self, files: dict[str, Path], settings: dict[str, Any]) -> None:
        (line,) = differences(self.facts(files), self.facts(files, **settings))
        ((name, value),) = settings.items()
        assert line.startswith(f"{name}: ")
        assert line.endswith(f"→ {value!r}")

    @pytest.mark.parametrize(("file", "key"), [("cat.png", "images"), ("mask.png", "masks"), ("map.toml", "blocks")])
    def test_replaced_content_of_a_file_is_named(self, files: dict[str, Path], file: str, key: str) -> None:
        before = self.facts(files)
        files[file].write_text("another")
        assert differences(before, self.facts(files)) == [f"{key}: different content"]

    def test_moved_file_with_the_same_content_is_no_change(self, files: dict[str, Path], tmp_path: Path) -> None:
        before = self.facts(files)
        files["cat.png"] = files["cat.png"].rename(tmp_path / "moved.png")
        assert differences(before, self.facts(files)) == []

    def test_added_image_is_named(self, files: dict[str, Path], tmp_path: Path) -> None:
        two = {"images": [files["cat.png"]] * 2, "masks": []}
        listed = differences(self.facts(files), self.facts(files, **two))
        assert listed == [f"{name}: different content" for name in ("images", "images 1", "images 2", "masks")]

    def test_weights_count_in_one_number_format_only(self, files: dict[str, Path]) -> None:
        facts = self.facts(files)
        assert differences(facts, facts | {"base": {"torch.float32": "other"}}) == ["base: different weights"]
        assert differences(facts, facts | {"base": {"torch.bfloat16": "other"}}) == []

    def test_changed_class_images_are_named(self, files: dict[str, Path]) -> None:
        facts = self.facts(files)
        assert differences(facts, facts | {"generated": {"class images": "other"}}) == [
            "class images: different content"
        ]

    def test_settings_that_may_change_do_not_count(self, files: dict[str, Path]) -> None:
        other = {"out": "other", "device": "cpu", "precision": "fp32", "sample_seeds": [4], "checkpoint_every": 3}
        assert differences(self.facts(files), self.facts(files, **other)) == []

    def test_keys_of_another_version_do_not_count(self, files: dict[str, Path]) -> None:
        facts = self.facts(files)
        older = facts | {"settings": {name: value for name, value in facts["settings"].items() if name != "rank"}}
        assert differences(older, facts) == differences(facts, older) == []

    def test_finished_steps_may_become_more_and_nothing_else(self, files: dict[str, Path]) -> None:
        finished, more = self.facts(files, steps=600), self.facts(files, steps=700)
        assert differences(finished, more, step=600) == []
        assert differences(more, finished, step=700) == ["steps: 700 → 600"]
        assert differences(finished, more, step=400) == ["steps: 600 → 700"]
