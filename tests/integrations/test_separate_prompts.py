"""Node 2: three conditionings joined, and cross-attention in which each LoRA reads its own."""

import pytest
import torch
from pack import BLOCK, KEY, deltas
from pack import run_pair as run

from unziplora.errors import UserError

NAME = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.{}.forward"


@pytest.mark.parametrize("layer", ["to_k", "to_v"])
def test_each_lora_reads_its_own_prompt(nodes, model, clip, files, layer):
    patched = nodes.patches.separate_prompts(run(nodes, model, clip, dials=(0.5, -2.0))[0])
    full, content, style = (torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    weight = model.model.state_dict()[KEY.format(layer)]
    own = deltas(files)
    content_delta, style_delta = (own[kind][f"{BLOCK}.{layer}"] for kind in own)
    forward = patched.objects[NAME.format(layer)]
    expected = full @ weight.T + 0.5 * content @ content_delta.T - 2 * style @ style_delta.T
    torch.testing.assert_close(forward(torch.cat([full, content, style], dim=-1)), expected)
    one = full @ (weight + 0.5 * content_delta - 2 * style_delta).T
    torch.testing.assert_close(forward(full), one)  # one prompt is read by all
    assert KEY.format(layer) not in patched.patches


def test_other_layers_and_other_loras_stay_merged(nodes, model, clip, files):
    pair, *_ = run(nodes, model, clip)
    other = nodes.patches.comfy.lora.load_lora(
        {"k.lora_up.weight": torch.ones(6, 1), "k.lora_down.weight": torch.ones(1, 4)}, {"k": KEY.format("to_k")}
    )
    pair.add_patches(other, 0.25)
    before = pair.patches_uuid
    patched = nodes.patches.separate_prompts(pair)
    torch.testing.assert_close(patched.delta(KEY.format("to_k")), torch.full((6, 4), 0.25))
    torch.testing.assert_close(patched.delta(KEY.format("to_q")), pair.delta(KEY.format("to_q")))
    assert len(pair.patches[KEY.format("to_k")]) == 3
    assert patched.patches_uuid != before
    assert nodes.patches.separate_prompts(patched) is patched


def test_model_without_a_pair_is_refused(nodes, model):
    with pytest.raises(UserError, match="carries no pair: connect the MODEL output of 'unziplora pair'"):
        nodes.patches.separate_prompts(model)


def conditioning(width=4, tokens=7, parts=1, value=1.0):
    return [[torch.full((1, tokens, width), value + n), {"pooled_output": f"pooled {value}"}] for n in range(parts)]


def test_conditionings_are_joined_on_the_feature_axis(nodes):
    ((tokens, options),) = nodes.patches.join_conditioning(
        conditioning(value=1.0), conditioning(value=2.0, tokens=14), conditioning(value=3.0)
    )
    assert tokens.shape == (1, 14, 12)  # the shorter prompts are repeated
    assert tokens[0, 9].tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert options["pooled_output"] == "pooled 1.0"
    assert options["cross_attn_controlnet"].shape == (1, 7, 4)  # ControlNets read the full prompt


def test_each_part_of_the_full_prompt_is_joined(nodes):
    joined = nodes.patches.join_conditioning(conditioning(parts=2), conditioning(), conditioning())
    assert [tokens[0, 0].tolist() for tokens, _ in joined] == [[1.0] * 12, [2.0] * 4 + [1.0] * 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (conditioning(parts=2), "the content prompt has 2 parts and the full prompt 1: connect one text each"),
        ([], "the content prompt has 0 parts"),
        (conditioning(width=3), r"different widths \(4, 3, 4\): encode all by the CLIP of 'unziplora pair'"),
    ],
)
def test_conditionings_that_do_not_match_are_refused(nodes, content, message):
    with pytest.raises(UserError, match=message):
        nodes.patches.join_conditioning(conditioning(), content, conditioning())


def test_negative_prompt_is_for_all_by_default(nodes, model, clip, files):
    pair, *_ = run(nodes, model, clip)
    texts = [conditioning(value=float(number)) for number in range(4)]
    _, positive, negative = nodes.nodes.UnziploraSeparatePrompts.execute(pair, *texts).args
    assert positive[0][0][0, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert negative[0][0][0, 0].tolist() == [3.0] * 12
    *_, negative = nodes.nodes.UnziploraSeparatePrompts.execute(
        pair, *texts, style_negative=conditioning(value=9.0)
    ).args
    assert negative[0][0][0, 0].tolist() == [3.0] * 8 + [9.0] * 4
