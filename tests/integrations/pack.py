"""The node pack in `integrations/comfyui`, imported as ComfyUI imports it: by its path, after ComfyUI's own modules."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from unziplora.formats.files import read_lora
from unziplora.lora.algebra import delta

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
NAME = "unziplora_nodes"

# The layers that the stub's models and the LoRAs of these tests have.
BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.{}.weight"
SIZES = {"layers_per_block": 2, "cross_attention_dim": 4}


def load_pack() -> ModuleType:
    """Import the pack; its modules are then attributes by their names, such as `pack.patches`."""
    spec = spec_from_file_location(NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    pack = sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(pack)
    for file in FOLDER.glob("*.py"):
        if file.stem != "__init__":
            import_module(f"{NAME}.{file.stem}")
    return pack


def forget(*roots: str) -> None:
    """Remove modules below some names, so that a later test imports others of the same names."""
    for name in list(sys.modules):
        if name.split(".")[0] in (*roots, NAME):
            del sys.modules[name]


def run_pair(
    nodes, model, clip, content="cat-content.safetensors", style="cat-style.safetensors", dials=(1, 1), **more
):
    """Run node 1 and return its outputs."""
    return nodes.nodes.UnziploraPair.execute(model, clip, content, dials[0], style, dials[1], **more).args


def deltas(files):
    """Return ΔW of each module of some LoRA files, by kind."""
    return {
        kind: {path: delta(pair) for path, pair in read_lora(file, SIZES).modules.items()}
        for kind, file in files.items()
    }
