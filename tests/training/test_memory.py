"""The forecast of a run's memory, and the advice that rests on it."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from unziplora.cli.doctor import FITTING, GIB
from unziplora.config.bases import SDXL
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.lora.blocks import BLORA_BLOCKS
from unziplora.lora.inject import filter_targets
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.sizes import Sizes, inspect_base
from unziplora.training.memory import Memory, activation_bytes, estimate, smaller
from unziplora.training.preflight import warn_of_memory

ROOT = Path(__file__).parents[2]
MIB = 2**20

SAVED = {
    # rank, pixels, batch: MiB that autograd saves in SDXL in bf16, without and with gradient checkpointing
    "sdxl": {
        (16, 512, 1): (1678.6, 172.0),
        (16, 768, 1): (3645.7, 386.8),
        (16, 1024, 1): (6399.7, 687.6),
        (64, 512, 1): (1922.0, 172.0),
        (64, 768, 1): (3924.2, 386.8),
        (64, 1024, 1): (6727.4, 687.6),
        (128, 512, 1): (2246.5, 172.0),
        (128, 768, 1): (4295.6, 386.8),
        (128, 1024, 1): (7164.4, 687.6),
        (16, 512, 2): (3278.3, 343.9),
        (16, 768, 2): (7212.5, 773.6),
        (16, 1024, 2): (12720.5, 1375.1),
        (64, 512, 2): (3551.8, 343.9),
        (64, 768, 2): (7556.3, 773.6),
        (64, 1024, 2): (13162.7, 1375.1),
        (128, 512, 2): (3916.4, 343.9),
        (128, 768, 2): (8014.7, 773.6),
        (128, 1024, 2): (13752.4, 1375.1),
    },
    # the same of the bundled base in fp32, without gradient checkpointing
    "bundled": {
        (8, 128, 1): (16.8, None),
        (8, 256, 1): (52.7, None),
        (16, 128, 1): (19.7, None),
        (16, 256, 1): (56.2, None),
        (64, 128, 1): (36.8, None),
        (64, 256, 1): (76.7, None),
        (16, 128, 4): (63.0, None),
        (16, 256, 4): (208.9, None),
    },
}
"""Tensors saved by a forward pass with both LoRAs and prompt separation, counted one by one."""

SAVED_BY_ALL = {(16, 128, 1): (26.5, 30.1), (16, 128, 4): (74.7, 79.0), (64, 256, 1): (105.0, 125.2)}
"""The same of the bundled base, if both LoRAs adapt feed-forward layers too, and if they adapt convolutions too."""


@pytest.fixture(scope="module")
def sdxl() -> Sizes:
    return inspect_base(SDXL)


def recipe(**changes: Any) -> SplitConfig:
    keys = {"images": [Path("cat.jpg")], "content": "cat", "style": "sketch", "out": Path("out"), "device": "cpu"}
    return SplitConfig(**{**keys, **changes})


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

    def test_fewer_loras_and_fewer_layers_need_less(self, tiny_folder: Path) -> None:
        sizes = inspect_base(str(tiny_folder))
        loras = UnZipLora.layers(recipe(), sizes.names)
        few = {"content": [path for path in loras["content"] if path.startswith("up_blocks.0.")]}
        config = recipe(base=str(tiny_folder), column_separation=False)
        totals = [estimate(config, sizes, which).total for which in (few, {"content": loras["content"]}, loras)]
        assert totals == sorted(set(totals))

    def test_table_marks_estimates(self, tiny_folder: Path) -> None:
        memory = split_memory(recipe(base=str(tiny_folder)), inspect_base(str(tiny_folder)))
        text = memory.table()
        assert "(estimate)" in text
        assert "(fits)" in text
        assert "(does not fit; needs less: --gradient-ch" in memory.model_copy(update={"available": 1}).table()

    def test_advice_ends_at_the_smallest_settings(self) -> None:
        hints, changes = [], dict[str, Any](batch_size=2)
        while (hint := smaller(recipe(**changes), 1024)) is not None:
            hints.append(hint.split(" (")[0])
            key, *value = hints[-1].removeprefix("--").replace("-", "_").split()
            changes[key] = int(value[0]) if value else True
        assert hints[0] == "--batch-size 1"
        assert [hint for hint in hints if "resolution" in hint] == ["--resolution 768", "--resolution 512"]
        assert "--gradient-checkpointing" in hints
        assert hints[-1] == "--rank 8"
        assert smaller(recipe(gradient_checkpointing=True), 128) == "--rank 32"  # nothing larger than the base's own

    @pytest.fixture
    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unziplora.training.memory.pick_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr("unziplora.training.memory.free_bytes", lambda _: None)

    @pytest.mark.usefixtures("on_a_gpu")
    def test_sdxl_fits_the_cards_that_the_doctor_names(self, sdxl: Sizes) -> None:
        for least, flags in FITTING:
            side = next((side for side in (512, 768) if str(side) in flags), 1024)
            optimizer = "adamw8bit" if "adamw8bit" in flags else "adamw"
            config = recipe(
                precision="bf16",
                resolution=side,
                optimizer=optimizer,
                gradient_checkpointing="checkpointing" in flags,
            )
            assert split_memory(config, sdxl).total < least * GIB

    @pytest.mark.usefixtures("on_a_gpu")
    def test_recorded_passes_need_gradients_of_their_own(self, sdxl: Sizes) -> None:
        config = recipe(precision="bf16", content_prior=1.0)  # two passes a step
        parts = {line.part: line.bytes for line in split_memory(config, sdxl).lines}
        assert parts["CUDA graphs"] == 2 * parts["gradients"] + 2**28
        assert smaller(config, 1024) == "--no-cuda-graphs (slower, the same result)"
        assert "--gradient-checkpointing" in str(smaller(config.model_copy(update={"cuda_graphs": False}), 1024))

    @pytest.mark.usefixtures("on_a_gpu")
    def test_steps_alone_record_gradients_of_their_own(self, sdxl: Sizes) -> None:
        config = recipe(precision="bf16", content_alone=0.4, style_alone=0.3)
        parts = {line.part: line.bytes for line in split_memory(config, sdxl).lines}
        assert parts["CUDA graphs"] == 2 * parts["gradients"] + 2**28

    @pytest.mark.usefixtures("on_a_gpu")
    def test_text_encoders_and_unet_share_the_gpu_while_a_phrase_is_learned(self, sdxl: Sizes) -> None:
        config = recipe(
            precision="bf16",
            phrase_steps=100,
            gradient_checkpointing=True,
            optimizer="adamw8bit",
            rank=8,
            sample_seeds=[],
        )
        memory = split_memory(config, sdxl)
        parts = {line.part: line.bytes for line in memory.lines}
        together = parts["UNet"] + 2 * sdxl.text + parts["activations"] + parts["work in progress"]
        assert memory.total == together

    @pytest.mark.usefixtures("on_a_gpu")
    def test_trained_text_encoders_stay_on_the_gpu_and_are_counted(self, sdxl: Sizes) -> None:
        sizes, parts = sdxl, []
        for texts in (False, True):
            config = DreamBoothConfig(
                images=["cat.png"], content="cat", out="run", text_encoders=texts, precision="bf16"
            )
            memory = estimate(config, sizes, {"content": filter_targets(sizes.names, ["attention"])})
            parts.append({line.part: line.bytes for line in memory.lines})
        assert "VAE and text encoders" not in parts[0]
        assert parts[1]["VAE and text encoders"] == 2 * sizes.text
        # 4 layers a block of q, k, v, out: 12 blocks of width 768, 32 of width 1280
        more = 64 * 4 * (12 * 2 * 768 + 32 * 2 * 1280)
        assert parts[1]["gradients"] - parts[0]["gradients"] == 4 * more

    def test_base_without_a_sample_size_has_the_size_of_sdxl(self, tiny_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_folder, tmp_path / "base")
        path = tmp_path / "base" / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
        sizes, known = inspect_base(str(tmp_path / "base")), inspect_base(str(tiny_folder))
        assert sizes.resolution == 128 * known.latent_scale
        assert sizes.latent_scale == known.latent_scale

    @pytest.mark.parametrize(("free", "warned"), [(2**20, True), (2**40, False)])
    def test_run_that_exceeds_the_memory_of_a_cpu_causes_a_warning(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, warned: bool
    ) -> None:
        monkeypatch.setattr("unziplora.training.memory.free_bytes", lambda _: free)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_memory(UnZipLora, recipe(base=str(tiny_folder), device="cpu", batch_size=4), (64, 64))
        messages = [str(warning.message) for warning in caught if "are free" in str(warning.message)]
        assert bool(messages) is warned
        assert (
            not warned or "1.0 MiB are free, so the system may end this run; needs less: --batch-size 2" in messages[0]
        )

    @pytest.mark.usefixtures("on_a_gpu")
    def test_readme_table_agrees_with_the_forecast(self, sdxl: Sizes) -> None:
        lines = (ROOT / "README.md").read_text().splitlines()
        checkpointed = {"gradient_checkpointing": True}
        for start, changes in {
            "| none |": {},
            "| `--gradient-checkpointing` |": checkpointed,
            "| `--gradient-checkpointing --optimizer adamw8bit` |": {**checkpointed, "optimizer": "adamw8bit"},
        }.items():
            (line,) = (line for line in lines if start in line)
            for number, side in zip(re.findall(r"([\d.]+) GiB", line)[-3:], (1024, 768, 512), strict=True):
                forecast = split_memory(recipe(precision="bf16", resolution=side, **changes), sdxl).total
                assert float(number) == pytest.approx(forecast / GIB, rel=0.15)

    @pytest.mark.usefixtures("on_a_gpu")
    @pytest.mark.parametrize("command", ["split", "dreambooth", "blora"])
    @pytest.mark.parametrize("graphs", [True, False])
    def test_forecast_of_a_step_is_near_recorded_gpu_steps(self, sdxl: Sizes, command: str, graphs: bool) -> None:
        name = "sdxl-gpu.json" if graphs else "sdxl-gpu-eager.json"
        recorded = json.loads((ROOT / "profiling" / "results" / name).read_text())["bytes"][command]
        separated = command == "split"
        config = recipe(
            base=SDXL, precision="bf16", cuda_graphs=graphs, column_separation=separated, prompt_separation=separated
        )
        attention = filter_targets(sdxl.names, ["attention"])
        loras = {
            "split": {"content": attention, "style": attention},
            "dreambooth": {"content": attention},
            "blora": {
                name: [path for path in attention if path.startswith(getattr(BLORA_BLOCKS, name))]
                for name in ("content", "style")
            },
        }[command]
        parts = {line.part: line.bytes for line in estimate(config, sdxl, loras).lines}
        step = sum(size for part, size in parts.items() if "beyond" not in part) - 600 * MIB  # without CUDA itself
        assert step == pytest.approx(recorded, rel=0.15)


class TestActivations:
    @pytest.mark.parametrize(("base", "half"), [("sdxl", True), ("bundled", False)])
    def test_formula_is_near_the_counts(self, sdxl: Sizes, base: str, half: bool) -> None:
        sizes = sdxl if base == "sdxl" else inspect_base(base)
        loras = UnZipLora.layers(recipe(), sizes.names)
        for (rank, side, batch), (plain, checkpointed) in SAVED[base].items():
            for checkpointing, count in ((False, plain), (True, checkpointed)):
                if count is None:
                    continue
                config = recipe(
                    rank=rank,
                    resolution=side,
                    batch_size=batch,
                    gradient_checkpointing=checkpointing,
                    base=sizes.source,
                )
                assert activation_bytes(config, sizes, loras, half) == pytest.approx(count * MIB, rel=0.05)

    def test_feed_forward_layers_and_convolutions_are_near_the_counts(self) -> None:
        sizes = inspect_base("bundled")
        for (rank, side, batch), counts in SAVED_BY_ALL.items():
            for target, count in zip(("feed-forward", "convolutions"), counts, strict=True):
                paths = filter_targets(sizes.names, ["attention", target])
                config = recipe(rank=rank, resolution=side, batch_size=batch, base="bundled")
                saved = activation_bytes(config, sizes, {"content": paths, "style": paths}, False)
                assert saved == pytest.approx(count * MIB, rel=0.06)

    def test_blocks_before_the_first_adapted_one_keep_nothing(self, sdxl: Sizes) -> None:
        attention = filter_targets(sdxl.names, ["attention"])
        late = {"content": [path for path in attention if path.startswith("up_blocks.1.")]}
        assert activation_bytes(recipe(), sdxl, late, True) < 0.3 * activation_bytes(
            recipe(), sdxl, {"content": attention}, True
        )

    def test_halved_precision_needs_less(self, sdxl: Sizes) -> None:
        loras = UnZipLora.layers(recipe(), sdxl.names)
        assert activation_bytes(recipe(), sdxl, loras, True) < activation_bytes(recipe(), sdxl, loras, False)
