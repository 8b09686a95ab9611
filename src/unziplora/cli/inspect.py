"""`unziplora inspect`, `convert` and `resize`: LoRA files of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unziplora.cli.options import ExpandedPath, json_option
from unziplora.cli.output import emit, stdout_to_stderr
from unziplora.errors import UnziploraError, UserError

if TYPE_CHECKING:
    from unziplora.formats.inspect import Inspection

_layout_option = click.option(
    "--layout",
    type=click.Choice(["kohya", "kohya-diffusers", "diffusers"]),
    default="kohya",
    show_default=True,
    help="Layout to write. kohya loads in ComfyUI, Forge, A1111, InvokeAI and diffusers; kohya-diffusers has kohya's "
    "names with diffusers' blocks; diffusers loads in diffusers only.",
)
_dtype_option = click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Number format to store.  [default: as it was]"
)
_force_option = click.option("--force", "-f", is_flag=True, help="Replace the output file if it exists.")


@click.command("inspect", short_help="List what LoRA files contain and which programs load them.")
@click.argument("files", nargs=-1, required=True, type=ExpandedPath(), metavar="FILE_OR_FOLDER...")
@json_option
def inspect_command(files: tuple[Path, ...], as_json: bool) -> None:
    """List what LoRA files contain and which programs load them.

    Layout, base, ranks, alphas, trigger words, the share of each block, metadata, and a verdict for
    ComfyUI, Forge, A1111, InvokeAI, sd-scripts and diffusers. Reads every layout; never opens pickled files.

    \b
      unziplora inspect runs/cat/cat-style.safetensors
      unziplora inspect ComfyUI/models/loras
    """
    with stdout_to_stderr():
        from unziplora.formats.inspect import inspect

        paths = [path for file in files for path in _loras(file)]
        results: list[Inspection | UnziploraError] = []
        for path in paths:
            try:
                results.append(inspect(path))
            except UnziploraError as error:  # a file that is not a LoRA must not hide the others
                if len(paths) == 1:
                    raise
                results.append(error)
    data = [
        {"path": str(path), "error": str(one)} if isinstance(one, UnziploraError) else one.model_dump(mode="json")
        for path, one in zip(paths, results, strict=True)
    ]
    text = "\n\n".join(str(one) for one in results)
    emit(data[0] if len(data) == 1 else {"files": data}, text, as_json)
    if codes := [one.exit_code for one in results if isinstance(one, UnziploraError)]:
        raise click.exceptions.Exit(max(codes))


def _loras(path: Path) -> list[Path]:
    """Return a file itself, or the LoRA files in a folder and its subfolders, except those of checkpoints."""
    if not path.is_dir():
        return [path]
    shown = [file for file in sorted(path.rglob("*.safetensors")) if not file.name.startswith(".")]
    files = [file for file in shown if "checkpoints" not in file.relative_to(path).parts]
    if not files:
        raise UserError(f"{path}: there is no .safetensors file in this folder")
    return files


@click.command("convert", short_help="Write a LoRA file in another layout.")
@click.argument("source", type=ExpandedPath())
@click.argument("target", type=ExpandedPath())
@_layout_option
@_dtype_option
@_force_option
@json_option
def convert_command(source: Path, target: Path, layout: str, dtype: str | None, force: bool, as_json: bool) -> None:
    """Write a LoRA file in another layout.

    A file that diffusers saved does nothing in most user interfaces; this makes it work there.
    Every update stays as it is, and so do the header's entries, but for those about the layout.

    \b
      unziplora convert pytorch_lora_weights.safetensors cat.safetensors
    """
    with stdout_to_stderr():
        from unziplora.formats.convert import convert

        lora = convert(source, target, layout, dtype=dtype, overwrite=force)
    size = target.stat().st_size
    result = {"path": str(target), "layout": layout, "modules": len(lora.modules), "bytes": size}
    emit(result, f"{target}  {layout} layout, {len(lora.modules)} modules, {size / 1e6:.1f} MB", as_json)


@click.command("resize", short_help="Make a LoRA file smaller.")
@click.argument("source", type=ExpandedPath())
@click.argument("target", type=ExpandedPath())
@click.option("--rank", type=int, help="Highest rank of a module; give this, --energy or both.")
@click.option("--energy", type=float, help="Share of each module's update to keep, 0 to 1.")
@_layout_option
@_dtype_option
@_force_option
@json_option
def resize_command(
    source: Path,
    target: Path,
    rank: int | None,
    energy: float | None,
    layout: str,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a LoRA file smaller: a lower rank, or as much of the update as you want to keep.

    Each module gets its best approximation (SVD).

    \b
      unziplora resize cat.safetensors cat-16.safetensors --rank 16
      unziplora resize cat.safetensors cat-small.safetensors --energy 0.95
    """
    with stdout_to_stderr():
        from unziplora.formats.convert import resize_file

        result = resize_file(source, target, rank, energy, layout, dtype, overwrite=force)
    low, high = min(result.ranks), max(result.ranks)
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    text = (
        f"{target}  {ranks}, {target.stat().st_size / 1e6:.1f} MB; {result.energy:.2%} of the update kept, "
        f"at least {result.worst:.2%} in each module (least in {result.worst_module})"
    )
    emit(result, text, as_json)
