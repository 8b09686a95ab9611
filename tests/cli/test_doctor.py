"""What the doctor finds, and the memory estimate that its advice rests on."""

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
import torch

from unziplora import cli
from unziplora.cli import doctor
from unziplora.cli.doctor import GIB, Check, Device, Report, advice, examine
from unziplora.config.bases import SDXL
from unziplora.errors import UserError
from unziplora.lora.inject import filter_targets
from unziplora.models.base import load_base
from unziplora.models.sizes import inspect_base

ROOT = Path(__file__).parents[2]

CARD = Device(name="cuda:0", model="Card", memory_free=23 * GIB, memory_total=24 * GIB, bf16=True)


class TestDoctor:
    def test_looks_at_this_machine_and_sends_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the doctor reached for the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        report = examine()
        assert report.packages["torch"] == torch.__version__
        assert report.devices[-1].name == "cpu"
        assert report.devices[-1].memory_total > 0
        assert "model hub" not in str(report)
        assert report.ready
        assert Report.model_validate_json(report.model_dump_json()) == report

    def test_asks_the_hub_only_when_told_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
        found = examine(online=True).checks[-1]
        assert (found.name, found.state) == ("model hub", "note")
        assert "does not answer" in found.text

    def test_a_full_disk_is_a_problem_and_exit_code_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(GIB, GIB, 1000))
        assert cli.main(["doctor", "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert [check["state"] for check in report["checks"] if check["name"] == "disk"] == ["problem"]

    @pytest.mark.parametrize(
        ("device", "room", "state"),
        [("cpu", 5, "note"), ("cuda:0", 5, "note"), ("cuda:0", 12, "ok"), ("cpu", 12, "note")],  # a CPU takes fp32
    )
    def test_the_drive_that_models_are_fetched_to_is_looked_at_too(
        self, monkeypatch: pytest.MonkeyPatch, device: str, room: int, state: str
    ) -> None:
        usage = namedtuple("usage", "total used free")
        free = {Path.cwd(): 50 * GIB}
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(GIB, GIB, free.get(path, room * GIB)))
        monkeypatch.setattr(doctor, "find_devices", lambda: [CARD.model_copy(update={"name": device})])
        found = {check.name: check.state for check in examine().checks}
        assert (found["disk"], found["model cache"]) == ("ok", state)

    def test_torch_without_cuda_is_named_where_there_is_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = CARD.model_copy(update={"name": "cpu", "memory_total": 32 * GIB})
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "this torch is the build for CPUs" in advice(cpu, False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert "build for CPUs" not in advice(cpu, False)

    def test_missing_packages_name_the_command_that_installs_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("wandb", "peft") else "1.0")
        report = examine()
        assert "pip install wandb" in str(report)
        assert (
            Check(name="peft", state="problem", text="not installed: run `pip install .` in the clone of unziplora")
            in report.checks
        )
        assert not report.ready

    def test_a_card_that_others_fill_is_noted(self) -> None:
        crowded = CARD.model_copy(update={"memory_free": 2 * GIB, "bf16": False})
        found = doctor._device(crowded)
        assert found.state == "note"
        assert "no bf16" in found.text
        assert doctor._device(CARD).state == "ok"

    @pytest.mark.parametrize(
        ("gib", "flags"),
        [(80, "--style WORDS"), (24, "--style WORDS"), (16, "--gradient-checkpointing"), (10, "adamw8bit"), (8, "512")],
    )
    def test_advice_for_a_card(self, gib: int, flags: str) -> None:
        assert advice(CARD.model_copy(update={"memory_total": gib * GIB}), True).endswith(flags)

    @pytest.mark.parametrize("gib", [8, 10, 12, 16, 32, 64])
    def test_apple_gpus_are_never_advised_to_use_8_bit_adamw(self, gib: int) -> None:
        apple = CARD.model_copy(update={"name": "mps", "model": "Apple GPU", "memory_total": gib * GIB})
        assert "adamw8bit" not in advice(apple, True)
        assert ("too little" in advice(apple, True)) is (gib < 11.5)

    def test_advice_for_small_machines(self) -> None:
        assert "too little" in advice(CARD.model_copy(update={"memory_total": 4 * GIB}), True)
        assert "pip install bitsandbytes" in advice(CARD.model_copy(update={"memory_total": 10 * GIB}), False)
        cpu = CARD.model_copy(update={"name": "cpu", "memory_total": 8 * GIB})
        assert "SDXL does not fit" in advice(cpu, False)
        assert "unziplora demo" in advice(cpu, False)
        assert "very slow" in advice(cpu.model_copy(update={"memory_total": 32 * GIB}), False)


class TestSizes:
    def test_sdxl_without_its_weights(self) -> None:
        sizes = inspect_base(SDXL)
        assert sizes.unet == 2_567_463_684
        assert sizes.vae == 83_653_863
        attention = filter_targets(sizes.names, ["attention"])
        assert (len(sizes.names), len(attention)) == (771, 560)
        assert sizes.adapter(64, attention) == 92_897_280
        assert sizes.resolution == 1024
        assert sizes.assumed

    def test_a_folder_and_a_file(self, tiny_folder: Path, tiny_checkpoint: Path) -> None:
        for source in (tiny_folder, tiny_checkpoint):
            sizes = inspect_base(str(source))
            assert sizes.unet == sum(p.numel() for p in tiny.unet().parameters())
            assert sizes.resolution == tiny.SIDE
            assert not sizes.assumed

    def test_a_side_for_each_direction_counts_as_the_longer_one(self, tiny_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_folder, tmp_path / "pair")
        config = json.loads((folder / "unet" / "config.json").read_text())
        side = config["sample_size"]
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": [side, side // 2]}))
        sizes, plain = inspect_base(str(folder)), inspect_base(str(tiny_folder))
        assert (sizes.resolution, sizes.latent_scale) == (plain.resolution, plain.latent_scale)
        assert load_base(str(folder)).resolution == plain.resolution

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file or folder"):
            inspect_base(str(tmp_path / "gone.safetensors"))
        with pytest.raises(UserError, match=r"model_index\.json is missing"):
            inspect_base(str(tmp_path))
        for name in (
            "org/model.ckpt",
            "org/model.gguf",
            "org/model.safetensors",
        ):  # no hub ids, as `load_base` says too
            with pytest.raises(UserError, match="no such file or folder"):
                inspect_base(name)
