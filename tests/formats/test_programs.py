"""Verdicts on programs, compared with diffusers' own loader on a tiny pipeline."""

import copy
import warnings

import pytest
import tiny
import torch
from lora_files import kohya, make, store
from peft.tuners.tuners_utils import BaseTunerLayer

from unziplora.formats.convert import convert
from unziplora.formats.files import LAYOUTS, write_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.programs import PROGRAMS
from unziplora.lora.algebra import delta
from unziplora.lora.weights import Lora
from unziplora.utils.logging import quiet

UNET = {
    "attention": ".attn1.to_",
    "feed-forward": ".ff.net.",
    "projections": ".proj_",
    "convolutions": ".conv1",
    "shortcuts": ".conv_shortcut",
    "resnets' embeddings": ".time_emb_proj",
    "samplers": "samplers.0.conv",
    "outer convolutions": "conv_in|conv_out",
    "time embedding": "time_embedding.",
    "added embedding": "add_embedding.",
}
TEXT = {
    "queries": "q_proj",
    "queries, keys, values": "q_proj|k_proj|v_proj",
    "outputs": "out_proj",
    "text attention": "q_proj|k_proj|v_proj|out_proj",
    "first mlp layer": "mlp.fc1",
    "mlp": "mlp.",
    "queries and mlp": "q_proj|mlp.",
    "all of the text encoder": "q_proj|k_proj|v_proj|out_proj|mlp.",
    "projection": "text_projection",
    "projection and outputs": "text_projection|out_proj",
    "projection and mlp": "text_projection|mlp.",
}
ENCODERS = {"first": ["text_encoder"], "second": ["text_encoder_2"]}


@pytest.fixture(scope="module")
def pipe():
    """A pipeline without adapters. Read only."""
    return tiny.pipeline()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def pair(module, rank=2):
    out, *inner = module.weight.shape
    return torch.randn(rank, *inner), torch.randn(out, rank, *[1] * len(inner[1:]))


def unet_part(pipe, ends):
    return {p: pair(m) for p, m in linears(pipe.unet).items() if any(end in p for end in ends.split("|"))}


def text_part(pipe, ends, encoders=("text_encoder", "text_encoder_2")):
    return {
        f"{encoder}.{path if path.startswith('text_') else f'text_model.{path}'}": pair(module)
        for encoder in encoders
        for path, module in linears(getattr(pipe, encoder)).items()
        if any(end in path for end in ends.split("|"))
    }


def loaded(pipe, path):
    """Load a file by diffusers; the ΔW of every module that has one then, by our name."""
    names = ("unet", "text_encoder", "text_encoder_2")
    parts = {**pipe.components, **{name: copy.deepcopy(getattr(pipe, name)) for name in names}}
    copied = type(pipe)(**parts, add_watermarker=False)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied.load_lora_weights(str(path), adapter_name="x")
    deltas = {}
    for name in names:
        for module, layer in getattr(copied, name).named_modules():
            if isinstance(layer, BaseTunerLayer) and "x" in layer.scaling:
                full = module if name == "unet" or module.startswith("text_") else f"text_model.{module}"
                key = full if name == "unet" else f"{name}.{full}"
                deltas[key] = layer.get_delta_weight("x").detach()
    return {key: value for key, value in deltas.items() if not value.is_meta}  # on the meta device: nothing was read


def outcome(pipe, path, lora):
    """What diffusers makes of a file: yes, partly or no, as a verdict says it."""
    try:
        deltas = loaded(pipe, path)
    except (ValueError, LookupError, TypeError, RuntimeError):
        return "no"
    pairs = {**lora.modules, **lora.text}
    right = [p for p in pairs if p in deltas and torch.allclose(deltas[p], delta(pairs[p]), atol=1e-3, rtol=1e-3)]
    return "yes" if len(right) == len(pairs) and len(deltas) == len(pairs) else "partly" if deltas else "no"


def check(pipe, path, lora):
    verdict = inspect(path).loads_in["diffusers"]
    assert verdict.answer == outcome(pipe, path, lora), verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", UNET)
