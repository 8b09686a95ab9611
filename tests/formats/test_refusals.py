"""Refusal of files that are not LoRAs for SDXL, and of impossible writes: one clear message, nothing left behind."""

import errno
import json
import os
import pickle
import resource
import signal
import struct
import zipfile

import pytest
import sdxl
import tiny
import torch
from lora_files import KOHYA, kohya, make, store
from safetensors.torch import save_file

from unziplora.errors import MachineError, UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.safetensors import read_header, read_tensors
from unziplora.lora.weights import Lora
from unziplora.utils import files


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)


def factors(names, width_in=8, width_out=8, parts=KOHYA):
    """Factors of rank 2 for names as they stand in a file."""
    shapes = ((2, width_in), (width_out, 2))
    return {f"{name}.{part}": torch.ones(shape) for name in names for part, shape in zip(parts, shapes, strict=True)}


@pytest.fixture
def file(tmp_path):
    write_lora(make(), tmp_path / "good.safetensors")
    return tmp_path / "a.safetensors"


# --- not a safetensors file


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file")


def test_a_folder_is_refused_with_the_name_of_a_file_in_it(tmp_path):
    refused(tmp_path, "is a folder: name the file$")
    write_lora(make(), tmp_path / "cat.safetensors")
    refused(tmp_path, r"such as cat\.safetensors")


def test_an_empty_file_is_refused(file):
    file.touch()
    refused(file, "empty")


@pytest.mark.parametrize("size", [5, 9, 40, 4000, -1])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes((file.parent / "good.safetensors").read_bytes()[:size])
    refused(file, "truncated|not a safetensors")


def test_truncated_tensors_are_reported_with_both_sizes(file):
    whole = (file.parent / "good.safetensors").read_bytes()
    file.write_bytes(whole[:-10])
    refused(file, f"truncated at {len(whole) - 10:,} of {len(whole):,} bytes")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"just some words, nothing else", "not a safetensors file"),
        (b"\x10" + bytes(7) + b"{not json at all", "not a safetensors file"),
        (struct.pack("<Q", 17) + b'{"a":{"dtype":1}}', "not a safetensors file"),
        (b"\xff" * 8 + b"{" * 99, "truncated, or not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 20) + b'{"__metadata__":[1]}', "not a safetensors file"),
        (struct.pack("<Q", 32) + b'{"a":{"data_offsets":["0","x"]}}', "not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "a file without tensors, not a LoRA"),
        (
            struct.pack("<Q", 64) + b'{"a":{"dtype":"XX","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
            "damaged",
        ),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"GGUF\x03\0\0\0" + bytes(99), "GGUF"),
    ],
)
def test_other_file_formats_are_refused(file, content, match):
    file.write_bytes(content)
    refused(file, match)


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pth", "a.safetensors"])
@pytest.mark.parametrize("protocol", [2, 4, "zip", "torch"])
def test_pickles_are_refused_unopened(tmp_path, name, protocol):
    path, trace = tmp_path / name, tmp_path / "trace"
    if protocol == "torch":
        torch.save({"x": Trap(trace)}, path)
    elif protocol == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(Trap(trace)))
    else:
        path.write_bytes(pickle.dumps(Trap(trace), protocol=protocol))
    refused(path, r"a pickled file.*convert it to \.safetensors")
    assert not trace.exists()


