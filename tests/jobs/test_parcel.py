"""Runs as archives, for nodes that share no disk."""

import json
from pathlib import Path

import torch
from fake_jobs import begin, recipe, train
from safetensors.torch import save_file

from unziplora.config.recipe import resolve
from unziplora.config.zip import ZipConfig
from unziplora.jobs.parcel import pack_results, pack_run, unpack_results, unpack_run
from unziplora.jobs.trainings import config_of
from unziplora.runs.folder import CHECKPOINTS, RunFolder


def test_configuration_of_a_peft_adapter_travels_with_it(tmp_path: Path) -> None:
    keys: dict[str, object] = {"base": "bundled", "out": tmp_path / "both"}
    for kind in ("content", "style"):
        (tmp_path / kind).mkdir()
        save_file({"x": torch.zeros(1)}, tmp_path / kind / "adapter_model.safetensors")
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps({"r": kind}))
        keys[f"{kind}_lora"] = str(tmp_path / kind / "adapter_model.safetensors")
    with RunFolder.created(tmp_path / "both", resolve(ZipConfig, keys)) as run:
        there = unpack_run(pack_run(run), tmp_path / "node")
    config = config_of(there)
    assert json.loads((Path(config.style_lora).parent / "adapter_config.json").read_text()) == {"r": "style"}


def test_a_run_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    with RunFolder.created(tmp_path / "inputs", recipe(tmp_path / "inputs", images=[tmp_path / "cat.png"])) as run:
        there = unpack_run(pack_run(run), tmp_path / "node")
    assert there.path == tmp_path / "node" / "inputs"
    assert config_of(there).images[0].is_file()


def test_as_many_checkpoints_stay_as_on_the_node(tmp_path: Path) -> None:
    here, there = begin(tmp_path / "here"), begin(tmp_path / "there")
    for step in range(1, 6):
        there.checkpoint_file(step).touch()
        unpack_results(pack_results(there, [there.checkpoint_file(step).relative_to(there.path)]), here)
    assert here.steps() == list(range(6 - CHECKPOINTS, 6))
    train(there, lambda _: None)
    unpack_results(pack_results(there), here)
    assert here.steps() == [5]
