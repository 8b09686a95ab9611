"""LoRA files that the tab Files lists and rewrites."""

from pathlib import Path

import pytest
from lora_files import make

pytest.importorskip("gradio")

from fake_jobs import begin

from unziplora.errors import UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.inspect import inspect
from unziplora.studio import files


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_lora(make(rank=4), begin(tmp_path / "cat").content)
    write_lora(make(rank=2), tmp_path / "loras" / "ink.safetensors")
    return tmp_path


def test_files_of_runs_and_added_ones_are_listed(runs: Path) -> None:
    assert list(files.lora_files(runs)) == ["cat/cat-content.safetensors", "loras/ink.safetensors"]


@pytest.mark.parametrize("name", ["", "../x.safetensors", "/etc/passwd", "cat/../loras/ink.safetensors", "cat"])
def test_other_names_stand_for_no_file(runs: Path, name: str) -> None:
    with pytest.raises(UserError, match="choose a LoRA file"):
        files.file_of(runs, name)


def test_other_layout_becomes_a_new_file_with_the_same_ranks(runs: Path) -> None:
    written = [files.rewrite(runs, "cat/cat-content.safetensors", "diffusers", None, None, None)[0] for _ in range(2)]
    assert [file.name for file in written] == [
        "cat-content-diffusers.safetensors",
        "cat-content-diffusers-2.safetensors",
    ]
    assert inspect(written[0]).layout.startswith("diffusers")
    assert read_lora(written[0]).modules.keys() == read_lora(runs / "cat" / "cat-content.safetensors").modules.keys()


def test_lower_rank_says_what_is_left(runs: Path) -> None:
    target, remark = files.rewrite(runs, "cat/cat-content.safetensors", "kohya", None, 2, None)
    assert inspect(target).ranks.keys() == {2}
    assert remark.endswith("is left.")
