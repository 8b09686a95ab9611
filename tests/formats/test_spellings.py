"""Every spelling in which published SDXL LoRAs come is read to the same dense update, to the number."""

import json
import warnings

import pytest
import tiny
import torch
from lora_files import store

from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.sdxl import to_sgm

RANK, ALPHA = 4, 3.0
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.0.resnets.0.conv1"
UNET = {Q: (16, 16), OUT: (24, 24), FF: (24, 192), CONV: (8, 8)}  # in, out
FC1, K = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.self_attn.k_proj"
TEXT = {FC1: (1, 4), K: (1, 1)}
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}

ROLES = {
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "PEFT": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "PEFT, adapter named": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "adapter with digits": ("{}.lora_A.default_0.weight", "{}.lora_B.default_0.weight"),
    "without weight": ("{}.lora_A", "{}.lora_B"),
    "diffusers 2023": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "text encoders, older": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
}
WRAPPED = [
    "unet._orig_mod.{0}",
    "_orig_mod.unet.{0}",
    "module.unet.{0}",
    "unet.module.{0}",
    "module._orig_mod.unet.{0}",
    "unet._fsdp_wrapped_module.{0}",
    "unet.base_model.model.{0}",
    "unet.{0}._orig_mod",
    "unet.{0}._checkpoint_wrapped_module",
]
UNET_NAMES = [
    *("unet.{0}", "unet.unet.{0}", "unet.unet.unet.{0}", "{0}", "diffusion_model.{1}", "model.diffusion_model.{1}"),
    *("unet.{1}", "{1}", "diffusion_model.unet.{0}"),
    *WRAPPED,
]
FLAT_UNET_NAMES = [
    *("lora_unet_{0}", "lora_unet_{1}", "lycoris_{0}", "lycoris_unet_{0}", "lycoris_{1}", "lora_unet_unet_{0}"),
    *("lora_unet__orig_mod_{0}", "lycoris__orig_mod_{0}", "lora_unet_module_{1}"),
]
TEXT_NAMES = {
    "text_encoder": [
        *("text_encoder.{0}", "text_encoder_1.{0}", "clip_l.{0}", "te1.{0}", "clip_l.transformer.{0}"),
        *("text_encoders.clip_l.transformer.{0}", "conditioner.embedders.0.transformer.{0}", "text_encoder.{1}"),
        *("text_encoder.text_encoder.{0}", "text_encoder._orig_mod.{0}", "text_encoder.base_model.model.{0}"),
    ],
    "text_encoder_2": [
        *("text_encoder_2.{0}", "clip_g.{0}", "te2.{0}", "clip_g.transformer.{0}", "text_encoder_2.{1}"),
        *("text_encoders.clip_g.transformer.{0}", "module.text_encoder_2.{0}", "text_encoder_2.text_encoder_2.{0}"),
    ],
}
FLAT_TEXT_NAMES = {
    "text_encoder": ["lora_te1_{0}", "lora_te_{0}", "lycoris_te1_{0}", "lora_te1__orig_mod_{0}"],
    "text_encoder_2": ["lora_te2_{0}", "lycoris_te2_{0}"],
}


def pair(width, out, seed=0, kernel=()):
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(kernel)
    down = torch.randn(RANK, width, *kernel, generator=generator) * 0.02
    return down, torch.randn(out, RANK, *ones, generator=generator) * 0.02


def dense(down, up):
    return torch.einsum("or,ri...->oi...", up.flatten(1).double(), down.double())


def unet_pairs():
    return {path: pair(*shape, seed, (3, 3) if path == CONV else ()) for seed, (path, shape) in enumerate(UNET.items())}


def text_pairs(encoder):
    width = WIDTHS[encoder]
    return {path: pair(width * i, width * o, seed) for seed, (path, (i, o)) in enumerate(TEXT.items())}


def check(path, expected, strength=1.0):
    """Compare every module of a file with the dense truth, and check that it has no other."""
    lora = read_lora(path)
    modules = {**lora.modules, **lora.text}
    assert modules.keys() == expected.keys()
    for name, factors in expected.items():
        torch.testing.assert_close(dense(*modules[name]), strength * dense(*factors), rtol=1e-5, atol=1e-9)


def write(path, names, roles, alpha=None, metadata=None):
    """Write pairs by their spelled names."""
    tensors = {}
    for name, factors in names.items():
        tensors |= {role.format(name): tensor for role, tensor in zip(roles, factors, strict=True)}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return store(path / "a.safetensors", tensors, metadata)


def spell(pattern, path):
    return pattern.format(path, path.removeprefix("text_model.") if path.startswith("text_model.") else to_sgm(path))


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_unet_by_every_role(tmp_path, roles, alpha):
    pairs = unet_pairs()
    path = write(tmp_path, {f"unet.{name}": factors for name, factors in pairs.items()}, roles, alpha)
    check(path, pairs, alpha / RANK if alpha else 1.0)


