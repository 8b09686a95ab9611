"""Nodes for ComfyUI: a content LoRA and a style LoRA with two dials, a prompt for each, and a split from the graph."""

from importlib.util import find_spec

from comfy_api.latest import ComfyExtension, io

if find_spec("unziplora") is None:
    raise ImportError("unziplora is not installed in ComfyUI's Python: see the README of this node pack")

from .nodes import NODES


class UnziploraExtension(ComfyExtension):
    """The extension that ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return list(NODES)


async def comfy_entrypoint() -> UnziploraExtension:
    """Return the extension; ComfyUI calls this function by its name."""
    return UnziploraExtension()
