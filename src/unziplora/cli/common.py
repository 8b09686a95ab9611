"""Flags and helpers that several commands share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from unziplora.utils.progress import Callback, Progress


def json_option() -> click.Option:
    return click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON document.")


def quiet_option() -> click.Option:
    return click.Option(["--quiet", "-q"], is_flag=True, help="Show no progress and no warnings.")


def config_option() -> click.Option:
    return click.Option(["--config", "config_file"], metavar="FILE", help="TOML file with settings; flags win over it.")


def dry_run_option(does: str) -> click.Option:
    return click.Option(["--dry-run"], is_flag=True, help=f"Show all settings; {does}.")


def counted(view: Callback) -> Callable[[int, int], Any]:
    """A view of progress for jobs that tell steps done and steps in all; the speed is measured here."""
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        seconds = (time.perf_counter() - start) / done if done else 0.0
        view(Progress(done, total, seconds_per_step=seconds))

    return report
