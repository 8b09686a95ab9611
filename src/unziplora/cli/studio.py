"""`unziplora studio`: a web page on this machine where all of it is done."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from unziplora.cli.options import ExpandedPath, runs_option
from unziplora.cli.output import note
from unziplora.errors import MachineError, UserError


@click.command("studio", short_help="Open a web page where all of it is done.")
@runs_option
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="NAME",
    help="Address to listen at; another than this machine's own needs a password.  [default: 127.0.0.1]",
)
@click.option("--port", type=int, default=7860, metavar="N", help="Port; 0: any free one.  [default: 7860]")
@click.option(
    "--password-file",
    type=ExpandedPath(),
    metavar="FILE",
    help="File with the password; without it, another --host asks for one.",
)
@click.option("--worker/--no-worker", default=True, help="Start a worker when there is work and none runs.")
@click.option("--browser/--no-browser", default=True, help="Open the page in a browser.")
def studio_command(folder: Path, host: str, port: int, password_file: Path | None, worker: bool, browser: bool) -> None:
    """Open the studio: a web page on this machine for splitting, mixing and managing pictures and LoRAs.

    \b
      pip install 'unziplora[studio]'
      unziplora studio

    The page shows the runs folder and its queue, and owns nothing: close it, reload it, or open it twice.
    A worker process trains; it is started when there is work, unless an `unziplora worker` runs already.
    Ctrl-C stops both, after the current job has saved its step.
    """
    if find_spec("gradio") is None:
        raise UserError("the studio needs Gradio: pip install 'unziplora[studio]'")
    from unziplora.studio.safety import is_local

    local = is_local(host)
    password = _read_password(password_file) if password_file else None
    if not local and password is None:
        password = _ask_password()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from unziplora.studio.app import serve

    def ready(address: str) -> None:
        note(f"The studio is at {address}  (Ctrl-C stops it)")
        if browser and local:
            import webbrowser

            webbrowser.open(address)

    serve(folder.resolve(), host, port, password, worker, ready)


def _ask_password() -> str:
    try:
        return str(click.prompt("Password for the page", hide_input=True, confirmation_prompt=True, err=True))
    except click.Abort:
        if sys.stdin is not None and sys.stdin.isatty():
            raise
        raise UserError(
            "other machines need a password, and no terminal is here to ask for it: give --password-file"
        ) from None


def _read_password(file: Path) -> str:
    try:
        password = file.read_text("utf-8").strip()
    except OSError as error:
        raise MachineError(f"{file}: the password cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not text in UTF-8; write the password in one line") from None
    if not password:
        raise UserError(f"{file}: the password is empty; write it in one line")
    return password