def test_verdict_on_a_part_of_the_unet_is_that_of_diffusers(pipe, tmp_path, layout, part):
    lora = Lora(unet_part(pipe, UNET[part]))
    write_lora(lora, tmp_path / "a.safetensors", layout, dtype="fp32")
    check(pipe, tmp_path / "a.safetensors", lora)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[::2])
@pytest.mark.parametrize("encoders", ENCODERS)
@pytest.mark.parametrize("part", TEXT)
def test_verdict_on_a_part_of_the_text_encoders_is_that_of_diffusers(pipe, tmp_path, layout, encoders, part):
    text = text_part(pipe, TEXT[part], ENCODERS[encoders])
    if text:
        lora = Lora(unet_part(pipe, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), text=text)
        write_lora(lora, tmp_path / "a.safetensors", layout, dtype="fp32")
        check(pipe, tmp_path / "a.safetensors", lora)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_converted_file_loads_in_diffusers(pipe, tmp_path, source, target):
    lora = Lora(unet_part(pipe, "mid_block."), text=text_part(pipe, TEXT["all of the text encoder"]))
    write_lora(lora, tmp_path / "a.safetensors", source, dtype="fp32")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", target)
    assert inspect(tmp_path / "b.safetensors").loads_in["diffusers"].answer == "yes"
    check(pipe, tmp_path / "b.safetensors", lora)


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1."


@pytest.mark.parametrize(
    "names",
    [
        (f"{Q}to_q.lora_A.weight", f"{Q}to_q.lora_B.weight"),
        (f"{Q}to_q.lora_A.default.weight", f"{Q}to_q.lora_B.default.weight"),
        (f"{Q}to_q.lora.down.weight", f"{Q}to_q.lora.up.weight"),
        (f"{Q}processor.to_q_lora.down.weight", f"{Q}processor.to_q_lora.up.weight"),
        (f"{Q}to_q.lora_down.weight", f"{Q}to_q.lora_up.weight"),
        (f"{Q[5:]}to_q.lora_A.weight", f"{Q[5:]}to_q.lora_B.weight"),
    ],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize("more", [(), (f"{Q}to_q.alpha",), ("bundle_emb.cat.string_to_param.*",)], ids=" ".join)
def test_verdict_on_other_spellings_is_that_of_diffusers(pipe, tmp_path, names, more):
    path = Q[5:] + "to_q"
    lora = Lora({path: pair(pipe.unet.get_submodule(path))})
    tensors = dict(zip(names, lora.modules[path], strict=True))
    alpha = {name: torch.tensor(2.0) for name in more}
    verdict = inspect(store(tmp_path / "a.safetensors", {**tensors, **alpha})).loads_in["diffusers"]
    assert verdict.answer in (outcome(pipe, tmp_path / "a.safetensors", lora), "unknown"), verdict.reason


@pytest.mark.parametrize("part", ["attention", "feed-forward"])
def test_verdict_on_alphas_that_differ_is_that_of_diffusers(pipe, tmp_path, part):
    modules = unet_part(pipe, UNET[part])
    alphas = {path: float(1 + index % 2) for index, path in enumerate(modules)}
    path = store(tmp_path / "a.safetensors", kohya(Lora(modules), "diffusers", alpha=lambda path: alphas[path]))
    scaled = {path: (down, up * alphas[path] / 2) for path, (down, up) in modules.items()}
    assert inspect(path).loads_in["diffusers"].answer == "partly"
    assert outcome(pipe, path, Lora(scaled)) in ("partly", "yes")


def test_kohya_file_with_an_embedding_is_refused_by_diffusers(pipe, tmp_path):
    lora = make()
    path = store(tmp_path / "a.safetensors", {**kohya(lora), "bundle_emb.cat.string_to_param.*": torch.ones(2, 8)})
    check(pipe, path, lora)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_program_is_promised_for_numbers_that_are_none(tmp_path, value):
    tensors = kohya(make())
    next(iter(tensors.values()))[0, 0] = value
    verdicts = inspect(store(tmp_path / "a.safetensors", tensors)).loads_in
    assert {name: verdict.answer for name, verdict in verdicts.items()} == dict.fromkeys(PROGRAMS, "no")
    assert all("NaN" in verdict.reason for verdict in verdicts.values())
