import json

import pytest
import sdxl
import tiny
import torch
from lora_files import TEXT, header_of, kohya, make, same, store
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from unziplora.errors import UserError
from unziplora.formats.convert import convert, resize_file
from unziplora.formats.files import LAYOUTS, read_lora, write_lora
from unziplora.formats.header import metadata_for
from unziplora.formats.inspect import inspect
from unziplora.formats.names import to_kohya, unflatten
from unziplora.formats.programs import PROGRAMS
from unziplora.formats.sdxl import to_sgm, unet_module
from unziplora.lora.algebra import delta
from unziplora.lora.weights import Lora


def full(only=""):
    """A rank-1 LoRA for SDXL's own widths, for the modules with `only` in their path."""
    pairs = {p: (torch.ones(1, i), torch.ones(o, 1)) for _, p, (o, i) in sdxl.recorded() if only in p}
    return Lora(pairs)


def answers(path):
    return {name: verdict.answer for name, verdict in inspect(path).loads_in.items()}


# --- inspect


def test_our_own_file_is_described(tmp_path):
    path = tmp_path / "cat.safetensors"
    described = metadata_for(title="cat", trigger="a sks cat", base="some/base", thumbnail=Image.new("RGB", (8, 8)))
    write_lora(make(rank=4), path, metadata=described, alpha=2)
    found = inspect(path)
    assert (found.layout, found.modules, found.text_modules) == ("kohya", len(make().modules), 0)
    assert (found.ranks, found.alphas) == ({4: found.modules}, {"2": found.modules})
    assert found.strengths == {"0.5": found.modules}
    assert found.dtypes == {"fp16": found.modules}
    assert found.kinds == {"attention": found.modules}
    assert found.bytes == path.stat().st_size
    assert found.trigger_words == ["a sks cat"]
    assert found.trained_on == "some/base"
    assert found.problems == []
    text = str(found)
    for word in ("kohya", "a sks cat", "ComfyUI", "up_blocks.0.attentions.1", "modelspec.thumbnail", "rank      4"):
        assert word in text
    assert max(map(len, found.lines())) < 140
    assert json.loads(found.model_dump_json())["layout"] == "kohya"


def test_shares_are_those_of_the_dense_updates(tmp_path):
    lora = make(rank=lambda i: 1 + i % 3)
    write_lora(lora, tmp_path / "a.safetensors", dtype="fp32")
    found = inspect(tmp_path / "a.safetensors").blocks
    energy = {path: float(delta(pair).square().sum()) for path, pair in lora.modules.items()}
    for name, block in found.items():
        inside = [path for path in energy if path.startswith(name + ".")]
        assert block.modules == len(inside)
        assert block.share == pytest.approx(sum(energy[path] for path in inside) / sum(energy.values()), rel=1e-4)
    assert sum(block.share for block in found.values()) == pytest.approx(1)


