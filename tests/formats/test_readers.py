"""Property tests of the readers: any mapping of names to tensors is a LoRA or refused, quickly and by a message."""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lora_files import store

from unziplora.errors import UserError
from unziplora.formats.adapter_config import read_adapter_config
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.names import parse_name, unwrap
from unziplora.formats.quantization import dequantized
from unziplora.lora.algebra import delta

PREFIXES = (
    *(
        "lora_unet_",
        "unet.",
        "unet.unet.",
        "",
        "lycoris_",
        "lora_te1_",
        "text_encoder_2.",
        "clip_g.",
        "diffusion_model.",
    ),
    *("base_model.model.", "_orig_mod.", "conditioner.embedders.1.model.", "bundle_emb.", "transformer."),
)
MODULES = (
    *("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_in", "conv_in", "out.2"),
    *("text_model.encoder.layers.0.mlp.fc1", "transformer.resblocks.0.attn.in_proj", "text_projection", "x", "", "²"),
    *("up_blocks_3_attentions_0_transformer_blocks_0_attn2_to_k", "down_blocks.99999999999999999999.resnets.0.conv1"),
)
ROLES = (
    *(".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.default.weight", ".alpha", "_lora.up.weight"),
    *(".weight", ".bias", ".lora_A", ".lora_B", ".scale_weight", ".lora_down.scale_weight", ".lora_up.weight_scale"),
    *(".hada_w1_a", ".diff", ".lora_mid.weight", ".dora_scale", ".absmax", "\n", "", ".clip_l", ".lora.alpha"),
)
KEYS = st.one_of(
    st.builds(lambda *parts: "".join(parts), *map(st.sampled_from, (PREFIXES, MODULES, ROLES))),
    st.text(max_size=20),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES += (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
SHAPES = st.sampled_from([(), (1,), (0,), (4,), (2, 8), (8, 2), (6, 2), (8, 0), (2, 8, 3, 3), (8, 2, 1, 1), (2, 2, 2)])
VALUES = st.sampled_from([0.0, 1.0, -2.0, 1e-7, 1e30, float("nan"), float("inf")])


@st.composite
def tensors(draw):
    value, dtype = draw(VALUES), draw(st.sampled_from(DTYPES))
    tensor = torch.full(draw(SHAPES), value if dtype.is_floating_point or dtype.is_complex else 1)
    return tensor.to(dtype)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = ("lora_alpha", "r", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type", "use_dora", "eva_config")
CONFIGS = st.dictionaries(
    st.sampled_from(OPTIONS) | st.builds("unet.{}".format, st.sampled_from(OPTIONS)) | st.text(max_size=5), JSON
)


def read(path):
    """Read a file, with warnings allowed, or return None if it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_lora(path)
        except UserError:
            return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, tensors(), max_size=6), CONFIGS | st.none())
def test_any_mapping_of_names_to_tensors_is_a_lora_or_refused(folder, tensors, config):
    metadata = {"lora_adapter_metadata": json.dumps(config), "unziplora.layers_per_block": "²"} if config else None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = store(folder / "a.safetensors", tensors, metadata)
    lora = read(path)
    if lora is None:
        return
    assert inspect(path).modules == len(lora.modules)
    for down, up in (*lora.modules.values(), *lora.text.values()):
        assert down.dtype == up.dtype == torch.float32
        assert down.shape[0] == up.shape[1] > 0


SIZES = st.sampled_from([1e-6, 0.02, 1.0, 50.0])


@given(
    st.sampled_from([("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")]),
    *(st.sampled_from(["unet.", "unet.unet.", "diffusion_model.", "_orig_mod.unet.", "module."]), SIZES, SIZES),
    *(st.integers(1, 5), st.none() | st.floats(0.01, 100, allow_subnormal=False), st.sampled_from(DTYPES[:4])),
)
def test_a_plain_lora_is_read_to_the_number_and_survives_fp16(folder, roles, prefix, a, b, rank, alpha, dtype):
    name, generator = prefix + MODULES[0], torch.Generator().manual_seed(rank)
    down = (torch.randn(rank, 8, generator=generator) * a).to(dtype)
    up = (torch.randn(6, rank, generator=generator) * b).to(dtype)
    file = {f"{name}.{role}.weight": tensor for role, tensor in zip(roles, (down, up), strict=True)}
    if alpha:
        file[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    truth = up.double() @ down.double() * (alpha / rank if alpha else 1)
    lora = read(store(folder / "b.safetensors", file))
    assert (delta(lora.modules[MODULES[0]]) - truth).norm() <= 1e-6 * truth.norm()
    write_lora(lora, folder / "c.safetensors", alpha=rank)
    stored = delta(read(folder / "c.safetensors").modules[MODULES[0]])
    if truth.norm() > 1e-6:  # a smaller change is below what two balanced factors in fp16 can tell
        assert (stored - truth).norm() < 2e-3 * truth.norm()


@given(KEYS)
@example("lora_unet_" + "down_blocks_1_" * 5000)
@example("base_model.model." * 5000)
@example("unet." * 5000 + "conv_in")
def test_any_name_is_a_module_or_a_value_error(key):
    try:
        component, path, layout = parse_name(unwrap(key))
    except ValueError:
        return
    assert component in ("unet", "text_encoder", "text_encoder_2")
    assert path
    assert layout


@given(st.text() | CONFIGS.map(json.dumps))
@example('{"a":' * 100_000)
@example('{"lora_alpha": 1' + "0" * 5000 + "}")
@example('{"lora_alpha": 1e999}')
def test_any_adapter_configuration_is_understood_or_refused(text):
    try:
        configs = read_adapter_config(text, "adapter_config.json")
    except UserError:
        return
    for config in configs.values():
        assert 0 < config.strength(MODULES[0], rank=4) < float("inf")


# --- quantized files


X = "lora_unet_input_blocks_4_1_proj_in"
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_output", [False, True])
def test_scaled_fp8_loras_are_read_with_their_scales(tmp_path, end, per_output):
    down, up = torch.randn(4, 16), torch.randn(16, 4)
    file, expected = {}, []
    for part, matrix in (("lora_down", down), ("lora_up", up)):
        scale = (matrix.abs().amax(1) if per_output else matrix.abs().max()) / 448
        columns = scale[:, None] if per_output else scale
        file[f"{X}.{part}.weight"], file[f"{X}.{part}.{end}"] = (matrix / columns).to(FP8), scale
        expected.append(file[f"{X}.{part}.weight"].double() * columns.double())
    file["scaled_fp8"] = torch.zeros(2).to(FP8)
    ((_, pair),) = read_lora(store(tmp_path / "a.safetensors", file)).modules.items()
    torch.testing.assert_close(delta(pair).double(), expected[1] @ expected[0], rtol=1e-5, atol=1e-6)


def test_fp8_without_a_scale_is_a_number_format(tmp_path):
    down, up = torch.randn(4, 16).to(FP8), torch.randn(16, 4).to(FP8)
    file = {f"{X}.lora_down.weight": down, f"{X}.lora_up.weight": up}
    ((_, pair),) = read_lora(store(tmp_path / "a.safetensors", file)).modules.items()
    torch.testing.assert_close(delta(pair), up.float() @ down.float())
    assert inspect(tmp_path / "a.safetensors").untrained == []


INT8, ONES = torch.ones(4, 16, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bitsandbytes int8", {"lora_down.SCB": ONES}),
        ("I8", {"lora_down.weight": INT8}),
        ("integers", {"lora_down.weight": None, "lora_down": INT8}),
        ("bitsandbytes 4-bit", {"lora_down.weight.absmax": ONES}),
        ("a scale that does not fit", {"lora_down.weight_scale": ONES}),
        (
            "a scale that does not fit",
            {"lora_down.weight": INT8.to(FP8), "lora_down.weight_scale": ONES[:3]},
        ),
        (
            "a scale that does not fit",
            {"lora_down.weight": INT8.to(FP8), "lora_down.weight_scale": INT8[0, 0]},
        ),
        ("companion", {"lora_down.zero_point": ONES}),
        ("compressed tensors", {"lora_down.weight_scale_inv": ONES}),
    ],
)
def test_loras_quantized_in_another_way_are_refused(tmp_path, kind, change):
    file = {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.ones(16, 4), **change}
    file = {f"{X}.{end}": tensor for end, tensor in file.items() if tensor is not None}
    with pytest.raises(UserError, match=kind):
        read_lora(store(tmp_path / "a.safetensors", file))


def test_tensors_without_scales_stay_the_same_objects():
    tensors = {"a.weight": torch.ones(2), "a.bias": torch.ones(2)}
    assert all(new is tensors[name] for name, new in dequantized(tensors).items())
