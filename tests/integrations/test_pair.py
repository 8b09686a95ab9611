"""Node 1: files, dials, blocks, projection and words; and the patches that ComfyUI merges."""

from operator import ne

import pytest
import torch
from comfy_stub import Patcher
from pack import BLOCK, KEY, SIZES, TEXT, deltas
from pack import run_pair as run

from unziplora.errors import UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.lora.algebra import delta, project
from unziplora.lora.weights import Lora


@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v"])
def test_weights_are_patched_by_their_dials(nodes, model, clip, files, layer):
    patched, text, *_ = run(nodes, model, clip, dials=(0.5, -2.0))
    own = deltas(files)
    path = f"{BLOCK}.{layer}"
    torch.testing.assert_close(patched.delta(KEY.format(layer)), 0.5 * own["content"][path] - 2 * own["style"][path])
    style = read_lora(files["style"], SIZES).text[TEXT]
    (key,) = text.patches
    assert key == "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(text.delta(key), -2 * delta(style))
    assert not model.patches
    assert not clip.patches


def test_blocks_are_scaled_before_the_dial(nodes, model, clip, files):
    patched, *_ = run(nodes, model, clip, dials=(2.0, 0.0), content_blocks=f"mid_block=0.5, {BLOCK}.to_k=0")
    own = deltas(files)["content"]
    torch.testing.assert_close(patched.delta(KEY.format("to_q")), own[f"{BLOCK}.to_q"])
    assert not patched.delta(KEY.format("to_k")).any()


def test_projection_keeps_the_content_away_from_the_style(nodes, model, clip, files):
    patched, *_ = run(nodes, model, clip, dials=(1.0, 0.0), projection=0.7)
    content, style = (read_lora(files[kind], SIZES).modules[f"{BLOCK}.to_q"] for kind in ("content", "style"))
    torch.testing.assert_close(patched.delta(KEY.format("to_q")), delta(project(content, style, 0.7, 0.9)))


def test_words_come_from_the_headers(nodes, model, clip, files):
    words = run(nodes, model, clip)[2:]
    assert words == ("a sks cat, in ink style", "a sks cat in ink style", "a sks cat", "an image in ink style")


def test_one_file_gives_its_own_words(nodes, model, clip, files):
    patched, _, triggers, full, content, style = run(nodes, model, clip, style="none")
    assert (triggers, full, content, style) == ("a sks cat", "a sks cat", "a sks cat", "")
    assert len(patched.patches[KEY.format("to_q")]) == 1


def test_files_without_words_leave_the_prompts_empty(nodes, model, clip, state):
    path = state.root / "loras" / "bare.safetensors"
    write_lora(Lora({f"{BLOCK}.to_q": (torch.ones(1, 6), torch.ones(6, 1))}, {"unziplora.version": "1"}), path)
    assert run(nodes, model, clip, content="bare.safetensors", style="none")[2:] == ("", "", "", "")
    path.unlink()


def test_one_file_without_words_leaves_the_common_prompt_empty(nodes, model, clip, files, state):
    path = state.root / "loras" / "bare.safetensors"
    write_lora(Lora({f"{BLOCK}.to_q": (torch.ones(1, 6), torch.ones(6, 1))}), path)
    assert run(nodes, model, clip, content="bare.safetensors")[3:] == ("", "", "an image in ink style")
    assert run(nodes, model, clip, style="bare.safetensors")[3:] == ("", "a sks cat", "")
    path.unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"content": "gone.safetensors"}, "not in ComfyUI's folder for loras; choose"),
        ({"content_blocks": "up_blocks.9=1"}, "has no modules in block 'up_blocks.9'"),
        ({"content_blocks": "mid_block"}, "content_blocks: 'mid_block': write block=strength"),
        ({"style": "none", "projection": 0.5}, "choose both files"),
    ],
)
def test_wrong_inputs_are_explained(nodes, model, clip, files, more, message):
    with pytest.raises(UserError, match=message):
        run(nodes, model, clip, **more)


def test_lora_of_another_shape_is_refused(nodes, model, clip, state):
    path = state.root / "loras" / "small.safetensors"
    write_lora(Lora({f"{BLOCK}.to_q": (torch.ones(1, 5), torch.ones(6, 1))}, {"unziplora.version": "1"}), path)
    with pytest.raises(UserError, match=r"small.safetensors does not fit this MODEL \(.*6×5 in the LoRA and 6×6"):
        run(nodes, model, clip, content="small.safetensors", style="none")
    path.unlink()


def test_model_of_another_family_is_refused(nodes, clip, files):
    with pytest.raises(UserError, match="this MODEL is Linear, and the LoRAs are for SDXL: load an SDXL"):
        run(nodes, Patcher(torch.nn.Linear(1, 1)), clip)


def test_a_checkpoint_without_text_encoders_takes_loras_without_text(nodes, model, files):
    patched, text, *_ = run(nodes, model, None, style="none")
    assert text is None
    assert patched.patches
    with pytest.raises(UserError, match="there is no CLIP: connect"):
        run(nodes, model, None)
    with pytest.raises(UserError, match="there is no MODEL: connect"):
        run(nodes, None, None)


def test_linked_files_have_a_fingerprint_that_does_not_change(nodes, files):
    linked = nodes.nodes.UnziploraPair.fingerprint_inputs(content=None, style=None)
    assert linked == nodes.nodes.UnziploraPair.fingerprint_inputs(content="none", style="none")


def test_files_of_a_split_connect_to_every_list_of_files_and_to_nothing_else(nodes):
    others = ["cat-content.safetensors", "cat-style.safetensors"], "COMBO", "STRING"
    differs = [ne(nodes.nodes._FILE.io_type, other) for other in others]  # as ComfyUI compares the types of a link
    assert differs == [False, False, True]


def test_changed_file_changes_the_fingerprint(nodes, files, state):
    import os

    names = {"content": "cat-content.safetensors", "style": "none"}
    before = nodes.nodes.UnziploraPair.fingerprint_inputs(**names)
    assert before == nodes.nodes.UnziploraPair.fingerprint_inputs(**names)
    os.utime(files["content"], (1, 1))
    assert before != nodes.nodes.UnziploraPair.fingerprint_inputs(**names)
