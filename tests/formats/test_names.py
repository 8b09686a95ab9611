import pytest
import sdxl
import tiny
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import nn

from unziplora.formats.names import to_kohya, unflatten
from unziplora.formats.sdxl import from_sgm, text_module, to_sgm, unet_module
from unziplora.lora.inject import attention_linears


def linears(unet):
    kinds = nn.Linear | nn.Conv2d
    return [name for name, module in unet.named_modules() if isinstance(module, kinds)]


def test_the_recorded_list_is_sdxl():
    unet = sdxl.unet()
    assert len(sdxl.recorded()) == 722
    assert {path: shape for _, path, shape in sdxl.recorded()} == {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in name
    }
    paths = [path for _, path, _ in sdxl.recorded()]
    attention = set(attention_linears(unet))
    assert len(attention & set(paths)) == 560
    assert sum(".ff.net." in path for path in paths) == 140
    assert sum(path.endswith(("proj_in", "proj_out")) for path in paths) == 22


def test_all_722_names_equal_the_recorded_ones():
    for kohya, path, _ in sdxl.recorded():
        assert to_kohya(path) == kohya
        assert unet_module(unflatten(kohya.removeprefix("lora_unet_"))) == path
        flat = to_kohya(path, "diffusers").removeprefix("lora_unet_")
        assert unet_module(unflatten(flat)) == path


@pytest.mark.parametrize("unet", [sdxl.unet(), tiny.unet()], ids=["full", "tiny"])
def test_sgm_names_of_all_weights_are_those_of_diffusers_checkpoint_converter(unet):
    """The converter of whole checkpoints knows sgm's names of every weight, convolutions and norms too."""
    names = list(dict(unet.named_parameters()))
    checkpoint = {}
    for index, name in enumerate(names):
        module, _, kind = name.rpartition(".")
        checkpoint[f"model.diffusion_model.{to_sgm(module)}.{kind}"] = torch.tensor(index)
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {name: int(index) for name, index in converted.items()} == {n: i for i, n in enumerate(names)}


def test_names_equal_those_of_diffusers_lora_reader():
    unet = sdxl.unet()
    paths = linears(unet)
    file = {}
    for index, path in enumerate(paths):
        for part in ("lora_down", "lora_up"):
            file[f"{to_kohya(path)}.{part}.weight"] = torch.tensor(index)
    mapped = _maybe_map_sgm_blocks_to_diffusers(file, unet.config)
    found, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    peft = convert_unet_state_dict_to_peft(found)
    assert {name: int(index) for name, index in peft.items() if "lora_A" in name} == {
        f"unet.{path}.lora_A.weight": index for index, path in enumerate(paths)
    }


def test_every_name_survives_a_round_trip():
    paths = linears(sdxl.unet())
    assert len(paths) == 794
    assert len({to_sgm(path) for path in paths}) == len(paths)
    for path in paths:
        assert from_sgm(to_sgm(path)) == path
        assert unflatten(path.replace(".", "_")) == path
        assert unflatten(to_sgm(path).replace(".", "_")) == to_sgm(path)


def test_blocks_have_the_sgm_names_of_the_literature():
    assert to_sgm("up_blocks.0.attentions.0.proj_in") == "output_blocks.0.1.proj_in"  # B-LoRA's content
    assert to_sgm("up_blocks.0.attentions.1.proj_in") == "output_blocks.1.1.proj_in"  # B-LoRA's style
    assert to_sgm("mid_block.attentions.0.proj_in") == "middle_block.1.proj_in"
    assert to_sgm("down_blocks.2.attentions.1.proj_in") == "input_blocks.8.1.proj_in"


def test_upsamplers_are_found_with_and_without_attention_before_them():
    assert from_sgm("output_blocks.2.1.conv") == from_sgm("output_blocks.2.2.conv")


def test_sgm_names_follow_the_layers_per_block():
    assert to_sgm("down_blocks.1.attentions.0.proj_in", layers=1) == "input_blocks.3.1.proj_in"
    for path in ("down_blocks.1.attentions.0.proj_in", "up_blocks.1.attentions.1.proj_out"):
        assert from_sgm(to_sgm(path, 1), 1) == path


@pytest.mark.parametrize(
    "name",
    ["", "down_blocks.1", "mid_block.attentions.0.to_q", "up_blocks.0.attentions.0.transformer_blocks.0.attn3.to_q"],
)
def test_names_of_no_module_are_refused(name):
    for function in (to_sgm, unet_module):
        with pytest.raises(ValueError, match="not a module"):
            function(name)


@pytest.mark.parametrize(
    "name", ["input_blocks.4", "input_blocks.x.1.proj_in", "middle_block.3.proj_in", "out.7", "a.b"]
)
def test_sgm_names_of_no_module_are_refused(name):
    with pytest.raises(ValueError, match="not a module"):
        from_sgm(name)


def test_a_flattened_name_with_other_letters_is_refused():
    with pytest.raises(ValueError, match="flattened"):
        unflatten("mid_block_ä")


def test_text_encoder_names():
    path = "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"
    kohya = "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"
    assert to_kohya(path) == kohya
    assert unflatten(kohya.removeprefix("lora_te2_")) == path.removeprefix("text_encoder_2.")
    assert text_module("encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"
    assert text_module("text_model.encoder.layers.0.self_attn.to_out").endswith("self_attn.out_proj")
    with pytest.raises(ValueError, match="not a module"):
        text_module("text_model.encoder.layers.0.mlp.fc3")
