"""The nodes in the real ComfyUI on the CPU, compared with ComfyUI's own loader and with `unziplora sample`.

Runs where COMFYUI_PATH names a checkout of ComfyUI and this Python has its requirements:

    COMFYUI_PATH=~/ComfyUI python -m pytest tests/integrations/test_real_comfyui.py
"""

import asyncio
import copy
import json
import logging
import math
import os
import sys

import pack
import pytest
import tiny
import torch

from unziplora.errors import UserError
from unziplora.formats.files import write_lora
from unziplora.formats.header import metadata_for
from unziplora.formats.sdxl import to_sgm
from unziplora.lora.inject import TARGETS, target_layers
from unziplora.lora.weights import Lora
from unziplora.models.base import load_base
from unziplora.models.sizes import FULL_SIZE
from unziplora.models.text import Prompts, embed, embed_negative, join_rows, time_ids
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, _ready, generate_latents
from unziplora.sampling.schedulers import make_scheduler

COMFYUI = os.environ.get("COMFYUI_PATH", "")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no checkout of ComfyUI")

# ComfyUI's UNet has 32 groups in every norm and 256 numbers per size, so the tiny base is widened.
WIDE = {
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 1, 2),
    "norm_num_groups": 32,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + tiny.WIDTHS[1],
}
UNET = {  # the same in ComfyUI's names
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 6 * 256 + tiny.WIDTHS[1],
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "use_linear_in_transformer": True,
    "context_dim": sum(tiny.WIDTHS),
    "num_head_channels": 64,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
PROMPTS = Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")
TEXT = [
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
]


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, with the pack's as `comfy.pack`."""
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models

    comfy.pack = pack.load_pack()
    yield comfy
    sys.path.remove(COMFYUI)
    pack.forget("comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "execution", "server")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "wide-xl"
    tiny.pipeline(**WIDE).save_pretrained(folder)
    return load_base(str(folder))


@pytest.fixture(scope="module")
def model(comfy, base):
    """ComfyUI's SDXL model with the weights of the base."""
    config = comfy.supported_models.SDXL(dict(UNET))
    model = config.get_model({}, "", torch.device("cpu"))
    names = comfy.utils.unet_to_diffusers(UNET)
    weights = {names[key]: value for key, value in base.unet.state_dict().items()}
    model.diffusion_model.load_state_dict(weights, strict=True)
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def clip(comfy):
    """ComfyUI's CLIP of SDXL, with small text encoders."""
    small = {"clip_l_model_config": CLIP, "clip_g_model_config": CLIP}

    class Target:
        params = {}  # noqa: RUF012
        clip = comfy.sdxl_clip.SDXLClipModel
        tokenizer = comfy.sdxl_clip.SDXLTokenizer

    return comfy.sd.CLIP(Target, model_options={**small, "dtype": torch.float32})


@pytest.fixture(scope="module")
def loras(base):
    """A content LoRA and a style LoRA on every kind of linear layer, with a part for the text encoders."""
    result = {}
    for seed, kind in enumerate(("content", "style")):
        draw = torch.Generator().manual_seed(seed)
        modules = tiny.random_lora(base.unet, seed, target_layers(base.unet, TARGETS))
        shapes = [(32, 32), (64, 32)]
        text = {
            path: (torch.randn(2, i, generator=draw), torch.randn(o, 2, generator=draw))
            for path, (o, i) in zip(TEXT, shapes, strict=True)
        }
        result[kind] = Lora(modules, text=text)
    return result


@pytest.fixture(scope="module")
def files(loras, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    words = {"token": "sks", "content": "cat", "style": "ink"}
    prompts = {"full_prompt": "a {token} {content} in {style} style", "content_prompt": "a {token} {content}"}
    settings = {**words, **prompts, "style_prompt": "an image in {style} style"}
    paths = {}
    for kind, lora in loras.items():
        metadata = metadata_for(title=kind, trigger=f"the {kind}", method=f"UnZipLoRA, {kind} LoRA", settings=settings)
        paths[kind] = folder / f"{kind}.safetensors"
        write_lora(lora, paths[kind], metadata=metadata, dtype="fp32")
    return paths


def pair(comfy, model, clip, files, content=0.9, style=-0.6, **options):
    sizes = comfy.pack.patches.check_model(model)
    blocks = options.pop("blocks", {})
    read = comfy.pack.pair.read_pair(
        files, {"content": content, "style": style}, blocks, options.pop("projection", 0), sizes
    )
    return comfy.pack.patches.apply_pair(model, clip, read)


def own_loader(comfy, model, clip, files, **strengths):
    for kind, file in files.items():
        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, strengths[kind], strengths[kind])
    return model, clip


def deltas(comfy, patcher):
    """The sum of all patches of each weight of a model."""
    state = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, torch.zeros_like(state[key]), key)
        for key, patches in patcher.patches.items()
    }


