"""`unziplora inspect`, `convert` and `resize`: LoRA files of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unziplora.cli.options import json_option
from unziplora.cli.output import emit, stdout_kept
from unziplora.errors import UserError

if TYPE_CHECKING:
    from unziplora.formats.inspect import Inspection

_LAYOUT = click.Option(
    ["--layout"],
    type=click.Choice(["kohya", "kohya-diffusers", "diffusers"]),
    default="kohya",
    show_default=True,
    help="Layout to write: kohya loads in ComfyUI, Forge, A1111, InvokeAI, diffusers; kohya-diffusers has kohya's "
    "names with diffusers' blocks; diffusers loads in diffusers alone.",
)
_DTYPE = click.Option(
    ["--dtype"], type=click.Choice(["fp32", "fp16", "bf16"]), help="Number format to store.  [default: as it was]"
)
_FORCE = click.Option(["--force", "-f"], is_flag=True, help="Replace the output file if it exists.")


def run_inspect(files: tuple[str, ...], as_json: bool) -> None:
    """Carry out `inspect`."""
    with stdout_kept():
        from unziplora.formats.inspect import inspect

        paths = [path for file in files for path in _loras(Path(file))]
        found: list[Inspection | UserError] = []
        for path in paths:
            try:
                found.append(inspect(path))
            except UserError as error:  # one file that is no LoRA must not hide the others
                if len(paths) == 1:
                    raise
                found.append(error)
    told = [
        {"path": str(path), "error": str(one)} if isinstance(one, UserError) else one.model_dump(mode="json")
        for path, one in zip(paths, found, strict=True)
    ]
    text = "\n\n".join(str(one) for one in found)
    emit(told[0] if len(told) == 1 else {"files": told}, text, as_json)
    if any(isinstance(one, UserError) for one in found):
        raise click.exceptions.Exit(UserError.exit_code)


def _loras(path: Path) -> list[Path]:
    """A file, or the LoRAs of a run folder or of any other."""
    return (sorted(path.glob("*.safetensors")) if path.is_dir() else []) or [path]


def run_convert(source: str, target: str, layout: str, dtype: str | None, force: bool, as_json: bool) -> None:
    """Carry out `convert`."""
    with stdout_kept():
        from unziplora.formats.inspect import convert

        lora = convert(source, target, layout, dtype=dtype, overwrite=force)
    size = Path(target).stat().st_size
    result = {"path": target, "layout": layout, "modules": len(lora.modules), "bytes": size}
    emit(result, f"{target}  {layout} layout, {len(lora.modules)} modules, {size / 1e6:.1f} MB", as_json)


def run_resize(
    source: str,
    target: str,
    rank: int | None,
    energy: float | None,
    layout: str,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Carry out `resize`."""
    if rank is None and energy is None:
        raise UserError("say to what to resize: --rank 16, or --energy 0.95")
    with stdout_kept():
        from unziplora.formats.inspect import resize_file

        done = resize_file(source, target, rank, energy, layout, dtype, overwrite=force)
    low, high = min(done.ranks), max(done.ranks)
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    text = (
        f"{target}  {ranks}, {Path(target).stat().st_size / 1e6:.1f} MB; {done.energy:.2%} of the update kept, "
        f"at least {done.worst:.2%} in each module (least in {done.worst_module})"
    )
    emit(done, text, as_json)


inspect_command = click.Command(
    "inspect",
    callback=run_inspect,
    help="""Say what LoRA files hold and which programs load them.

    Layout, base, ranks, alphas, trigger words, the share of each block, metadata, and a verdict for
    ComfyUI, Forge, A1111, InvokeAI, sd-scripts and diffusers. Reads every layout; never opens pickled files.

    \b
      unziplora inspect runs/cat/style.safetensors
      unziplora inspect ComfyUI/models/loras
    """,
    short_help="Say what LoRA files hold and which programs load them.",
    params=[click.Argument(["files"], nargs=-1, required=True, metavar="FILE_OR_FOLDER..."), json_option()],
)

convert_command = click.Command(
    "convert",
    callback=run_convert,
    help="""Write a LoRA file in another layout.

    A file that diffusers saved does nothing in most user interfaces; this makes it work there.
    Every update and the metadata stay as they are.

    \b
      unziplora convert pytorch_lora_weights.safetensors cat.safetensors
    """,
    short_help="Write a LoRA file in another layout.",
    params=[
        click.Argument(["source"]),
        click.Argument(["target"]),
        _LAYOUT,
        _DTYPE,
        _FORCE,
        json_option(),
    ],
)

resize_command = click.Command(
    "resize",
    callback=run_resize,
    help="""Make a LoRA file smaller: a lower rank, or as much of the update as you want to keep.

    Each module gets its best approximation (SVD).

    \b
      unziplora resize cat.safetensors cat-16.safetensors --rank 16
      unziplora resize cat.safetensors cat-small.safetensors --energy 0.95
    """,
    short_help="Make a LoRA file smaller.",
    params=[
        click.Argument(["source"]),
        click.Argument(["target"]),
        click.Option(["--rank"], type=int, help="Highest rank of a module; give this, --energy or both."),
        click.Option(["--energy"], type=float, help="Share of each module's update to keep, 0 to 1."),
        _LAYOUT,
        _DTYPE,
        _FORCE,
        json_option(),
    ],
)
