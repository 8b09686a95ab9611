import hashlib
import json
from datetime import datetime, timedelta, timezone

import pytest
import sdxl
import tiny
import torch
from lora_files import KOHYA, TEXT, Q, every_kind, header_of, kohya, make, same, store, tiny_unet
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from unziplora.errors import UserError
from unziplora.formats.files import LAYOUTS, read_lora, write_lora
from unziplora.formats.header import metadata_for
from unziplora.formats.names import to_kohya
from unziplora.formats.sdxl import to_sgm
from unziplora.lora.algebra import delta
from unziplora.lora.inject import attention_linears, inject, remove
from unziplora.lora.weights import Lora, check_fits, lora_blocks, scale_blocks

# --- round trips


@pytest.mark.parametrize("alpha", [None, 1.0, 3.5])
@pytest.mark.parametrize("rank", [2, lambda i: 1 + i % 3], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_keeps_every_update(tmp_path, layout, rank, alpha):
    unet = tiny_unet()
    lora = make(every_kind(unet), rank)
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    lora = Lora(lora.modules, text={TEXT: (down, up)})
    write_lora(lora, tmp_path / "a.safetensors", layout, alpha, dtype="fp32")
    back = read_lora(tmp_path / "a.safetensors")
    same(lora, back, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta(back.text[TEXT]), up @ down)
    check_fits(back, unet)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_722_modules_of_sdxl_survive_a_round_trip(tmp_path, layout):
    """Every module of the recorded list, at its full width, is written by the recorded name and read back."""
    pairs = {path: (torch.ones(1, shape[1]), torch.full((shape[0], 1), 2.0)) for _, path, shape in sdxl.recorded()}
    path = tmp_path / "a.safetensors"
    write_lora(Lora(pairs), path, layout)
    names = list(load_file(path))
    if layout == "kohya":
        expected = {f"{kohya}.{part}" for kohya, *_ in sdxl.recorded() for part in ("alpha", *KOHYA)}
        assert set(names) == expected
    assert header_of(path)["ss_base_model_version"] == "sdxl_base_v1-0"
    back = read_lora(path)
    assert back.modules.keys() == pairs.keys()
    check_fits(back, sdxl.unet())


def test_mixed_ranks_are_written_with_one_alpha(tmp_path):
    write_lora(make(rank=lambda i: 1 + i % 4), tmp_path / "a.safetensors", dtype="fp32")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {4.0}
    assert header_of(tmp_path / "a.safetensors")["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_dtype_is_that_of_the_factors_and_never_of_the_alphas(tmp_path, dtype, expected):
    lora = make()
    write_lora(lora, tmp_path / "a.safetensors", dtype=dtype)
    stored = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith(".alpha")} == {expected}
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".alpha")} == {torch.float32}
    same(lora, read_lora(tmp_path / "a.safetensors"), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiny_a_next_to_a_large_b_survives_fp16(tmp_path, layout):
    lora = make()
    tiny_down = Lora({path: (down * 2e-7, up * 2) for path, (down, up) in lora.modules.items()})
    write_lora(tiny_down, tmp_path / "a.safetensors", layout)
    for path, pair in read_lora(tmp_path / "a.safetensors").modules.items():
        expected = delta(tiny_down.modules[path])
        assert (delta(pair) - expected).norm() < 1e-3 * expected.norm()


# --- other people's files


def test_different_alphas_are_folded_into_b(tmp_path):
    lora = make()
    path = store(tmp_path / "a.safetensors", kohya(lora, alpha=lambda path: 0.5 if "attn1" in path else 4.0))
    for name, (down, up) in read_lora(path).modules.items():
        strength = 0.25 if "attn1" in name else 2.0
        torch.testing.assert_close(up, lora.modules[name][1] * strength)
        assert torch.equal(down, lora.modules[name][0])


def test_missing_alpha_defaults_to_rank(tmp_path):
    lora = make()
    same(lora, read_lora(store(tmp_path / "a.safetensors", kohya(lora))))


def test_mixed_block_names_are_read(tmp_path):
    lora = make()
    paths = list(lora.modules)
    sgm, plain = (Lora({p: lora.modules[p] for p in part}) for part in (paths[::2], paths[1::2]))
    path = store(tmp_path / "a.safetensors", {**kohya(sgm), **kohya(plain, "diffusers")})
    same(lora, read_lora(path))


@pytest.mark.parametrize(
    "name",
    [
        "unet.{path}.lora_{AB}.weight",
        "unet.{path}.lora_{AB}.default.weight",
        "unet.{path}.lora.{downup}.weight",
        "{path}.lora.{downup}.weight",
        "unet.{old}_lora.{downup}.weight",
        "{old}_lora.{downup}.weight",
        "diffusion_model.{sgm}.lora_{downup}.weight",
    ],
)
def test_older_and_foreign_names_are_read(tmp_path, name):
    lora = make()
    tensors = {}
    for path, pair in lora.modules.items():
        old = path.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
        for index, tensor in enumerate(pair):
            parts = {"AB": "AB"[index], "downup": ("down", "up")[index], "sgm": to_sgm(path)}
            tensors[name.format(path=path, old=old, **parts)] = tensor
    same(lora, read_lora(store(tmp_path / "a.safetensors", tensors)))


def test_linear_layers_stored_as_1x1_convolutions_are_read(tmp_path):
    lora = make()
    tensors = {key: tensor[:, :, None, None] for key, tensor in kohya(lora).items()}
    back = read_lora(store(tmp_path / "a.safetensors", tensors))
    same(lora, back)
    check_fits(back, tiny_unet())


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_are_read_from_adapter_metadata(tmp_path, rslora):
    lora = make(rank=4)
    special = next(iter(lora.modules))
    adapter = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {special: 2}, "unet.use_rslora": rslora}
    tensors = {
        f"unet.{p}.lora_{n}.weight": t for p, pair in lora.modules.items() for n, t in zip("AB", pair, strict=True)
    }
    path = store(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(adapter)})
    for name, (_, up) in read_lora(path).modules.items():
        strength = (2 if name == special else 8) / (2 if rslora else 4)
        torch.testing.assert_close(up, lora.modules[name][1] * strength)


