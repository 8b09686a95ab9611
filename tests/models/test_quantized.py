"""Quantized bases: ComfyUI's scaled fp8 is read with its scales, everything else is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unziplora.errors import UserError
from unziplora.models.base import Base, load_base

PARTS = ("unet", "text_encoder", "text_encoder_2")
LINEAR = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.model.transformer")


def scaled(tensors, beginnings, end="scale_weight", per_output=False):
    """Return tensors in scaled fp8, and the same in fp32 as they should be read."""
    stored, expected = {}, {}
    for name, value in tensors.items():
        stored[name] = expected[name] = value
        if name.startswith(beginnings) and name.endswith(".weight") and value.dim() == 2 and "embedding" not in name:
            scale = (value.abs().amax(1, keepdim=True) if per_output else value.abs().max()) / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + end] = scale.flatten() if per_output else scale.reshape(())
            expected[name] = stored[name].float() * scale
    return stored, expected


def save(tensors, path):
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def assert_equal(one: Base, other: Base):
    for part in PARTS:
        left, right = getattr(one.pipe, part).state_dict(), getattr(other.pipe, part).state_dict()
        assert left.keys() == right.keys()
        assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_folder: Path):
    """Write tensors as a checkpoint with its configuration next to it, and load it."""

    def load(name: str, tensors: dict, dtype: torch.dtype = torch.float32) -> Base:
        save(tensors, tmp_path / f"{name}.safetensors")
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(tiny_folder)
        return load_base(str(tmp_path / f"{name}.safetensors"), dtype)

    return load


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "per_output"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
def test_scaled_fp8_checkpoint_is_read_with_its_scales(checkpoint, tiny_checkpoint: Path, end: str, per_output: bool):
    stored, expected = scaled(load_file(tiny_checkpoint), LINEAR, end, per_output)
    stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    stored["model.diffusion_model.label_emb.0.0.scale_input"] = torch.ones(())
    assert_equal(checkpoint("scaled", stored), checkpoint("plain", expected))


@pytest.mark.slow
def test_scales_are_applied_before_the_weights_are_rounded(checkpoint, tiny_checkpoint: Path):
    stored, expected = scaled(load_file(tiny_checkpoint), LINEAR)
    one = checkpoint("scaled", stored, torch.bfloat16)
    assert_equal(one, checkpoint("plain", expected, torch.bfloat16))


def test_scaled_fp8_folder_is_read_with_its_scales(tiny_folder: Path, tmp_path: Path):
    folders = [Path(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("scaled", "plain")]
    for part in PARTS:
        path = weights(tiny_folder, part).relative_to(tiny_folder)
        for folder, tensors in zip(folders, scaled(load_file(tiny_folder / path), ("",)), strict=True):
            save(tensors, folder / path)
    assert_equal(*(load_base(str(folder)) for folder in folders))


def test_fp8_without_scales_is_a_number_format(checkpoint, tiny_checkpoint: Path):
    tensors = load_file(tiny_checkpoint)
    name = "model.diffusion_model.label_emb.0.0.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    base = checkpoint("fp8", tensors)
    assert torch.equal(base.unet.add_embedding.linear_1.weight, tensors[name].float())


X = "model.diffusion_model.label_emb.0.0"
Y = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1"
V = "first_stage_model.decoder.mid.attn_1.q"
INT8 = torch.ones(4, 4, dtype=torch.int8)
QUANTIZED = [
    ("bitsandbytes int8", {f"{X}.weight": INT8, f"{X}.SCB": torch.ones(4)}),
    ("bitsandbytes 4-bit", {f"{Y}.weight.quant_state.bitsandbytes__nf4": INT8, f"{Y}.weight.absmax": INT8}),
    ("I8", {f"{X}.weight": INT8}),
    ("U8", {f"{Y}.weight": INT8.to(torch.uint8)}),
    ("GPTQ", {f"{X}.qweight": INT8, f"{X}.scales": torch.ones(4)}),
    ("quanto", {f"{X}.weight._data": INT8, f"{X}.weight._scale": torch.ones(4)}),
    ("companion", {f"{Y}.zero_point": torch.ones(4)}),
    ("companion", {f"{X}_scale": torch.ones(4)}),
    ("compressed tensors", {f"{X}.weight_packed": INT8}),
    ("a scale that does not fit", {f"{X}.weight_scale": torch.ones(4)}),
    ("not a module", {f"{V}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"{V}.scale_weight": torch.ones(())}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tensors"), QUANTIZED)
def test_other_quantized_checkpoints_are_refused(checkpoint, tiny_checkpoint: Path, kind: str, tensors: dict):
    with pytest.raises(UserError, match=kind):
        checkpoint("other", {**load_file(tiny_checkpoint), **tensors})


def test_quantized_folders_are_refused(folder: Path):
    path = weights(folder, "text_encoder_2")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    save({**tensors, name: tensors[name].to(torch.int8), name.replace("weight", "SCB"): torch.ones(4)}, path)
    with pytest.raises(UserError, match=f"{path.name}: the weights are quantized"):
        load_base(str(folder))
    save(tensors, path)
    config = folder / "unet" / "config.json"
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    with pytest.raises(UserError, match=r"the unet is quantized \(bitsandbytes"):
        load_base(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_nan_and_infinity_in_any_part_are_named(folder: Path, part: str, value: float):
    path = weights(folder, part)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name][-1] = value
    save(tensors, path)
    with pytest.raises(UserError, match=rf"{part} contain NaN or infinity.*{name.removeprefix('text_model.')}"):
        load_base(str(folder))


def test_weights_too_large_for_fp16_are_named(folder: Path):
    path = weights(folder, "unet")
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e6
    save(tensors, path)
    load_base(str(folder))
    with pytest.raises(UserError, match=r"infinity \(in float16\), such as conv_in\.bias"):
        load_base(str(folder), torch.float16)
