"""LoRAs in ComfyUI's models: merged by its own patches, and unmerged where each LoRA reads a prompt of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_base
from torch import Tensor
from torch.nn import functional as F

from unziplora.errors import UserError
from unziplora.formats.names import to_kohya
from unziplora.lora.layer import STREAMS
from unziplora.lora.weights import check_shape, wrong_base_error
from unziplora.models.text import join_streams

from .pair import Pair

ATTACHMENT = "unziplora"
"""Name under which a model carries its pair."""

Conditioning = list[list[Any]]
"""ComfyUI's CONDITIONING: pairs of token embeddings [1, tokens, D] and a dictionary of options."""


def check_model(model: Any) -> dict[str, int]:
    """Check that a MODEL is SDXL; return `layers_per_block` and `cross_attention_dim` of its UNet.

    Raises:
        UserError: it is of another family, or there is none.
    """
    if model is None:
        raise UserError("there is no MODEL: connect a loader of checkpoints")
    if not isinstance(model.model, comfy.model_base.SDXL):
        raise UserError(
            f"this MODEL is {type(model.model).__name__}, and the LoRAs are for SDXL: load an SDXL, Pony, Illustrious "
            "or NoobAI checkpoint"
        )
    config = model.model.model_config.unet_config
    blocks = config["num_res_blocks"]
    return {
        "layers_per_block": blocks if isinstance(blocks, int) else blocks[0],
        "cross_attention_dim": config["context_dim"],
    }


def apply_pair(model: Any, clip: Any, pair: Pair) -> tuple[Any, Any]:
    """Return clones of a model and of its text encoders with the LoRAs of a pair merged; the model carries the pair.

    Raises:
        UserError: a LoRA does not fit, or needs text encoders where there are none.
    """
    layers = check_model(model)["layers_per_block"]
    if clip is None and any(part.lora.text for part in pair.parts.values()):
        raise UserError("a LoRA changes the text encoders, and there is no CLIP: connect that of the checkpoint")
    model, clip = model.clone(), clip and clip.clone()
    unet_keys = comfy.lora.model_lora_keys_unet(model.model, {})
    text_keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip else {}
    shapes = {key: tuple(weight.shape) for key, weight in model.model.state_dict().items()}
    parts = {}
    for kind, part in pair.parts.items():
        source = part.source.file.name
        for path, factors in part.lora.modules.items():
            key = unet_keys.get(to_kohya(path, layers=layers))
            check_shape(part.lora, path, factors, shapes.get(key), source, "this MODEL")
        for path in part.lora.text:
            if to_kohya(path) not in text_keys:
                raise wrong_base_error(part.lora, source, "this CLIP", f"it has no {path}")
        patches = comfy.lora.load_lora(_tensors(part.lora.modules, layers), unet_keys)
        model.add_patches(patches, part.strength)
        if part.lora.text:
            clip.add_patches(comfy.lora.load_lora(_tensors(part.lora.text, layers), text_keys), part.strength)
        parts[kind] = replace(part, patches=patches)
    model.set_attachments(ATTACHMENT, replace(pair, parts=parts))
    return model, clip


def _tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], layers: int) -> dict[str, Tensor]:
    """Return pairs as the tensors of a file in kohya's names; without an alpha ComfyUI multiplies by 1."""
    tensors = {}
    for path, (down, up) in pairs.items():
        name = to_kohya(path, layers=layers)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors


def pair_of(model: Any) -> Pair:
    """Return the pair that a model carries.

    Raises:
        UserError: it carries none.
    """
    pair = model.get_attachment(ATTACHMENT)
    if pair is None:
        raise UserError("this MODEL carries no pair: connect the MODEL output of 'unziplora pair'")
    return pair


