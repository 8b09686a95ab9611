"""Node 4: PNG text as `unziplora sample` writes it, and ComfyUI's own."""

import json
from types import SimpleNamespace

import pytest
import torch
from pack import run_pair as run
from PIL import Image

from unziplora.config.sample import SampleConfig
from unziplora.errors import UserError
from unziplora.models.text import Prompts
from unziplora.sampling.pipeline import Settings
from unziplora.sampling.prompts import plan_prompts
from unziplora.sampling.sample import describe
from unziplora.sampling.session import SamplingSession, shared_names
from unziplora.sampling.sources import find_loras

GRAPH = {"1": {"inputs": {"ckpt_name": "xl/sd_xl_base_1.0.safetensors"}}, "2": {"inputs": {"steps": 5}}}
VALUES = {"seed": 3, "steps": 5, "cfg": 4.0, "filename_prefix": "cat", "sampler": "euler", "negative": "blurry"}
PROMPTS = Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")


def save(nodes, monkeypatch, model, size=(8, 16), **more):
    node = nodes.nodes.UnziploraSaveRecipe
    monkeypatch.setattr(node, "hidden", SimpleNamespace(prompt=GRAPH, extra_pnginfo={"workflow": {"id": 1}}))
    texts = {"prompt": PROMPTS.full, "content_prompt": PROMPTS.content, "style_prompt": PROMPTS.style}
    (saved,) = node.execute(torch.zeros(1, size[1], size[0], 3), model, **{**texts, **VALUES, **more}).ui["images"]
    return saved["filename"]


def test_text_is_that_of_unziplora_sample(nodes, monkeypatch, model, clip, files, state):
    pair = run(nodes, model, clip, dials=(0.8, 1.2), content_blocks="mid_block=0.5")[0]
    name = save(nodes, monkeypatch, nodes.patches.separate_prompts(pair))
    config = SampleConfig(
        **files,
        prompts=[PROMPTS.full],
        mode="separate",
        negative="blurry",
        content_strength=0.8,
        style_strength=1.2,
        content_blocks=["mid_block=0.5"],
        steps=5,
        guidance=4.0,
        scheduler="euler",
        width=8,
        height=16,
    )
    sources = {kind: part.source for kind, part in nodes.patches.pair_of(pair).parts.items()}
    names = shared_names(source.file for source in sources.values())
    kinds = {kind: names[source.file] for kind, source in sources.items()}
    hashes = {kinds[kind]: source.header["sshs_model_hash"] for kind, source in sources.items()}
    base = SimpleNamespace(name="sd_xl_base_1.0")
    session = SamplingSession(base, None, [PROMPTS], Settings(guidance=4.0), hashes, kinds)
    with Image.open(state.root / "output" / name) as image:
        text = dict(image.text)
        assert image.size == (8, 16)
    assert text.pop("prompt") == json.dumps(GRAPH)
    assert text.pop("workflow") == '{"id": 1}'
    assert text == describe(config, session, PROMPTS, Image.new("RGB", (8, 16)), 3)
    assert plan_prompts(config, find_loras(config)) == [PROMPTS]


def test_one_prompt_for_both_is_mode_direct(nodes, monkeypatch, model, clip, files, state):
    name = save(nodes, monkeypatch, run(nodes, model, clip, projection=0.5)[0])
    with Image.open(state.root / "output" / name) as image:
        settings = json.loads(image.text["unziplora"])
    assert (settings["mode"], settings["content_prompt"], settings["projection"]) == ("direct", None, 0.5)


def test_an_image_that_was_cropped_or_enlarged_is_saved_with_its_size(nodes, monkeypatch, model, clip, files, state):
    name = save(nodes, monkeypatch, run(nodes, model, clip)[0], size=(1001, 9))
    with Image.open(state.root / "output" / name) as image:
        settings = json.loads(image.text["unziplora"])
    assert (settings["width"], settings["height"]) == (1001, 9)


def test_one_lora_with_a_prompt_of_its_own_is_saved_with_one_prompt(nodes, monkeypatch, model, clip, files, state):
    patched = nodes.patches.separate_prompts(run(nodes, model, clip, style="none")[0])
    name = save(nodes, monkeypatch, patched, style_prompt="")
    with Image.open(state.root / "output" / name) as image:
        settings = json.loads(image.text["unziplora"])
    assert (settings["mode"], settings["prompt"], settings["content_prompt"]) == ("direct", PROMPTS.full, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"prompt": " "}, "prompt is empty: connect the text"), ({"style_prompt": ""}, "the style prompt is empty")],
)
def test_missing_prompts_are_refused(nodes, monkeypatch, model, clip, files, more, message):
    patched = nodes.patches.separate_prompts(run(nodes, model, clip)[0])
    with pytest.raises(UserError, match=message):
        save(nodes, monkeypatch, patched, **more)


def test_graph_with_two_checkpoints_names_none(nodes):
    assert nodes.recipe.model_name({**GRAPH, "3": {"inputs": {"ckpt_name": "other.ckpt"}}}) == ""
    assert nodes.recipe.model_name(None) == ""
    assert nodes.recipe.model_name({"1": {"inputs": {"ckpt_name": ["5", 0]}}}) == ""