def test_untrained_modules_are_reported(tmp_path):
    lora = make()
    for path, (down, up) in lora.modules.items():
        if path.startswith("mid_block"):
            lora.modules[path] = (down, torch.zeros_like(up))
    write_lora(lora, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    middle = found.blocks["mid_block.attentions.0"]
    assert middle.untrained == middle.modules == len(found.untrained)
    assert found.problems == []  # a method may close whole blocks
    assert any("mid_block.attentions.0" in line and line.endswith("untrained") for line in found.lines())
    nothing = Lora({path: (down, torch.zeros_like(up)) for path, (down, up) in lora.modules.items()})
    write_lora(nothing, tmp_path / "b.safetensors")
    assert inspect(tmp_path / "b.safetensors").problems == ["untrained: ΔW = 0 in every module"]


def test_nan_is_reported(tmp_path):
    tensors = kohya(make())
    next(iter(tensors.values()))[0, 0] = float("nan")
    assert "NaN" in inspect(store(tmp_path / "a.safetensors", tensors)).problems[0]


def test_a_checkpoint_is_refused_by_name(tmp_path):
    path = store(tmp_path / "a.safetensors", {"model.diffusion_model.x.weight": torch.ones(1)})
    with pytest.raises(UserError, match="full checkpoint"):
        inspect(path)


def test_malformed_tags_yield_no_trigger_words(tmp_path):
    for value in ("{", "[]", '{"a": 1}', '{"a": {"b": "x"}}', '{"a": {"b": Infinity}}'):
        path = store(tmp_path / "a.safetensors", kohya(make()), {"ss_tag_frequency": value})
        assert inspect(path).trigger_words == []
    value = json.dumps({"10_cat": {"whiskers": 2, "a sks cat": 9}})
    path = store(tmp_path / "a.safetensors", kohya(make()), {"ss_tag_frequency": value})
    assert inspect(path).trigger_words == ["a sks cat", "whiskers"]


def test_convolutions_are_counted_apart(tmp_path):
    paths = [
        "down_blocks.0.resnets.0.conv1",
        "up_blocks.0.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
    ]
    pairs = {path: (torch.ones(1, 4, 3, 3), torch.ones(4, 1, 1, 1)) for path in paths}
    write_lora(Lora({**make().modules, **pairs}), tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").kinds == {"attention": len(make().modules), "convolution": 3}


# --- which programs load it


def test_our_default_loads_everywhere(tmp_path):
    write_lora(full(), tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert answers(tmp_path / "a.safetensors") == dict.fromkeys(PROGRAMS, "yes")
    assert (found.modules, found.base) == (722, "SDXL")
    assert found.kinds == {"attention": 560, "feed-forward": 140, "proj": 22}


def test_diffusers_names_load_in_diffusers_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    write_lora(full(), path, "diffusers")
    expected = {**dict.fromkeys(PROGRAMS, "no"), "ComfyUI": "partly", "diffusers": "yes"}
    assert answers(path) == expected
    assert "560 attention modules of 722" in inspect(path).loads_in["ComfyUI"].reason
    write_lora(full(".attn"), path, "diffusers")
    assert answers(path) == {**expected, "ComfyUI": "no"}


def test_verdicts_on_foreign_kohya_files(tmp_path):
    attention, rest = kohya(full(".attn1")), kohya(full(".attn2"), "diffusers")
    named = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = store(tmp_path / "a.safetensors", {**attention, **rest}, named)
    assert inspect(path).layout == "kohya-mixed"
    yes = dict.fromkeys(PROGRAMS, "yes")
    assert answers(path) == {**yes, "InvokeAI": "no", "diffusers": "partly", "sd-scripts": "no"}
    assert answers(store(path, rest, named)) == {**yes, "sd-scripts": "partly"}
    assert answers(store(path, attention)) == {**yes, "A1111": "partly"}
    assert answers(store(path, attention, {**named, "lora_adapter_metadata": "{}"})) == {**yes, "diffusers": "no"}
    mixed = kohya(full(".attn1"), alpha=lambda path: 1.0 if "to_q" in path else 0.5)
    assert answers(store(path, mixed, named)) == {**yes, "diffusers": "partly"}


def test_conversion_repairs_a_header_that_hides_the_file(tmp_path):
    for wrong in ("", "sd_v1"):
        source = store(tmp_path / "a.safetensors", kohya(full(".attn")), {"ss_base_model_version": wrong})
        convert(source, tmp_path / "b.safetensors", overwrite=True)
        assert answers(tmp_path / "b.safetensors") == dict.fromkeys(PROGRAMS, "yes")
    finetune = {"ss_base_model_version": "sdxl_base_v0-9"}
    convert(store(source, kohya(full(".attn")), finetune), tmp_path / "b.safetensors", overwrite=True)
    assert header_of(tmp_path / "b.safetensors")["ss_base_model_version"] == "sdxl_base_v0-9"


def test_layout_of_a_text_encoder_file_follows_its_names(tmp_path):
    text = {TEXT: (torch.ones(2, 1280), torch.ones(1280, 2))}
    for layout, named in (("kohya", "kohya"), ("kohya-diffusers", "kohya"), ("diffusers", "diffusers")):
        write_lora(Lora({}, text=text), tmp_path / "a.safetensors", layout)
        assert inspect(tmp_path / "a.safetensors").layout == named


def test_diffusers_drops_added_embeddings_by_kohyas_names(tmp_path):
    write_lora(full(), tmp_path / "a.safetensors", "kohya-diffusers")
    assert answers(tmp_path / "a.safetensors")["diffusers"] == "yes"  # SDXL's recorded names have none
    added = {"add_embedding.linear_1": (torch.ones(1, 2816), torch.ones(1280, 1))}
    write_lora(Lora({**full().modules, **added}), tmp_path / "a.safetensors", "kohya-diffusers")
    found = inspect(tmp_path / "a.safetensors").loads_in["diffusers"]
    assert found.answer == "partly"
    assert found.reason == "drops 1 modules, such as add_embedding.linear_1, without an error"


def test_a_small_base_opens_in_diffusers_alone(tmp_path):
    write_lora(make(), tmp_path / "a.safetensors")
    assert answers(tmp_path / "a.safetensors") == {**dict.fromkeys(PROGRAMS, "no"), "diffusers": "yes"}


def test_a_block_that_sdxl_does_not_have_is_of_another_base(tmp_path):
    deep = {"down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q": (torch.ones(1, 640), torch.ones(640, 1))}
    write_lora(Lora({**full(".attn1").modules, **deep}), tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").base == "a base of SDXL's topology, of another size"


@pytest.mark.parametrize(
    "kind", ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
)
@pytest.mark.parametrize("small", [True, False])
def test_layers_outside_transformers_tell_the_size_of_the_base_too(tmp_path, kind, small):
    unet = tiny.unet() if small else sdxl.unet()
    weights = {path: module.weight for path, module in unet.named_modules() if path.endswith(f".{kind}")}
    pairs = {
        path: (torch.ones(1, *weight.shape[1:]), torch.ones(len(weight), 1, *[1] * (weight.ndim - 2)))
        for path, weight in weights.items()
    }
    assert len(pairs) >= 2
    write_lora(Lora(pairs), tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found.base == ("a base of SDXL's topology, of another size" if small else "SDXL")
    assert found.loads_in["ComfyUI"].answer == ("no" if small else "yes")


def test_verdict_on_an_unchecked_layout_is_unknown(tmp_path):
    lora = full(".attn1.to_q")
    tensors = {
        f"diffusion_model.{to_sgm(path)}.{name}.weight": tensor
        for path, pair in lora.modules.items()
        for name, tensor in zip(("lora_down", "lora_up"), pair, strict=True)
    }
    assert set(answers(store(tmp_path / "a.safetensors", tensors)).values()) == {"unknown"}


# --- convert


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_becomes_every_other(tmp_path, source, target):
    lora = Lora(make().modules, text={TEXT: (torch.randn(3, 24), torch.randn(24, 3))})
    write_lora(lora, tmp_path / "a.safetensors", source, metadata={"modelspec.title": "cat"}, dtype="fp32")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", target)
    back = read_lora(tmp_path / "b.safetensors")
    same(lora, back, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta(back.text[TEXT]), delta(lora.text[TEXT]), atol=1e-5, rtol=1e-5)
    assert back.metadata["modelspec.title"] == "cat"
    assert ("lora_adapter_metadata" in back.metadata) == (target == "diffusers")


def test_conversion_of_a_kohya_file_keeps_its_numbers_bit_for_bit(tmp_path):
    tensors = {key: tensor.half() for key, tensor in kohya(make(rank=3), "diffusers", alpha=lambda path: 0.7).items()}
    path = store(tmp_path / "a.safetensors", tensors)
    convert(path, tmp_path / "b.safetensors")
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        flat, _, part = name.partition(".")
        original = unet_module(unflatten(flat.removeprefix("lora_unet_")))
        assert torch.equal(tensor, tensors[f"{to_kohya(original, 'diffusers')}.{part}"])


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path):
    path = tmp_path / "a.safetensors"
    write_lora(make(), path)
    with pytest.raises(UserError, match="exists already"):
        convert(path, path, "diffusers")
    assert inspect(path).layout == "kohya"
    convert(path, path, "diffusers", overwrite=True)
    assert inspect(path).layout == "diffusers"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_lora(make(), "~/a.safetensors")
    convert("~/a.safetensors", "~/b.safetensors", "diffusers")
    assert resize_file("~/b.safetensors", "~/c.safetensors", rank=1).path == tmp_path / "c.safetensors"
    assert inspect("~/c.safetensors").ranks == {1: len(read_lora("~/a.safetensors").modules)}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors" for name in "abc"}


# --- resize


def test_resize_to_a_rank(tmp_path):
    lora = make(rank=4)
    write_lora(lora, tmp_path / "a.safetensors", dtype="fp32", metadata={"modelspec.title": "cat"})
    done = resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2)
    back = read_lora(tmp_path / "b.safetensors")
    kept = whole = 0.0
    for path, pair in lora.modules.items():
        u, s, vh = torch.linalg.svd(delta(pair), full_matrices=False)
        torch.testing.assert_close(delta(back.modules[path]), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4, rtol=1e-4)
        kept, whole = kept + float(s[:2].square().sum()), whole + float(s.square().sum())
    assert done.energy == pytest.approx(kept / whole, rel=1e-4)
    assert done.worst < done.energy < 1
    assert done.ranks == {2: len(lora.modules)}
    assert header_of(tmp_path / "b.safetensors")["ss_network_dim"] == "2"
    assert back.metadata["modelspec.title"] == "cat"


def test_resize_to_a_share_of_energy(tmp_path):
    write_lora(make(rank=6), tmp_path / "a.safetensors", dtype="fp32")
    done = resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", energy=0.8)
    assert 0.8 <= done.worst <= done.energy < 1
    assert len(done.ranks) > 1
    assert len(inspect(tmp_path / "b.safetensors").alphas) == 1


def test_resize_keeps_text_encoders_and_dtype(tmp_path):
    text = {TEXT: (torch.randn(3, 24), torch.randn(24, 3))}
    write_lora(Lora(make().modules, text=text), tmp_path / "a.safetensors", dtype="bf16")
    resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=1, layout="diffusers")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_tensor(f"{TEXT}.lora_A.weight").shape == (1, 24)
        assert file.get_tensor(f"{TEXT}.lora_A.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "--rank 16, or --energy"),
        ({"rank": 0}, "1 or more"),
        ({"energy": 0.0}, "share"),
        ({"energy": 1.1}, "share"),
    ],
)
def test_impossible_ranks_and_energies_are_refused(tmp_path, request_, match):
    write_lora(make(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=match):
        resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **request_)
    assert not (tmp_path / "b.safetensors").exists()


def test_an_untrained_file_can_be_resized(tmp_path):
    lora = Lora({path: (down, torch.zeros_like(up)) for path, (down, up) in make().modules.items()})
    write_lora(lora, tmp_path / "a.safetensors")
    assert resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", energy=0.9).energy == 1
