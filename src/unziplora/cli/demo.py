"""`unziplora demo`: split the images that ship with the package."""

from __future__ import annotations

from pathlib import Path

import click

from unziplora.cli.options import ExpandedPath, json_option, quiet_option
from unziplora.cli.output import emit, stdout_to_stderr
from unziplora.utils.progress import show


@click.command("demo", short_help="Split the images that ship with unziplora, on the small bundled base.")
@click.option(
    "--out", type=ExpandedPath(), default="runs/demo", show_default=True, help="Folder to create for both runs."
)
@click.option("--base", default="bundled", show_default=True, help="Another base to try it on.")
@click.option(
    "--steps", type=click.IntRange(min=1), help="Training steps; fewer give worse results.  [default: the preset's]"
)
@json_option
@quiet_option
def demo_command(out: Path, base: str, steps: int | None, as_json: bool, quiet: bool) -> None:
    """Split the two images that ship with unziplora, on the small base that ships with it.

    Takes minutes on a laptop's CPU and ends with a strip of images: the input, its content alone, its style
    alone, both together, and the other image's content in this style.

    \b
      unziplora demo --out runs/demo
    """
    with stdout_to_stderr(), show(quiet) as view:
        from unziplora.methods.unziplora.demo import demo

        result = demo(out, base=base, steps=steps, progress=view)
    emit(result, str(result), as_json)
