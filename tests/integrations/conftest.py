"""The node pack on a stub of ComfyUI."""

import comfy_stub
import pack
import pytest
import torch
from pack import BLOCK, TEXT

from unziplora.formats.files import write_lora
from unziplora.formats.header import metadata_for
from unziplora.lora.weights import Lora

SETTINGS = {
    "token": "sks",
    "content": "cat",
    "style": "ink",
    "full_prompt": "a {token} {content} in {style} style",
    "content_prompt": "a {token} {content}",
    "style_prompt": "an image in {style} style",
}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return comfy_stub.State(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def nodes(state):
    """The pack; its modules are attributes, such as `nodes.patches`."""
    comfy_stub.install(state)
    yield pack.load_pack()
    pack.forget("comfy", "comfy_api", "folder_paths")


@pytest.fixture(scope="module")
def files(state):
    """A content LoRA and a style LoRA in ComfyUI's folder, by kind."""
    paths = {}
    for seed, kind in enumerate(("content", "style")):
        draw = torch.Generator().manual_seed(seed)
        shapes = {f"{BLOCK}.to_q": (6, 6), f"{BLOCK}.to_k": (4, 6), f"{BLOCK}.to_v": (4, 6)}
        modules = {
            path: (torch.randn(2, i, generator=draw), torch.randn(o, 2, generator=draw))
            for path, (i, o) in shapes.items()
        }
        text = {TEXT: (torch.randn(2, 3, generator=draw), torch.randn(3, 2, generator=draw))} if kind == "style" else {}
        trigger = {"content": "a sks cat", "style": "in ink style"}[kind]
        metadata = metadata_for(title=kind, trigger=trigger, method=f"UnZipLoRA, {kind} LoRA", settings=SETTINGS)
        paths[kind] = state.root / "loras" / f"cat-{kind}.safetensors"
        write_lora(Lora(modules, text=text), paths[kind], metadata=metadata, dtype="fp32")
    return paths


@pytest.fixture
def model():
    return comfy_stub.Patcher(comfy_stub.SDXL(comfy_stub.unet()))


@pytest.fixture
def clip():
    return comfy_stub.Patcher(comfy_stub.text_encoder())