def test_alpha_of_a_peft_file_is_read_from_adapter_config_json(tmp_path):
    lora = make(rank=4)
    parts = {f"{p}.lora_{n}.weight": t for p, pair in lora.modules.items() for n, t in zip("AB", pair, strict=True)}
    path = store(tmp_path / "a.safetensors", {f"base_model.model.{name}": tensor for name, tensor in parts.items()})
    for content in (None, "{", "[]", '{"r": 4}', "{" * 100_000):
        if content:
            (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            read_lora(path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2, "alpha_pattern": {}, "use_rslora": false}')
    for name, (_, up) in read_lora(path).modules.items():
        torch.testing.assert_close(up, lora.modules[name][1] * 0.5)


def test_text_encoders_are_read_from_kohya_and_old_diffusers_names(tmp_path):
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    flat = {
        f"lora_te2_{TEXT.partition('.')[2].replace('.', '_')}.{part}": t
        for part, t in zip(KOHYA, (down, up), strict=True)
    }
    dotted = {f"{TEXT}.lora_linear_layer.{part}.weight": t for part, t in (("down", down), ("up", up))}
    for tensors in (flat, dotted):
        back = read_lora(store(tmp_path / "a.safetensors", tensors))
        assert not back.modules
        torch.testing.assert_close(back.text, {TEXT: (down, up)})


# --- diffusers itself


def folded(pipe, lora):
    for path, pair in lora.modules.items():
        pipe.unet.get_submodule(path).weight.data += delta(pair)


def predict(pipe):
    generator = torch.Generator().manual_seed(5)
    config = pipe.unet.config
    return pipe.unet(
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 7, config.cross_attention_dim, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, tiny.WIDTHS[1], generator=generator),
            "time_ids": torch.ones(1, 6),
        },
    ).sample.detach()


@pytest.fixture(scope="module")
def trained():
    """A LoRA of mixed ranks for attention, feed-forward and projections, of a size that shows."""
    paths = [n for n, m in tiny_unet().named_modules() if isinstance(m, torch.nn.Linear) and ".attentions." in n]
    return make(paths, rank=lambda i: 1 + i % 3)