@pytest.mark.parametrize("pattern", UNET_NAMES)
def test_unet_by_every_dotted_name(tmp_path, pattern):
    pairs = unet_pairs()
    for roles in (ROLES["kohya"], ROLES["PEFT"], ROLES["diffusers 2023"]):
        path = write(tmp_path, {spell(pattern, name): factors for name, factors in pairs.items()}, roles, ALPHA)
        check(path, pairs, ALPHA / RANK)


@pytest.mark.parametrize("pattern", FLAT_UNET_NAMES)
def test_unet_by_every_flattened_name(tmp_path, pattern):
    pairs = unet_pairs()
    names = {spell(pattern, name).replace(".", "_"): factors for name, factors in pairs.items()}
    check(write(tmp_path, names, ROLES["kohya"], ALPHA), pairs, ALPHA / RANK)


@pytest.mark.parametrize("prefix", ["unet.", "", "unet._orig_mod."])
def test_unet_by_the_names_of_attention_processors(tmp_path, prefix):
    pairs = {path: factors for path, factors in unet_pairs().items() if ".attn" in path}
    names = {}
    for path, factors in pairs.items():
        attention, _, end = path.replace(".to_out.0", ".to_out").rpartition(".")
        names[f"{prefix}{attention}.processor.{end}"] = factors
    check(write(tmp_path, names, ("{}_lora.down.weight", "{}_lora.up.weight")), pairs)


@pytest.mark.parametrize(
    ("encoder", "pattern"), [(encoder, pattern) for encoder, patterns in TEXT_NAMES.items() for pattern in patterns]
)
def test_text_encoders_by_every_dotted_name(tmp_path, encoder, pattern):
    pairs = text_pairs(encoder)
    expected = {f"{encoder}.{name}": factors for name, factors in pairs.items()}
    for roles in (ROLES["kohya"], ROLES["PEFT"], ROLES["text encoders, older"]):
        path = write(tmp_path, {spell(pattern, name): factors for name, factors in pairs.items()}, roles, ALPHA)
        check(path, expected, ALPHA / RANK)


@pytest.mark.parametrize(
    ("encoder", "pattern"),
    [(encoder, pattern) for encoder, patterns in FLAT_TEXT_NAMES.items() for pattern in patterns],
)
def test_text_encoders_by_every_flattened_name(tmp_path, encoder, pattern):
    pairs = text_pairs(encoder)
    names = {spell(pattern, name).replace(".", "_"): factors for name, factors in pairs.items()}
    expected = {f"{encoder}.{name}": factors for name, factors in pairs.items()}
    check(write(tmp_path, names, ROLES["kohya"], ALPHA), expected, ALPHA / RANK)


