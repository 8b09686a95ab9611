"""The part of ComfyUI that the node pack uses, small enough to read: schemas, patches, folders, the stop button."""

import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn


@dataclass
class Socket:
    id: str
    options: dict
    kind: str


def socket_type(kind):
    def make(id="", **options):
        return Socket(id, options, kind)

    return SimpleNamespace(Input=make, Output=make)


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list
    outputs: list
    hidden: list = field(default_factory=list)
    is_output_node: bool = False

    def input(self, id):
        return next(one for one in self.inputs if one.id == id)


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


class ComfyNode:
    hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)


KINDS = ("Model", "Clip", "Image", "Conditioning", "Combo", "Float", "Int", "String", "Boolean")
IO = SimpleNamespace(
    Schema=Schema,
    NodeOutput=NodeOutput,
    ComfyNode=ComfyNode,
    Custom=socket_type,
    Hidden=SimpleNamespace(prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO"),
    **{kind: socket_type(kind.upper()) for kind in KINDS},
)


class SDXL(nn.Module):
    """ComfyUI's SDXL model around a UNet with sgm's names."""

    def __init__(self, unet, context=4):
        super().__init__()
        self.diffusion_model = unet
        self.model_config = SimpleNamespace(unet_config={"num_res_blocks": [2, 2, 2], "context_dim": context})


class Patcher:
    """ComfyUI's ModelPatcher: patches by the key of a weight, and objects that replace others."""

    def __init__(self, model):
        self.model, self.patches, self.objects, self.attachments, self.patches_uuid = model, {}, {}, {}, uuid.uuid4()

    def clone(self):
        copy = Patcher(self.model)
        copy.patches = {key: list(patches) for key, patches in self.patches.items()}
        copy.objects, copy.attachments, copy.patches_uuid = (
            dict(self.objects),
            dict(self.attachments),
            self.patches_uuid,
        )
        return copy

    @property
    def cond_stage_model(self):
        return self.model

    def add_patches(self, patches, strength=1.0):
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch, 1.0, None, None))
        self.patches_uuid = uuid.uuid4()

    def add_object_patch(self, name, value):
        self.objects[name] = value

    def get_model_object(self, name):
        value = self.model
        for part in name.split("."):
            value = getattr(value, part)
        return self.objects.get(name, value)

    def set_attachments(self, name, value):
        self.attachments[name] = value

    def get_attachment(self, name):
        return self.attachments.get(name)

    def delta(self, key):
        """Sum of the patches of a weight, as ComfyUI merges them."""
        return sum(
            strength * up @ down for strength, adapter, *_ in self.patches[key] for up, down in [adapter.weights[:2]]
        )


def unet_keys(model, keys):
    names = (name for name, _ in model.diffusion_model.named_parameters())
    return keys | {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": f"diffusion_model.{name}" for name in names
    }


def text_keys(model, keys):
    prefix = "clip_l.transformer."
    paths = (name.removesuffix(".weight") for name, _ in model.named_parameters())
    return keys | {f"lora_te1_{path.removeprefix(prefix).replace('.', '_')}": f"{path}.weight" for path in paths}


def load_lora(tensors, keys):
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    weights = {n: (tensors[f"{n}.lora_up.weight"], tensors[f"{n}.lora_down.weight"], None) for n in names}
    return {keys[name]: SimpleNamespace(weights=weights[name]) for name in names}


class Stopped(Exception):
    """ComfyUI's InterruptProcessingException."""


class State:
    """What the tests set and read: folders, the stop button, the bar."""

    def __init__(self, root: Path):
        self.root, self.stopped, self.unloaded, self.steps = root, False, 0, []
        for folder in ("loras", "checkpoints", "output"):
            (root / folder).mkdir()

    def files(self, folder):
        return sorted(str(path.relative_to(self.root / folder)) for path in (self.root / folder).rglob("*.safetensors"))

    def path(self, folder, name):
        path = self.root / folder / name
        return str(path) if path.is_file() else None

    def check(self):
        if self.stopped:
            raise Stopped

    def unload(self):
        self.unloaded += 1


def install(state: State) -> None:
    """Put the stub in the place of ComfyUI's modules."""

    def module(name, **values):
        made = sys.modules[name] = ModuleType(name)
        made.__dict__.update(values)
        if parent := name.rpartition(".")[0]:
            setattr(sys.modules[parent], name.rpartition(".")[2], made)

    module("comfy_api")
    module("comfy_api.latest", io=IO, ComfyExtension=object)
    module("comfy")
    module("comfy.model_base", SDXL=SDXL)
    module("comfy.lora", model_lora_keys_unet=unet_keys, model_lora_keys_clip=text_keys, load_lora=load_lora)
    module(
        "comfy.model_management",
        unload_all_models=state.unload,
        soft_empty_cache=lambda: None,
        throw_exception_if_processing_interrupted=state.check,
    )

    class ProgressBar:
        def __init__(self, total):
            pass

        def update_absolute(self, value, total):
            state.steps.append((value, total))

    module("comfy.utils", ProgressBar=ProgressBar)
    module(
        "folder_paths",
        get_filename_list=state.files,
        get_full_path=state.path,
        get_output_directory=lambda: str(state.root / "output"),
        get_folder_paths=lambda folder: [str(state.root / folder)],
        get_save_image_path=lambda prefix, out, width, height: (out, prefix, 1, "", prefix),
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(6, 6, bias=False), *(nn.Linear(4, 6, bias=False) for _ in range(2))


def unet() -> nn.Module:
    """The middle block of a UNet with sgm's names, with cross-attention alone."""
    torch.manual_seed(0)
    block = nn.Module()
    block.attn2 = Attention()
    transformer = nn.Module()
    transformer.transformer_blocks = nn.ModuleList([block])
    model = nn.Module()
    model.middle_block = nn.ModuleList([nn.Module(), transformer])
    return model


def text_encoder() -> nn.Module:
    """One layer of the first text encoder in ComfyUI's names."""
    root = module = nn.Module()
    for name in ("clip_l", "transformer", "text_model", "encoder", "layers", "0", "self_attn"):
        child = nn.Module()
        setattr(module, name, child)
        module = child
    module.q_proj = nn.Linear(3, 3, bias=False)
    return root