@pytest.fixture(scope="module")
def expected(trained):
    pipe = tiny.pipeline()
    plain = predict(pipe)
    folded(pipe, trained)
    changed = predict(pipe)
    assert (changed - plain).abs().max() > 0.01
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_loads_our_file_as_if_folded_into_the_weights(tmp_path, trained, expected, layout, alpha):
    write_lora(trained, tmp_path / "a.safetensors", layout, alpha, dtype="fp32")
    pipe = tiny.pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(predict(pipe), expected, atol=1e-4, rtol=1e-3)


def test_diffusers_loads_our_text_encoder_modules(tmp_path):
    pipe = tiny.pipeline()
    layer = TEXT.removesuffix(".q_proj")
    pairs = {f"{layer}.{end}": (torch.randn(2, 24), torch.randn(24, 2)) for end in ("q_proj", "v_proj", "out_proj")}
    lora = Lora(make().modules, text=pairs)
    for layout in ("kohya", "diffusers"):
        write_lora(lora, tmp_path / "a.safetensors", layout, alpha=0.5, dtype="fp32")
        pipe.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name=layout)
        found = {n.rpartition(".")[2]: m for n, m in pipe.text_encoder_2.named_modules() if "layers.0.self_attn." in n}
        for path, pair in pairs.items():
            update = found[path.rpartition(".")[2]].get_delta_weight(layout)
            torch.testing.assert_close(update, delta(pair), atol=1e-5, rtol=1e-5)


def test_files_saved_by_diffusers_are_read(tmp_path, trained):
    layers = {f"{p}.lora_{n}.weight": t for p, pair in trained.modules.items() for n, t in zip("AB", pair, strict=True)}
    tiny.pipeline().save_lora_weights(tmp_path, unet_lora_layers=layers)
    same(trained, read_lora(tmp_path / "pytorch_lora_weights.safetensors"))


# --- header


def test_header_contains_what_galleries_and_uis_read(tmp_path):
    described = metadata_for(
        title="cat",
        trigger="a sks cat",
        hint="say it",
        base="some/base",
        prediction="v_prediction",
        settings={"steps": 600},
        thumbnail=Image.new("RGBA", (600, 300), "red"),
        method="UnZipLoRA",
    )
    write_lora(make(rank=4), tmp_path / "a.safetensors", metadata=described, alpha=2)
    found = header_of(tmp_path / "a.safetensors")
    assert all(isinstance(value, str) for value in found.values())
    wanted = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "cat",
        "modelspec.trigger_phrase": "a sks cat",
        "modelspec.usage_hint": "say it",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "v",
        "ss_output_name": "cat",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_v2": "False",
        "ss_network_args": "{}",
        "unziplora.method": "UnZipLoRA",
    }
    assert {key: found[key] for key in wanted} == wanted
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["modelspec.date"])
    assert timedelta(0) <= age < timedelta(minutes=10)
    assert json.loads(found["ss_tag_frequency"]) == {"cat": {"a sks cat": 1}}
    assert json.loads(found["unziplora.settings"]) == {"steps": 600}
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert "lora_adapter_metadata" not in found  # diffusers raises where a kohya file has it


def test_header_of_a_small_base_does_not_name_sdxl(tmp_path):
    write_lora(make(), tmp_path / "a.safetensors")
    found = header_of(tmp_path / "a.safetensors")
    assert not found["ss_base_model_version"].startswith("sdxl")
    assert "xl-v1-base" not in found["modelspec.architecture"]