@pytest.mark.parametrize("low", [0x80, 0x280, 0x480])
def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path, low):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3.0)}, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    head, body = path.read_bytes()[8 : 8 + length], path.read_bytes()[8 + length :]
    path.write_bytes((0x10000 + low).to_bytes(8, "little") + head.ljust(0x10000 + low) + body)
    tensors, _ = read_tensors(path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert read_header(path).shapes == {"x": (3,)}


def test_a_deeply_nested_header_is_refused(tmp_path):
    head = b'{"a":' * 100_000
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    refused(path, "not a safetensors file")


# --- safetensors, but no LoRA for SDXL

SD1 = "lora_unet_{}_attentions_0_transformer_blocks_0_attn2_to_k"
BLOCKS = ("down_blocks_0", "mid_block", "up_blocks_3")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (factors([SD1.format(b) for b in BLOCKS], 768, 320), r"for SD 1\.x \(cross-attention width 768\)"),
        (factors([SD1.format(b) for b in BLOCKS], 1024, 320), r"for SD 2\.x \(cross-attention width 1024\)"),
        (factors([SD1.format("mid_block")], 768, 1280), r"for SD 1\.x"),
        (factors(["lora_unet_input_blocks_10_1_transformer_blocks_0_attn2_to_k"], 1280, 1536), "refiner"),
        (factors(["lora_unet_up_blocks_3_attentions_0_proj_in"]), "four levels"),
        (factors(["lora_unet_double_blocks_0_img_attn_proj"]), "for FLUX"),
        (
            factors(["transformer.single_transformer_blocks.0.attn.to_q"], parts=("lora_A.weight", "lora_B.weight")),
            "for FLUX",
        ),
        (factors(["diffusion_model.joint_blocks.0.x_block.attn.proj"]), "for Stable Diffusion 3"),
        (factors(["diffusion_model.transformer_blocks.0.attn1.to_q"]), "for a diffusion transformer"),
        (
            factors(["transformer.transformer_blocks.0.attn.to_q"], parts=("lora_A.weight", "lora_B.weight")),
            "transformer",
        ),
        (factors(["diffusion_model.blocks.0.self_attn.q"], parts=("lora_A.weight", "lora_B.weight")), "video"),
        (factors(["lora_prior_unet_blocks_0_q"]), "Cascade"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, "a full checkpoint, not a LoRA"),
        ({"conditioner.embedders.0.x": torch.ones(2)}, "a full checkpoint"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)}, "plain weights"),
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "textual inversion"),
        ({"control_model.x.weight": torch.ones(2)}, "ControlNet"),
        ({"decoder.conv_in.weight": torch.ones(2)}, "a VAE"),
        ({"x": torch.ones(2)}, "a file of an unknown kind, not a LoRA"),
    ],
)
def test_other_families_and_kinds_of_model_are_named(file, tensors, match):
    refused(store(file, tensors), match)


def test_a_base_of_the_same_text_width_settles_doubts_about_sd(file):
    """A small base of SDXL's topology may have SD's text width: what is known of the base settles it."""
    lora = make(unet=tiny.unet(cross_attention_dim=768))
    assert len(read_lora(store(file, kohya(lora))).modules) == len(lora.modules)
    wide = {p: (torch.ones(1, 768 if "attn2.to_k" in p else i), torch.ones(o, 1)) for _, p, (o, i) in sdxl.recorded()}
    path = store(file, kohya(Lora(wide)))
    refused(path, r"SD 1\.x")
    assert len(read_lora(path, {"cross_attention_dim": 768}).modules) == 722
    assert len(read_lora(store(file, kohya(Lora(wide)), {"unziplora.version": "0.1.0"})).modules) == 722


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("LoHa", f"{Q}.hada_w1_a"),
        ("LoKr", f"{Q}.lokr_w1"),
        ("DoRA", f"{Q}.dora_scale"),
        ("DoRA", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"),
        ("OFT", f"{Q}.oft_blocks"),
        ("GLoRA", f"{Q}.a1.weight"),
        ("IA3", f"{Q}.on_input"),
        ("full weight differences", f"{Q}.diff"),
        ("Tucker", f"{Q}.lora_mid.weight"),
        ("LoRA with bias", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.bias"),
    ],
)
def test_other_adapters_are_named(file, name, key):
    refused(store(file, {**kohya(make()), key: torch.ones(2)}), f"contains .*{name}.*{key}")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_up_blocks_0_attentions_0_strange.lora_up.weight",
        "unet.x.lora_A.weight",
        "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha",
        "mid_block.resnets.0.conv1.bias",
        "unet.mid_block.attentions.0.proj_in.something.new",
    ],
)
def test_unknown_keys_are_refused(file, key):
    refused(store(file, {**kohya(make()), key: torch.ones(2)}), "1 of .* keys are not understood, the first: ")


def test_a_module_without_a_factor_is_refused(file):
    tensors = kohya(make())
    del tensors[next(key for key in tensors if "attn2_to_v.lora_up" in key)]
    refused(store(file, tensors), r"attn2\.to_v: the up matrix is missing")
    refused(store(file, {f"{Q}.alpha": torch.tensor(1.0)}), "down and up matrix")


def test_a_module_under_two_names_is_refused(file):
    refused(store(file, {**kohya(make()), **kohya(make(), "diffusers")}), "twice")