def separate_prompts(model: Any) -> Any:
    """Return a clone of a model in which the base and each LoRA of its pair read their own part of a joined prompt.

    The LoRAs' patches of K and V in cross-attention are taken out again. The forward functions of these layers split
    the conditioning (arXiv 2412.04465, section 3.2) and add B A x of each LoRA.

    Raises:
        UserError: the model is not SDXL, or carries no pair.
    """
    check_model(model)
    pair = pair_of(model)
    if pair.separate:
        return model
    model = model.clone()
    context = model.model.model_config.unet_config["context_dim"]
    for name, _ in model.model.diffusion_model.named_modules():
        if not name.endswith(("attn2.to_k", "attn2.to_v")):
            continue
        key = f"diffusion_model.{name}.weight"
        branches = []
        for kind, part in pair.parts.items():
            if key in part.patches:
                _remove_patch(model, key, part.patches[key])
                branches.append(_branch(STREAMS.index(kind), part.patches[key], part.strength))
        original = model.get_model_object(f"diffusion_model.{name}.forward")
        model.add_object_patch(f"diffusion_model.{name}.forward", SeparateForward(original, context, branches))
    model.add_patches({})  # gives the patches a new identity, so that ComfyUI merges them again
    model.set_attachments(ATTACHMENT, replace(pair, separate=True))
    return model


def _remove_patch(model: Any, key: str, adapter: Any) -> None:
    kept = [patch for patch in model.patches[key] if patch[1] is not adapter]
    if kept:
        model.patches[key] = kept
    else:
        del model.patches[key]


@dataclass
class Branch:
    """One LoRA of one layer: A [rank, in], B [out, rank] at its strength, and the index of the prompt that it reads."""

    stream: int
    down: Tensor
    up: Tensor


def _branch(stream: int, adapter: Any, strength: float) -> Branch:
    up, down = adapter.weights[:2]
    return Branch(stream, down, up * strength)


class SeparateForward:
    """The forward function of a linear layer that reads three prompts joined on the feature axis.

    An input of `features` features is one prompt, which all read.
    """

    def __init__(self, original: Callable[[Tensor], Tensor], features: int, branches: list[Branch]) -> None:
        self.original, self.features, self.branches = original, features, branches

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, n·in] to [B, T, out]."""
        streams = x.split(self.features, dim=-1)
        y = self.original(streams[0])
        for branch in self.branches:
            own = streams[branch.stream if len(streams) > 1 else 0]
            branch.down, branch.up = branch.down.to(own), branch.up.to(own)  # stays on the device from the first step
            y = y + F.linear(F.linear(own, branch.down), branch.up)
        return y


def join_conditioning(full: Conditioning, content: Conditioning, style: Conditioning) -> Conditioning:
    """Join the conditionings of three prompts; pooled embedding, areas and times are the full prompt's.

    ControlNets go on reading the full prompt alone.

    Raises:
        UserError: one is empty or not SDXL's, or the prompts have different numbers of parts.
    """
    for name, parts in (("content", content), ("style", style)):
        if len(parts) not in (1, len(full)) or not full:
            raise UserError(
                f"the {name} prompt has {len(parts)} parts and the full prompt {len(full)}: connect one text each, and "
                "combine or mask conditionings of the full prompt alone"
            )
    joined = []
    for index, (tokens, options) in enumerate(full):
        own = [parts[index if len(parts) > 1 else 0][0] for parts in (content, style)]
        if len({part.shape[-1] for part in (tokens, *own)}) > 1:
            widths = ", ".join(str(part.shape[-1]) for part in (tokens, *own))
            raise UserError(
                f"the three prompts have embeddings of different widths ({widths}): encode all by the CLIP of "
                "'unziplora pair'"
            )
        length = math.lcm(*(part.shape[1] for part in (tokens, *own)))
        # repeated tokens share their attention, so long prompts can be joined with short ones
        parts = [part.repeat(1, length // part.shape[1], 1) for part in (tokens, *own)]
        batch = max(part.shape[0] for part in parts)
        parts = [part.expand(batch, -1, -1) if part.shape[0] == 1 else part for part in parts]
        joined.append([join_streams(*parts), {**options, "cross_attn_controlnet": tokens}])
    return joined
