"""The forecast of a run's memory, and the advice that rests on it."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from unziplora.cli.doctor import FITTING, GIB
from unziplora.config.bases import SDXL
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.lora.inject import add_lora, filter_targets
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.sizes import Sizes, inspect_base
from unziplora.training import activations
from unziplora.training.activations import kept_bytes
from unziplora.training.memory import Memory, estimate, smaller
from unziplora.training.preflight import warn_of_memory

ROOT = Path(__file__).parents[2]


def recipe(**changes: Any) -> SplitConfig:
    given = {"images": [Path("cat.jpg")], "content": "cat", "style": "sketch", "out": Path("out"), "device": "cpu"}
    return SplitConfig(**{**given, **changes})


def split_memory(config: SplitConfig, sizes: Sizes) -> Memory:
    return estimate(config, sizes, UnZipLora.layers(config, sizes.names))


class TestMemory:
    def test_exact_parts_follow_from_sizes(self, tiny_folder: Path) -> None:
        sizes = inspect_base(str(tiny_folder))
        config = recipe(base=str(tiny_folder), rank=4)
        parts = {line.part: line for line in split_memory(config, sizes).lines}
        attention = [sizes.layers[path] for path in filter_targets(sizes.names, ["attention"])]
        trained = 2 * 4 * sum(i + o for i, o in attention)
        columns = 2 * sum(o for _, o in attention)
        assert parts["UNet"].bytes == 4 * sizes.unet
        assert parts["gradients"].bytes == 4 * (trained + columns)
        assert parts["optimizer"].bytes == 8 * (trained + columns)
        assert all(parts[name].exact for name in ("UNet", "LoRAs, scales and masks", "gradients", "optimizer"))
        assert not parts["activations"].exact

    @pytest.mark.parametrize(
        "less",
        [{"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}, {"rank": 8}, {"resolution": 32}],
        ids=str,
    )
    def test_each_smaller_setting_needs_less(self, tiny_folder: Path, less: dict[str, Any]) -> None:
        sizes = inspect_base(str(tiny_folder))
        more = split_memory(recipe(base=str(tiny_folder), batch_size=4), sizes).total
        assert split_memory(recipe(base=str(tiny_folder), batch_size=4, **less), sizes).total < more

    def test_one_lora_needs_less_than_two_and_two_blocks_less_than_all(self, tiny_folder: Path) -> None:
        sizes = inspect_base(str(tiny_folder))
        loras = UnZipLora.layers(recipe(), sizes.names)
        few = {"content": [path for path in loras["content"] if path.startswith("up_blocks.0.")]}
        config = recipe(base=str(tiny_folder), column_separation=False)
        totals = [estimate(config, sizes, which).total for which in (few, {"content": loras["content"]}, loras)]
        assert totals == sorted(set(totals))

    def test_the_table_says_what_is_estimated(self, tiny_folder: Path) -> None:
        memory = split_memory(recipe(base=str(tiny_folder)), inspect_base(str(tiny_folder)))
        text = memory.table("# ")
        assert "(estimate)" in text
        assert "(fits)" in text
        assert all(line.startswith("# ") for line in text.splitlines())
        assert "(does not fit; needs less: --gradient-ch" in memory.model_copy(update={"available": 1}).table()

    def test_smaller_settings_come_to_an_end(self) -> None:
        told, changes = [], dict[str, Any](batch_size=2)
        while (hint := smaller(recipe(**changes), 1024)) is not None:
            told.append(hint.split(" (")[0])
            key, *value = told[-1].removeprefix("--").replace("-", "_").split()
            changes[key] = int(value[0]) if value else True
        assert told[0] == "--batch-size 1"
        assert [hint for hint in told if "resolution" in hint] == ["--resolution 768", "--resolution 512"]
        assert "--gradient-checkpointing" in told
        assert told[-1] == "--rank 8"
        assert smaller(recipe(gradient_checkpointing=True), 128) == "--rank 32"  # nothing larger than the base's own

    @pytest.fixture
    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unziplora.training.memory.pick_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr("unziplora.training.memory.free_bytes", lambda _: None)

    @pytest.mark.usefixtures("on_a_gpu")
    def test_sdxl_fits_the_cards_that_the_doctor_says(self) -> None:
        sizes = inspect_base(SDXL)
        for least, flags in FITTING:
            side = next((side for side in (512, 768) if str(side) in flags), 1024)
            optimizer = "adamw8bit" if "adamw8bit" in flags else "adamw"
            config = recipe(
                precision="bf16",
                resolution=side,
                optimizer=optimizer,
                gradient_checkpointing="checkpointing" in flags,
            )
            assert split_memory(config, sizes).total < least * GIB

    @pytest.mark.usefixtures("on_a_gpu")
    def test_recorded_passes_have_places_of_their_own_for_gradients(self) -> None:
        config = recipe(precision="bf16", content_prior=1.0)  # two passes a step
        parts = {line.part: line.bytes for line in split_memory(config, inspect_base(SDXL)).lines}
        assert parts["CUDA graphs"] == 2 * parts["gradients"] + 2**28
        assert smaller(config, 1024) == "--no-cuda-graphs (slower, the same result)"
        assert "--gradient-checkpointing" in str(smaller(config.model_copy(update={"cuda_graphs": False}), 1024))

    @pytest.mark.usefixtures("on_a_gpu")
    def test_trained_text_encoders_stay_on_the_gpu_and_are_counted(self) -> None:
        sizes, parts = inspect_base(SDXL), []
        for texts in (False, True):
            config = DreamBoothConfig(
                images=["cat.png"], content="cat", out="run", text_encoders=texts, precision="bf16"
            )
            found = estimate(config, sizes, {"content": filter_targets(sizes.names, ["attention"])})
            parts.append({line.part: line.bytes for line in found.lines})
        assert "VAE and text encoders" not in parts[0]
        assert parts[1]["VAE and text encoders"] == 2 * sizes.text
        # 4 layers a block of q, k, v, out: 12 blocks of width 768, 32 of width 1280
        more = 64 * 4 * (12 * 2 * 768 + 32 * 2 * 1280)
        assert parts[1]["gradients"] - parts[0]["gradients"] == 4 * more

    def test_a_base_that_tells_no_size_has_sdxls(self, tiny_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_folder, tmp_path / "base")
        path = tmp_path / "base" / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
        sizes, known = inspect_base(str(tmp_path / "base")), inspect_base(str(tiny_folder))
        assert sizes.resolution == 128 * known.latent_scale
        assert sizes.latent_scale == known.latent_scale

    @pytest.mark.parametrize(("free", "warned"), [(2**20, True), (2**40, False)])
    def test_a_run_that_a_cpu_has_no_memory_for_is_told(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, warned: bool
    ) -> None:
        monkeypatch.setattr("unziplora.training.memory.free_bytes", lambda _: free)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warn_of_memory(UnZipLora, recipe(base=str(tiny_folder), device="cpu", batch_size=4))
        found = [str(warning.message) for warning in told if "are free" in str(warning.message)]
        assert bool(found) is warned
        assert not warned or "1.0 MiB are free, so the system may end this run; needs less: --batch-size 2" in found[0]

    @pytest.mark.usefixtures("on_a_gpu")
    def test_the_readme_tells_what_the_estimate_says(self) -> None:
        sizes, lines = inspect_base(SDXL), (ROOT / "README.md").read_text().splitlines()
        checkpointed = {"gradient_checkpointing": True}
        for start, changes in {
            "| none |": {},
            "| `--gradient-checkpointing` |": checkpointed,
            "| `--gradient-checkpointing --optimizer adamw8bit` |": {**checkpointed, "optimizer": "adamw8bit"},
        }.items():
            (line,) = (line for line in lines if start in line)
            for told, side in zip(re.findall(r"([\d.]+) GiB", line)[-3:], (1024, 768, 512), strict=True):
                needed = split_memory(recipe(precision="bf16", resolution=side, **changes), sizes).total
                assert float(told) == pytest.approx(needed / GIB, abs=0.06)


class TestActivations:
    def kept(self, **changes: Any) -> int:
        given = {"rank": 4, "latent": 8, "batch": 1, "half": False, "checkpointing": False}
        return kept_bytes(dict(tiny.unet().config), **{**given, **changes})

    def test_the_count_without_numbers_is_that_of_a_real_step(self) -> None:
        unet: Any = tiny.unet().requires_grad_(False).train()
        for name in ("content", "style"):
            pairs = activations._pairs(unet, 4)
            add_lora(unet, name, {path: (d * 0, u * 0) for path, (d, u) in pairs.items()}, stream=name)
        counter = activations._Counter(unet)
        with counter.counting():
            unet(**activations._inputs(unet, 1, 8, 3, torch.float32))
        assert self.kept() == pytest.approx(counter.total, rel=0.1)

    def test_grows_with_pictures_and_pixels_and_shrinks_with_checkpointing(self) -> None:
        assert self.kept(batch=2) > 1.5 * self.kept()
        assert self.kept(latent=16) > 2 * self.kept()
        assert self.kept(checkpointing=True) < 0.6 * self.kept()
        assert self.kept(half=True) < self.kept()
