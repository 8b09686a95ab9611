"""Block separation: the blocks of a base that belong to the content LoRA and to the style LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.utils.inputs import read_toml


@dataclass(frozen=True)
class BlockMap:
    """Blocks in which one of the two LoRAs trains all columns, such as `up_blocks.0.attentions.1`."""

    content: tuple[str, ...]
    style: tuple[str, ...]

    def owner(self, path: str) -> str | None:
        """Return `content` or `style` if the layer with this module path is in one of their blocks."""
        return next((name for name in KINDS if any(is_inside(path, block) for block in getattr(self, name))), None)


def is_inside(path: str, block: str) -> bool:
    """Return whether a module path is in a block; any beginning of a path up to a dot counts as a block."""
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

# The bundled base decides style in its last block alone (experiments/blocks.md).
BUNDLED_BLOCKS = BlockMap(content=("down_blocks", "mid_block", "up_blocks.0"), style=("up_blocks.1",))

# Another family of bases adds its maps here, and its levels to `_BLOCK_DEPTH` below.
BLOCK_MAPS = {"sdxl": SDXL_BLOCKS, "blora": BLORA_BLOCKS, "bundled": BUNDLED_BLOCKS}


def read_blocks(source: str) -> BlockMap:
    """Return a block map by name (`BLOCK_MAPS`), or read one from a TOML file with the lists `content` and `style`.

    Raises:
        UserError: the name is unknown, the file is missing or malformed, or a block or part of it is in both lists.
    """
    if source in BLOCK_MAPS:
        return BLOCK_MAPS[source]
    path = Path(source).expanduser()
    if not source.endswith(".toml") and not path.is_file():
        raise UserError(f"no block map {source!r}: there are {', '.join(BLOCK_MAPS)}, or give a TOML file")
    table = read_toml(path)
    if set(table) != set(KINDS):
        raise UserError(f"{source}: a block map has the two lists 'content' and 'style', not {sorted(table)}")
    for name, blocks in table.items():
        if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
            raise UserError(f"{source}: {name} must be a list of block names such as 'up_blocks.0.attentions.1'")
    both = [one for one in table["content"] for two in table["style"] if is_inside(one, two) or is_inside(two, one)]
    if both:
        raise UserError(f"{source}: {', '.join(sorted(set(both)))} cannot belong to both content and style")
    return BlockMap(tuple(table["content"]), tuple(table["style"]))


def check_blocks(blocks: BlockMap, paths: list[str]) -> None:
    """Check that every block of a map contains one of these layers.

    Raises:
        UserError: a block contains none; the message names it.
    """
    for block in (*blocks.content, *blocks.style):
        if not any(path.startswith(block + ".") for path in paths):
            raise UserError(
                f"block map: the LoRAs have no layers in {block!r}; the blocks of this base that have some are "
                f"{', '.join(dict.fromkeys(map(block_of, paths)))}"
            )


_BLOCK_DEPTH = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}


def block_of(path: str) -> str:
    """Return a module's block, such as `up_blocks.0.attentions.1`, or the path itself for a module outside blocks."""
    parts = path.split(".")
    return ".".join(parts[: _BLOCK_DEPTH.get(parts[0], len(parts))])
