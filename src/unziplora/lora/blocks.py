"""Which blocks of the UNet belong to the content LoRA and which to the style LoRA (block separation)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unziplora.config.recipe import KINDS, read_toml
from unziplora.errors import UserError


@dataclass(frozen=True)
class BlockMap:
    """Blocks in which one LoRA trains all columns, as module paths such as `up_blocks.0.attentions.1`."""

    content: tuple[str, ...]
    style: tuple[str, ...]

    def owner(self, path: str) -> str | None:
        """`content` or `style`, if the layer at this module path lies in one of their blocks."""
        for name in KINDS:
            if any(is_inside(path, block) for block in getattr(self, name)):
                return name
        return None


def is_inside(path: str, block: str) -> bool:
    """Whether a module path lies in a block, or in another beginning of a path, at a dot."""
    return path == block or path.startswith(block + ".")


# arXiv 2412.04465, with B-LoRA's finding (arXiv 2403.14572) for up_blocks.0.
SDXL_BLOCKS = BlockMap(
    content=("up_blocks.0.attentions.0", "up_blocks.0.attentions.2"),
    style=(
        "up_blocks.0.attentions.1",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "up_blocks.1.attentions.2",
    ),
)

# arXiv 2403.14572, section 4: one block each.
BLORA_BLOCKS = BlockMap(content=("up_blocks.0.attentions.0",), style=("up_blocks.0.attentions.1",))

# The bundled base draws in its last block alone: a LoRA of everything else leaves every style as it is
# (experiments/blocks.md).
BUNDLED_BLOCKS = BlockMap(content=("down_blocks", "mid_block", "up_blocks.0"), style=("up_blocks.1",))

BLOCK_MAPS = {"sdxl": SDXL_BLOCKS, "blora": BLORA_BLOCKS, "bundled": BUNDLED_BLOCKS}


def read_blocks(source: str) -> BlockMap:
    """The block map of a name (`BLOCK_MAPS`), or one from a TOML file with the lists `content` and `style`.

    Raises:
        UserError: no such name, the file is missing or malformed, or a block, or a part of it, is listed for both.
    """
    if source in BLOCK_MAPS:
        return BLOCK_MAPS[source]
    path = Path(source).expanduser()
    if not source.endswith(".toml") and not path.is_file():
        raise UserError(f"no block map {source!r}: there are {', '.join(BLOCK_MAPS)}, or give a TOML file")
    table = read_toml(path)
    if set(table) != set(KINDS):
        raise UserError(f"{source}: a block map has the two lists 'content' and 'style', found {sorted(table)}")
    for name, blocks in table.items():
        if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
            raise UserError(f"{source}: {name} must be a list of block names such as 'up_blocks.0.attentions.1'")
    both = [one for one in table["content"] for two in table["style"] if is_inside(one, two) or is_inside(two, one)]
    if both:
        raise UserError(f"{source}: {', '.join(sorted(set(both)))} cannot belong to both content and style")
    return BlockMap(tuple(table["content"]), tuple(table["style"]))


def check_blocks(blocks: BlockMap, paths: list[str]) -> None:
    """Refuse a block map with a block that holds none of the adapted layers.

    Raises:
        UserError: names the first such block.
    """
    for block in (*blocks.content, *blocks.style):
        if not any(path.startswith(block + ".") for path in paths):
            raise UserError(f"block map: the base has no attention layers in {block!r}")


def block_of(path: str) -> str:
    """The block of a module path: `up_blocks.0.attentions.1`, `mid_block.attentions.0`, or the module itself."""
    parts = path.split(".")
    return ".".join(parts[: {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(parts[0], len(parts))])