def test_hash_covers_everything_after_the_header(tmp_path):
    write_lora(make(), tmp_path / "a.safetensors", metadata={"modelspec.title": "é✓"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert header_of(tmp_path / "a.safetensors")["modelspec.hash_sha256"] == f"0x{digest}"


def test_foreign_metadata_stay_and_outdated_entries_are_renewed(tmp_path):
    lora = make()
    old = {"ss_learning_rate": "1e-4", "ss_network_dim": "128", "sshs_legacy_hash": "x", "lora_adapter_metadata": "{}"}
    write_lora(Lora(lora.modules, old), tmp_path / "a.safetensors")
    found = header_of(tmp_path / "a.safetensors")
    assert found["ss_learning_rate"] == "1e-4"
    assert found["ss_network_dim"] == "2"
    assert not {"sshs_legacy_hash", "lora_adapter_metadata"} & set(found)


def test_metadata_must_be_strings(tmp_path):
    with pytest.raises(UserError, match="steps"):
        write_lora(make(), tmp_path / "a.safetensors", metadata={"steps": 3})
    assert not list(tmp_path.iterdir())


# --- blocks and bases


def test_the_longest_block_name_decides_the_strength():
    lora = make()
    strengths = {"up_blocks": 0.5, "up_blocks.0.attentions.1": 2.0, "mid_block": 0.0}
    for path, pair in scale_blocks(lora, strengths).modules.items():
        factor = 2.0 if "up_blocks.0.attentions.1." in path else 0.5 if path.startswith("up") else 1.0
        factor = 0.0 if path.startswith("mid") else factor
        torch.testing.assert_close(delta(pair), factor * delta(lora.modules[path]))
    assert "mid_block.attentions.0" in lora_blocks(lora)


@pytest.mark.parametrize("known", [True, False], ids=["base known", "base unknown"])
def test_names_follow_the_layers_per_block_of_the_base(tmp_path, known):
    unet = tiny.unet(layers_per_block=1)
    lora, path = make(unet=unet), tmp_path / "a.safetensors"
    config = unet.config if known else None
    write_lora(lora, path, metadata=metadata_for(title="a", layers_per_block=1), dtype="fp32")
    assert any("input_blocks_3_1" in name for name in load_file(path))
    same(lora, read_lora(path, config))
    write_lora(lora, path, metadata=metadata_for(title="a"), dtype="fp32")  # its length forgotten: still our own names
    same(lora, read_lora(path, config))
    store(
        path,
        {
            f"{to_kohya(p, layers=1)}.{part}": t
            for p, pair in lora.modules.items()
            for part, t in zip(KOHYA, pair, strict=True)
        },
    )
    same(lora, read_lora(path, unet.config))


def test_an_unknown_block_is_refused_with_the_names_of_the_blocks():
    with pytest.raises(UserError, match=r"up_blocks\.7.*up_blocks\.0\.attentions\.0"):
        scale_blocks(make(), {"up_blocks.7": 1.0})


def test_a_lora_for_another_base_is_refused():
    unet = tiny.unet()
    lora = make()
    check_fits(lora, unet)
    inject(unet, attention_linears(unet))
    check_fits(lora, unet)
    remove(unet)
    with pytest.raises(UserError, match=r"cat does not fit.*to_q is 16×16 in the LoRA and 32×32"):
        check_fits(lora, tiny.unet(block_out_channels=(8, 32, 64)), "cat")
    shallow = tiny.unet(transformer_layers_per_block=(1, 1, 1))
    with pytest.raises(UserError, match=r"has no down_blocks\.2\.attentions\.0\.transformer_blocks\.1"):
        check_fits(lora, shallow)


class TestStrength:
    """What is written has the strength that was read, to the digits that its numbers have."""

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strength_is_exact_with_an_alpha_that_the_dtype_would_round(self, tmp_path, layout, dtype):
        down, up = torch.randn(257, 640), torch.randn(640, 257)
        path = tmp_path / "lora.safetensors"
        write_lora(Lora({Q: (down, up)}), path, layout, alpha=0.3, dtype=dtype)
        read = delta(read_lora(path).modules[Q])
        gain = (read * (up @ down)).sum() / (up @ down).square().sum()
        assert abs(float(gain) - 1) < 2e-4

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-7])
    def test_a_small_b_keeps_its_digits_in_fp16(self, tmp_path, layout, small):
        down, up = torch.randn(16, 640) / 25, torch.randn(640, 16) * small
        path = tmp_path / "lora.safetensors"
        write_lora(Lora({Q: (down, up)}), path, layout, alpha=16.0, dtype="fp16")
        read, wanted = delta(read_lora(path).modules[Q]), up @ down
        assert float((read - wanted).norm() / wanted.norm()) < 2e-3


def test_unet_adapters_saved_by_diffusers_are_read(tmp_path):
    unet = tiny.unet()
    count = len([path for path in attention_linears(unet) if path.endswith("to_q")])
    unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    found = read_lora(tmp_path / "a.safetensors").modules
    for path, pair in found.items():
        layer = unet.get_submodule(path)
        torch.testing.assert_close(delta(pair), layer.get_delta_weight("default"))
    assert len(found) == count