@pytest.mark.parametrize("layout", ["kohya", "kohya-diffusers"])
def test_every_key_of_a_full_size_export_loads(comfy, layout, tmp_path, caplog):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((FULL_SIZE / "unet" / "config.json").read_text()))
    state = {}
    for key, weight in unet.state_dict().items():
        path, _, end = key.rpartition(".")
        state[f"{_sgm(path)}.{end}"] = weight
    config = comfy.model_detection.model_config_from_unet(state, "")  # by shapes alone, as for a checkpoint
    assert type(config) is comfy.supported_models.SDXL
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model(state, "", torch.device("meta"))
    clip = comfy.sdxl_clip.SDXLClipModel(device=torch.device("meta"), dtype=torch.float16)

    paths = target_layers(unet, TARGETS)
    shapes = {path: tuple(unet.get_submodule(path).weight.shape) for path in paths}
    modules = {path: (torch.ones(1, i), torch.ones(o, 1)) for path, (o, i) in shapes.items()}
    encoders = {"text_encoder": (12, 768), "text_encoder_2": (32, 1280)}
    text = {
        f"{name}.text_model.encoder.layers.{layer}.self_attn.{part}": (torch.ones(1, width), torch.ones(width, 1))
        for name, (layers, width) in encoders.items()
        for layer in range(layers)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    write_lora(Lora(modules, text=text), tmp_path / "lora.safetensors", layout)
    tensors = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"), safe_load=True)
    keys = comfy.lora.model_lora_keys_unet(model, {})
    keys = comfy.lora.model_lora_keys_clip(clip, keys)
    with caplog.at_level(logging.WARNING):
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), keys)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage()]
    assert len(loaded) == len(modules) + len(text)
    weights = {**model.state_dict(), **clip.state_dict()}
    for key, adapter in loaded.items():
        up, down = adapter.weights[:2]
        assert (up.shape[0], down.shape[1]) == tuple(weights[key].shape)


def _sgm(path):
    return f"label_emb.0.{2 * int(path[-1]) - 2}" if path.startswith("add_embedding") else to_sgm(path)


def test_pair_equals_the_own_loader(comfy, model, clip, files):
    ours, our_clip = pair(comfy, model, clip, files)
    theirs, their_clip = own_loader(comfy, model, clip, files, content=0.9, style=-0.6)
    for one, two in ((ours, theirs), (our_clip.patcher, their_clip.patcher)):
        left, right = deltas(comfy, one), deltas(comfy, two)
        assert left.keys() == right.keys()
        assert left
        for key, delta in right.items():
            torch.testing.assert_close(left[key], delta, rtol=1e-5, atol=1e-6)


def predict(comfy, patcher, latents, sigma, tokens, pooled):
    """The noise that ComfyUI's model predicts, computed from its denoised latents."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    inner = patcher.model
    y = inner.encode_adm(width=tiny.SIDE, height=tiny.SIDE, pooled_output=pooled)
    with torch.no_grad():
        denoised = inner.apply_model(latents, torch.tensor([sigma]), c_crossattn=tokens, y=y)
    return (latents - denoised) / sigma


def conditioning(base, texts, embedding=embed):
    """ComfyUI's conditionings of some texts, encoded by our base."""
    rows = embedding(base, texts)
    return [
        [[rows.tokens[index : index + 1], {"pooled_output": rows.pooled[index : index + 1]}]]
        for index in range(len(texts))
    ]


def attached(base, loras, content=0.9, style=-0.6):
    named = [NamedLora(kind, Lora(lora.modules), {}, kind) for kind, lora in loras.items()]
    result = AttachedLoras(base, named)
    result.set_strengths(content=content, style=style)
    return result


def test_separate_prompts_equal_our_prediction(comfy, model, clip, base, loras, files):
    patches = comfy.pack.patches
    texts = [PROMPTS.full, PROMPTS.content, PROMPTS.style]
    joined = patches.join_conditioning(*conditioning(base, texts))
    tokens, pooled = joined[0][0], joined[0][1]["pooled_output"]
    alphas = base.scheduler.alphas_cumprod
    step = 500
    sigma = float(((1 - alphas[step]) / alphas[step]) ** 0.5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * sigma
    merged, _ = pair(comfy, model, clip, files)
    separate = patches.separate_prompts(merged)
    theirs = predict(comfy, separate, latents, sigma, tokens, pooled)
    one_prompt = predict(comfy, merged, latents, sigma, tokens[..., : sum(tiny.WIDTHS)], pooled)
    again = predict(comfy, separate, latents, sigma, tokens[..., : sum(tiny.WIDTHS)], pooled)
    plain = predict(comfy, model, latents, sigma, tokens[..., : sum(tiny.WIDTHS)], pooled)
    rows = join_rows(embed(base, texts))
    with torch.no_grad(), attached(base, loras), _ready(base, PROMPTS):
        added = {"text_embeds": rows.pooled, "time_ids": time_ids(tiny.SIDE, tiny.SIDE)}
        scaled = latents / (sigma**2 + 1) ** 0.5
        ours = base.unet(scaled, step, encoder_hidden_states=rows.tokens, added_cond_kwargs=added).sample
    print("prediction: largest difference", float((theirs - ours).abs().max()), "of", float(ours.abs().max()))
    print("prediction: separate and merged differ by", float((theirs - one_prompt).abs().max()))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, one_prompt, rtol=1e-4, atol=1e-4)  # one prompt is read by all
    assert (theirs - one_prompt).abs().max() > 1e-2
    assert (plain - one_prompt).abs().max() > 1e-2