@pytest.mark.parametrize(
    "parts", [("lora_A.one", "lora_B.one", "lora_A.two", "lora_B.two"), ("lora_A", "lora_B", "lora.down", "lora.up")]
)
def test_two_adapters_in_one_file_are_refused(file, parts):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = ((2, 8), (8, 2)) * 2
    tensors = {f"{path}.{part}.weight": torch.ones(shape) for part, shape in zip(parts, shapes, strict=True)}
    refused(store(file, tensors), "twice")


@pytest.mark.parametrize(
    "shapes", [((2, 8), (8, 3)), ((0, 8), (8, 0)), ((2, 8), (8, 2, 1, 1)), ((2,), (2,)), ((2, 8, 3, 1), (8, 2, 1, 3))]
)
def test_factors_that_do_not_multiply_are_refused(file, shapes):
    tensors = {f"{Q}.{part}": torch.ones(shape) for part, shape in zip(KOHYA, shapes, strict=True)}
    refused(store(file, tensors), "make no LoRA")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_alpha_that_is_not_positive_is_refused(file, alpha):
    refused(store(file, kohya(make(), alpha=lambda path: alpha)), "alpha is")


def test_an_alpha_of_two_numbers_is_refused(file):
    tensors = kohya(make(), alpha=lambda path: 1.0)
    tensors[next(key for key in tensors if key.endswith(".alpha"))] = torch.ones(2)
    refused(store(file, tensors), r"alpha \[2\] is not a single number")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(file, value):
    tensors = kohya(make())
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = value
    refused(store(file, tensors), f"1 tensors contain NaN or infinity, the first: '{key}'")


# --- requests that cannot be met


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"layout": "webui"}, "unknown layout 'webui': choose one of kohya"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"alpha": 0}, "alpha must be greater than 0"),
    ],
)
def test_impossible_layouts_dtypes_and_alphas_are_refused(tmp_path, request_, match):
    with pytest.raises(UserError, match=match):
        write_lora(make(), tmp_path / "a.safetensors", **request_)
    assert not list(tmp_path.iterdir())


def test_impossible_targets_are_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_lora(make(), tmp_path / "folder.safetensors")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        write_lora(make(), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no module"):
        write_lora(Lora({}), tmp_path / "a.safetensors")


def test_values_too_large_for_fp16_are_refused(tmp_path):
    lora = make()
    path, (down, up) = next(iter(lora.modules.items()))
    lora.modules[path] = (down * 1e6, up * 1e6)
    with pytest.raises(UserError, match="too large for fp16; store it as bf16 or fp32"):
        write_lora(lora, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    write_lora(lora, tmp_path / "a.safetensors", dtype="bf16")


# --- the machine's faults


def faults(monkeypatch, name, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, name, fail)


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, match):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    faults(monkeypatch, "fsync", number)
    with pytest.raises(MachineError, match=match) as caught:
        write_lora(make(), path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_limit_on_file_size(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(MachineError, match="the disk is full"):
            write_lora(make(), tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="a file is where a folder should be"):
        write_lora(make(), tmp_path / "file" / "a.safetensors")


def test_a_folder_without_write_permission_is_reported():
    with pytest.raises(MachineError, match="/proc/"):
        write_lora(make(), "/proc/unziplora.safetensors")


def test_an_unreadable_file_is_reported(file, monkeypatch):
    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    file.touch()
    monkeypatch.setattr(type(file), "open", fail)
    for read in (read_lora, read_header):
        with pytest.raises(MachineError, match="cannot be read"):
            read(file)


def test_of_a_checkpoint_only_the_header_is_read(file, monkeypatch):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}, file)
    monkeypatch.setattr("unziplora.formats.safetensors.load_file", None)
    for read in (read_lora, inspect):
        with pytest.raises(UserError, match="not a LoRA"):
            read(file)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_lora(make(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_missing_folders_are_created_and_others_can_read_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "c.safetensors"
    old = os.umask(0o022)
    try:
        write_lora(make(), path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_malformed_adapter_metadata_is_refused(file):
    lora = make()
    tensors = {
        f"unet.{p}.lora_{n}.weight": t for p, pair in lora.modules.items() for n, t in zip("AB", pair, strict=True)
    }
    strange = ([1], {"unet.lora_alpha": "x"}, {"unet.lora_alpha": 0}, {"unet.alpha_pattern": {"(": 1}})
    for value in ("{broken", *map(json.dumps, strange)):
        save_file(tensors, file, {"lora_adapter_metadata": value})
        refused(file, "lora_adapter_metadata")