@pytest.mark.parametrize("flat", [False, True], ids=["dotted", "flattened"])
def test_open_clip_names_and_its_fused_projection(tmp_path, flat):
    fused, fc2 = pair(24, 3 * 24), pair(96, 24, seed=1)
    block = "transformer.resblocks.31"
    names = {f"conditioner.embedders.1.model.{block}.attn.in_proj": fused, f"clip_g.{block}.mlp.c_proj": fc2}
    if flat:
        names = {f"lora_te2_{name.rpartition(block)[2]}": factors for name, factors in names.items()}
        names = {f"lora_te2_{block}{name[9:]}".replace(".", "_"): factors for name, factors in names.items()}
    layer = "text_encoder_2.text_model.encoder.layers.31"
    thirds = zip("qkv", fused[1].chunk(3), strict=True)
    expected = {f"{layer}.self_attn.{letter}_proj": (fused[0], up) for letter, up in thirds}
    check(write(tmp_path, names, ROLES["kohya"], ALPHA), {**expected, f"{layer}.mlp.fc2": fc2}, ALPHA / RANK)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_peft_adapters_follow_their_configuration(tmp_path, start, use_rslora):
    pairs = unet_pairs()
    patterns = {r"attn1\.to_q": 2, "attn2.to_out.0": 16}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 6, "alpha_pattern": patterns, "rank_pattern": {"conv1": RANK}}
    config |= {"init_lora_weights": start, "use_rslora": use_rslora, "bias": "none", "eva_config": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for prefix in ("base_model.model.", "base_model.model.unet.", "module.base_model.model."):
        path = write(tmp_path, {prefix + name: factors for name, factors in pairs.items()}, ROLES["PEFT"])
        found = read_lora(path).modules
        for name, factors in pairs.items():
            alpha = {Q: 2, OUT: 16}.get(name, 6)
            strength = alpha / (RANK**0.5 if use_rslora else RANK)
            torch.testing.assert_close(dense(*found[name]), strength * dense(*factors), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("end", ["", "$"])
def test_a_pattern_that_begins_with_a_caret_is_the_whole_path(tmp_path, end):
    pairs = unet_pairs()
    whole, part = f"^{Q}{end}".replace(".", r"\."), f"^{Q.partition('.')[2]}{end}"
    config = {"unet.lora_alpha": 6, "unet.alpha_pattern": {part: 5, whole: 2}}
    header = {"lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path, {f"unet.{name}": factors for name, factors in pairs.items()}, ROLES["PEFT"], metadata=header)
    found = read_lora(path).modules
    for name, factors in pairs.items():
        expected = (2 if name == Q else 6) / RANK * dense(*factors)
        torch.testing.assert_close(dense(*found[name]), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("level", ["", "text_model."])
def test_a_pattern_of_a_text_encoder_has_either_spelling(tmp_path, level):
    name, factors = "encoder.layers.1.self_attn.q_proj", pair(16, 16)
    config = {"text_encoder.lora_alpha": 6, "text_encoder.alpha_pattern": {f"^{level}{name}": 2}}
    header = {"lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path, {f"text_encoder.{name}": factors}, ROLES["PEFT"], metadata=header)
    (found,) = read_lora(path).text.values()
    torch.testing.assert_close(dense(*found), 2 / RANK * dense(*factors))


def test_mixed_ranks_saved_again_by_diffusers_keep_their_updates(tmp_path):
    pipe = tiny.pipeline()
    paths = [f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"]
    layers = [pipe.unet.get_submodule(path) for path in paths]
    factors = [pair(layer.in_features, layer.out_features, number) for number, layer in enumerate(layers)]
    wanted = dict(zip(paths, factors, strict=True))
    wanted[paths[0]] = factors[0][0][:2], factors[0][1][:, :2]
    pipe.load_lora_weights(write(tmp_path, {f"unet.{path}": one for path, one in wanted.items()}, ROLES["PEFT"]))
    pipe.unet.save_lora_adapter(tmp_path / "again", weight_name="again.safetensors", adapter_name="default_0")
    found = read_lora(tmp_path / "again" / "again.safetensors").modules
    for path, one in wanted.items():
        torch.testing.assert_close(dense(*found[path]), dense(*one))


STARTS = ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "something new"]
OPTIONS = ["use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "layer_replication", "kasa_config", "arrow_config"]


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": start} for start in STARTS]
    + [{option: True} for option in [*OPTIONS, "alora_invocation_tokens", "use_bdlora", "use_something_new"]]
    + [{"peft_type": kind} for kind in ("LOHA", "ADALORA", "VERA")],
    ids=str,
)
def test_peft_adapters_that_are_not_plain_loras_are_refused(tmp_path, changes):
    config = {"peft_type": "LORA", "lora_alpha": 4, **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = write(tmp_path, {f"base_model.model.{Q}": pair(16, 16)}, ROLES["PEFT"])
    with pytest.raises(UserError, match=next(iter(changes))):
        read_lora(path)
    file = write(tmp_path, {f"unet.{Q}": pair(16, 16)}, ROLES["PEFT"]).rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=next(iter(changes))):
        read_lora(file)
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    path = write(tmp_path, {f"unet.{Q}": pair(16, 16)}, ROLES["PEFT"], metadata=header)
    with pytest.raises(UserError, match=next(iter(changes))):
        read_lora(path)


def test_a_regular_expression_for_alphas_is_refused_and_never_run(tmp_path):
    config = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+$": 1}}
    header = {"lora_adapter_metadata": json.dumps(config)}
    path = write(tmp_path, {f"unet.{Q}": pair(16, 16)}, ROLES["PEFT"], metadata=header)
    with pytest.raises(UserError, match=r"regular expression, '\(a\+\)\+\$'"):
        read_lora(path)


@pytest.mark.parametrize(
    "keys",
    [
        ["bundle_emb.sks.clip_l", "bundle_emb.sks.clip_g"],
        ["bundle_emb.sks.clip_l", "bundle_emb.sks.clip_l_out"],  # OneTrainer's output embedding
        ["bundle_emb.flora.clip_l"],
        ["emb_params"],
        ["epoch"],
    ],
)
def test_what_is_not_part_of_the_lora_is_named(tmp_path, keys):
    factors = pair(16, 16)
    tensors = {f"unet.{Q}.lora_A.weight": factors[0], f"unet.{Q}.lora_B.weight": factors[1]}
    path = store(tmp_path / "a.safetensors", {**tensors, **{key: torch.ones(1, 8) for key in keys}})
    with pytest.warns(UserWarning, match="read without") as caught:
        check(path, {Q: factors})
    assert all(key in str(caught[0].message) for key in keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"{len(keys)} tensors are not part of the LoRA" in inspect(path).problems[0]


def test_a_file_with_an_embedding_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown kind"):
        read_lora(store(tmp_path / "a.safetensors", {"bundle_emb.sks.clip_l": torch.ones(1, 768)}))