def test_separate_prompts_equal_our_sampling(comfy, model, clip, base, loras, files):
    join = comfy.pack.patches.join_conditioning
    positive = join(*conditioning(base, [PROMPTS.full, PROMPTS.content, PROMPTS.style]))
    negative = join(*conditioning(base, ["", "", ""], embed_negative))
    separate = comfy.pack.patches.separate_prompts(pair(comfy, model, clip, files)[0])
    scheduler = make_scheduler(base, "euler")
    scheduler.set_timesteps(4)
    sigmas, first = scheduler.sigmas.clone(), float(scheduler.sigmas[0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    # diffusers begins with noise · √(σ² + 1), ComfyUI below its largest σ with noise · σ
    theirs = comfy.sample.sample_custom(
        separate,
        noise * math.sqrt(first**2 + 1) / first,
        3.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        torch.zeros(1, 4, 8, 8),
        disable_pbar=True,
        seed=7,
    )
    theirs = separate.model.process_latent_in(theirs)
    with attached(base, loras):
        ours = generate_latents(base, PROMPTS, [7], Settings(steps=4, guidance=3.0, scheduler="euler"))
    print("4 steps: largest difference", float((theirs - ours).abs().max()), "of", float(ours.abs().max()))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_other_loras_and_the_model_stay(comfy, model, clip, base, files):
    """A LoRA that another node merged stays merged, and the model is as before when the clone is not used."""
    other, _ = own_loader(comfy, model, clip, {"style": files["style"]}, style=0.5)
    ours, _ = pair(comfy, other, clip, files)
    separate = comfy.pack.patches.separate_prompts(ours)
    left, right = deltas(comfy, separate), deltas(comfy, other)
    crossed = [key for key in right if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert crossed
    for key in crossed:
        torch.testing.assert_close(left[key], right[key])
    assert model.get_attachment("unziplora") is None
    assert not model.patches


def test_foreign_models_and_loras_are_refused(comfy, model, clip, files, tmp_path):
    refiner = copy.copy(model)
    refiner.model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="load an SDXL"):
        comfy.pack.patches.check_model(refiner)
    with pytest.raises(UserError, match="carries no pair"):
        comfy.pack.patches.separate_prompts(model)
    write_lora(
        Lora({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(1, 8), torch.ones(8, 1))}),
        tmp_path / "small.safetensors",
    )
    with pytest.raises(UserError, match="does not fit this MODEL"):
        pair(comfy, model, clip, {"content": tmp_path / "small.safetensors"})


def test_schemas_are_valid_and_workflows_fit_them(comfy, monkeypatch):
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    for node in asyncio.run(asyncio.run(comfy.pack.comfy_entrypoint()).get_node_list()):
        node.GET_SCHEMA()
        nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node
    for file in sorted((pack.FOLDER / "example_workflows").glob("*.json")):
        check_workflow(json.loads(file.read_text("utf-8")), nodes.NODE_CLASS_MAPPINGS)


def check_workflow(workflow, classes):
    """Check that every node exists, and that links and widgets are those of its definition."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] == "Note":
            continue
        kind = classes[node["type"]]
        declared = kind.INPUT_TYPES()
        inputs = {**declared.get("required", {}), **declared.get("optional", {})}
        names = {entry["name"] for entry in node.get("inputs", [])}
        assert names <= inputs.keys(), (node["type"], names - inputs.keys())
        for entry in node.get("inputs", []):
            expected = inputs[entry["name"]][0]
            assert entry["type"] == (expected if isinstance(expected, str) else "COMBO"), (node["type"], entry)
        for name in declared.get("required", {}):
            if declared["required"][name][0] in ("MODEL", "CLIP", "CONDITIONING", "IMAGE", "LATENT", "VAE"):
                assert name in names
        assert [entry["type"] for entry in node.get("outputs", [])] == list(kind.RETURN_TYPES)
    for _, origin, slot, target, place, kind in workflow["links"]:
        assert by_id[origin]["outputs"][slot]["type"] == kind
        assert by_id[target]["inputs"][place]["type"] == kind


def test_covers_of_our_exports_are_shown(comfy, tmp_path):
    from app.model_manager import ModelFileManager
    from PIL import Image

    image = Image.new("RGB", (64, 48), "red")
    metadata = metadata_for(title="cat", trigger="a sks cat", thumbnail=image)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write_lora(Lora({path: (torch.ones(1, 8), torch.ones(8, 1))}), tmp_path / "cat.safetensors", metadata=metadata)
    (shown,) = ModelFileManager.get_model_previews(None, str(tmp_path / "cat.safetensors"))
    assert Image.open(shown).size == (64, 48)
