"""`unziplora doctor` and `demo`: is this machine ready, and does it work?"""

from __future__ import annotations

import click

from unziplora.cli.common import json_option, quiet_option
from unziplora.cli.output import emit, stdout_kept
from unziplora.utils.progress import show


def run_doctor(online: bool, as_json: bool) -> None:
    """Carry out `doctor`."""
    with stdout_kept():
        from unziplora.doctor import examine

        report = examine(online=online)
    emit(report, lambda: str(report), as_json)
    if not report.ready:
        raise click.exceptions.Exit(1)


def run_demo(out: str, base: str, steps: int | None, as_json: bool, quiet: bool) -> None:
    """Carry out `demo`."""
    with stdout_kept(), show(quiet) as view:
        from unziplora.demo import demo

        result = demo(out, base=base, steps=steps, progress=view)
    emit(result, lambda: str(result), as_json)


doctor_command = click.Command(
    "doctor",
    callback=run_doctor,
    help="""Check whether this machine is ready, and say which settings fit it.

    Versions, devices, memory, disk, optional packages, the bundled base. Nothing is sent anywhere
    unless --online asks whether the model hub can be reached.

    \b
      unziplora doctor
    """,
    short_help="Check whether this machine is ready, and which settings fit it.",
    params=[
        click.Option(["--online"], is_flag=True, help="Also try to reach huggingface.co."),
        json_option(),
    ],
)

demo_command = click.Command(
    "demo",
    callback=run_demo,
    help="""Split the two pictures that ship with unziplora, on the small base that ships with it.

    Takes minutes on a laptop's CPU and ends with a strip of pictures: the input, its content alone, its style
    alone, both together, and the other picture's content in this style.

    \b
      unziplora demo --out runs/demo
    """,
    short_help="Split the pictures that ship with unziplora, on the small bundled base.",
    params=[
        click.Option(["--out"], default="runs/demo", show_default=True, help="Folder to create for both runs."),
        click.Option(["--base"], default="bundled", show_default=True, help="Another base to try it on."),
        click.Option(
            ["--steps"], type=click.IntRange(min=1), help="Fewer steps are faster and worse.  [default: the preset's]"
        ),
        json_option(),
        quiet_option(),
    ],
)
