"""The `unziplora` command. Torch and diffusers are imported inside commands, so that `--help` is instant."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper

import click

from unziplora.cli.output import debugging, note, report_error, warnings_shown
from unziplora.errors import UserError, first_line
from unziplora.utils.streams import steady_output

COMMANDS = {
    "split": "unziplora.cli.split",
    "train": "unziplora.cli.train",
    "zip": "unziplora.cli.zip",
    "sample": "unziplora.cli.sample",
    "grid": "unziplora.cli.sample",
    "blocks": "unziplora.cli.blocks",
    "bench": "unziplora.cli.bench",
    "trial": "unziplora.cli.trial",
    "inspect": "unziplora.cli.inspect",
    "convert": "unziplora.cli.inspect",
    "resize": "unziplora.cli.inspect",
    "batch": "unziplora.cli.batch",
    "queue": "unziplora.cli.queue",
    "worker": "unziplora.cli.queue",
    "runs": "unziplora.cli.queue",
    "studio": "unziplora.cli.studio",
    "doctor": "unziplora.cli.doctor",
    "demo": "unziplora.cli.demo",
}
"""Module of each command, in the order of the help; only the command that runs is imported."""

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables that libraries read when they are imported; values that are already set win."""

# torch's threads wait for each other thousands of times a step. Waiting actively for long, they keep other processes,
# and with them each other, from the cores. Not at all, they sleep and wake all the time (experiments/cpu-time.md).
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


class Group(click.Group):
    """Commands that are imported when they are named; a mistyped name brings a suggestion."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return getattr(import_module(COMMANDS[name]), f"{name}_command") if name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command {name!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command explains itself with an example: unziplora split --help",
)
@click.version_option(None, "--version", "-V", package_name="unziplora", message="%(prog)s %(version)s")
def cli() -> None:
    """Split one image into a content LoRA and a style LoRA for SDXL.

    \b
    Is this machine ready?        unziplora doctor
    See it work on a small base:  unziplora demo
    Your own image:               unziplora split cat.jpg --content cat --style "pencil sketch"
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 machine fault, 2 wrong request, 130 interrupted."""
    threads = {} if "OMP_WAIT_POLICY" in os.environ else THREADS
    for name, value in {**threads, **({} if debugging() else QUIET)}.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a letter that a code page lacks must not make the command fail
            stream.reconfigure(errors="backslashreplace")
    with steady_output() as out:
        code = _run(argv)
        out.flush()
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            note(f"error: the result cannot be written to stdout ({first_line(out.error)})")
        return code or int(out.error is not None)


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    try:
        _check_encoding(args)
        with warnings_shown(quiet="--quiet" in args or "-q" in args):
            # click reads the words of this process itself: on Windows, whose shells do not, it expands * and ?
            code = cli.main(argv and args, prog_name="unziplora", standalone_mode=False)
            return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        note(error.format_message())
        return 2
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        where = f" (see {ctx.command_path} --help)" if ctx else ""
        return report_error(UserError(error.format_message().rstrip(".") + where), as_json)
    except (KeyboardInterrupt, click.Abort):
        return report_error(KeyboardInterrupt(), as_json)
    except Exception as error:
        fault = _path_fault(error)
        if debugging() and fault is error:
            raise
        return report_error(fault, as_json)


def _check_encoding(args: Sequence[str]) -> None:
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(f"{ascii(arg)[1:-1]}: this name is not valid text; rename the file") from None


def _path_fault(error: Exception) -> Exception:
    """Return a UserError for a path that no system could open, which any command may meet; else the error itself."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(error.filename)[:40]}…: too long for a file name")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return UserError("a path begins with ~ and a name that no user of this machine has")
    return error
