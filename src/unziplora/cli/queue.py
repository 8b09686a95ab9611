"""`unziplora queue`, `worker` and `runs`: jobs that wait, the process that does them, and what has become of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from unziplora.cli.command import RecipeCommand
from unziplora.cli.options import json_option, quiet_option, runs_option
from unziplora.cli.output import emit, note, stdout_to_stderr
from unziplora.cli.training import RUNS
from unziplora.config.training import TrainingConfig
from unziplora.errors import UserError
from unziplora.jobs.queue import FILE, Job, Queue
from unziplora.jobs.state import RunSummary, find_runs, read_failure
from unziplora.jobs.trainings import Trainer, check
from unziplora.jobs.worker import work
from unziplora.utils.files import absolute
from unziplora.utils.progress import show

SHOWN = 100
"""Jobs and runs that a list shows unless all are asked for."""


_all_option = click.option("--all", "-a", "everything", is_flag=True, help=f"Show more than the first {SHOWN}.")


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give --runs the folder that contains the runs")


def _figures(job: Job) -> dict[str, Any]:
    return {"job": job.number, "request": job.request, **RunSummary(job.run).as_dict(queued=True)}


def _table(rows: Sequence[dict[str, Any]], heads: Sequence[str]) -> str:
    """Align the figures of jobs or runs in columns."""
    cells = [list(heads), *([_cell(row, head) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(row: dict[str, Any], head: str) -> str:
    if head == "words":
        return ", ".join(row[name] for name in ("content", "style") if name in row)
    if head == "steps":
        return f"{row['steps_done']}/{'?' if row['steps'] is None else row['steps']}" if row["steps"] != 0 else ""
    if head == "changed":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(row["changed"])) if row["changed"] else ""
    if head == "run":
        return _short(Path(row["run"]))
    if head == "state" and row.get("request"):
        return f"{row['state']} ({row['request']})"
    return str(row[head])


def _short(path: Path) -> str:
    """Return a path as it is typed here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _report(jobs: Sequence[Job], done: str, as_json: bool) -> None:
    """Print the jobs that a command has changed."""
    data = {"jobs": [_figures(job) for job in jobs]} if as_json else {}
    emit(data, "\n".join(f"job {job.number}  {_short(job.run.path)}  {done}" for job in jobs), as_json)


@click.group("queue", short_help="Let trainings wait for a worker.")
def queue_command() -> None:
    """Let trainings wait for a worker; the queue is a file in the folder of the runs."""


@queue_command.command(
    "add",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Add a training or an unfinished run.",
)
@click.argument("what", nargs=-1, type=click.UNPROCESSED, metavar="WHAT...")
@runs_option
@click.option("--first", is_flag=True, help="Put it first.")
@click.option("--unfinished", is_flag=True, help="Add all unfinished runs of the folder.")
@json_option
def _add(what: tuple[str, ...], folder: Path, first: bool, unfinished: bool, as_json: bool) -> None:
    """Add a training to the queue.

    WHAT is the command that you would type after `unziplora`, or unfinished run folders.

    \b
      unziplora queue add split cat.jpg --content cat --style "pencil sketch" --out runs/cat
      unziplora queue add train dreambooth cat1.jpg cat2.jpg --content cat
      unziplora queue add runs/fox

    The run folder is created at once, with its settings. `unziplora worker` does the work.
    """
    queue, jobs = Queue(folder), []
    if not what and not unfinished:
        raise UserError("nothing to add: name a training such as `split cat.jpg --content cat`, or a run folder")
    if what and what[0] in ("split", "train", "zip"):
        with stdout_to_stderr():
            config, json_too = _recipe(what, folder)
            jobs, as_json = [queue.submit(check(config), first)], as_json or json_too
    elif what:
        jobs = queue.add(*what, first=first)
    if unfinished:
        jobs += queue.add_unfinished()
    _report(jobs, "added", as_json)


def _recipe(words: Sequence[str], folder: Path) -> tuple[TrainingConfig, bool]:
    """Resolve the command line of a training as that command would; return whether it has `--json` too.

    Args:
        folder: of the run, unless the command line names one.
    """
    from unziplora.cli import cli

    command: click.Command | None = cli
    ctx, rest = click.Context(cli, info_name="unziplora"), list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0) if rest else ""
        command = command.get_command(ctx, name)
    if not isinstance(command, RecipeCommand):
        raise UserError(f"{' '.join(words[:2])}: no training; see unziplora queue add --help")
    with command.make_context(name, rest, parent=ctx) as ctx:
        for flag in ("resume", "dry_run"):
            if ctx.params.get(flag):
                raise UserError(
                    f"--{flag.replace('_', '-')} does not go with a queue; unfinished runs are added by folder"
                )
        ctx.meta[RUNS] = folder
        return command.recipe(ctx), ctx.params["as_json"]


@queue_command.command("list")
@runs_option
@_all_option
@json_option
def _list(folder: Path, everything: bool, as_json: bool) -> None:
    """List the jobs in their order, with their states."""
    queue = Queue(folder)
    rows = [_figures(job) for job in queue.jobs(-1 if everything else SHOWN)]
    more = queue.count() - len(rows)
    text = _table(rows, ["job", "state", "steps", "run", "words"]) if rows else "The queue is empty."
    emit({"jobs": rows, "more": more}, text + (f"\n… and {more} more (--all)" if more > 0 else ""), as_json)


@queue_command.command("show")
@click.argument("job", metavar="JOB")
@runs_option
@json_option
def _show(job: str, folder: Path, as_json: bool) -> None:
    """Show a job; if it failed, with the reason and the end of its log."""
    found = Queue(folder).job(job)
    figures, failure = _figures(found), read_failure(found.run)
    if failure is not None:
        figures["log"] = failure.log
    lines = [f"{name:<10} {value}" for name, value in figures.items() if name not in ("changed", "log", "request")]
    log = ["", "The end of its log:", *(f"  {line}" for line in failure.log)] if failure and failure.log else []
    remedy = [f"Try again: unziplora queue retry {found.number}"] if figures["state"] == "failed" else []
    emit(figures, "\n".join([*lines, *log, *remedy]), as_json)


@queue_command.command("move")
@click.argument("job", metavar="JOB")
@click.option("--before", metavar="JOB", help="Job to move it before.  [default: the first]")
@runs_option
@json_option
def _move(job: str, before: str | None, folder: Path, as_json: bool) -> None:
    """Move a job to the front, or before another."""
    _report([Queue(folder).move(job, before)], f"before {before}" if before else "first", as_json)


def _add_change(action: str, done: str, help: str) -> None:
    """Add the command of a request to jobs."""

    @queue_command.command(action, help=help)
    @click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
    @runs_option
    @json_option
    def change(jobs: tuple[str, ...], folder: Path, as_json: bool) -> None:
        queue = Queue(folder)
        numbers = dict.fromkeys(queue.job(job).number for job in jobs)  # all of them exist, or nothing is done
        _report([getattr(queue, action)(number) for number in numbers], done, as_json)


_add_change("pause", "paused", "Let jobs wait until they are retried; a running one saves its step first.")
_add_change(
    "cancel",
    "canceled",
    "Take jobs out of the queue; a running one saves its step first, and runs that have begun stay.",
)
_add_change("retry", "waits again", "Let failed and paused jobs run again.")


@click.command("worker", short_help="Do the jobs of the queue, one after the other.")
@runs_option
@click.option("--until-empty", is_flag=True, help="Stop when no job is left, with exit code 1 if one failed.")
@json_option
@quiet_option
def worker_command(folder: Path, until_empty: bool, as_json: bool, quiet: bool) -> int:
    """Do the jobs of the queue, one after the other.

    The base stays loaded between jobs of the same base. A failed job does not stop the worker; Ctrl-C
    does, after the current job has saved its step. Start one worker for each GPU:

    \b
      CUDA_VISIBLE_DEVICES=0 unziplora worker
      CUDA_VISIBLE_DEVICES=1 unziplora worker
    """
    named = click.get_current_context().get_parameter_source("folder") is not ParameterSource.DEFAULT
    if named:  # a misspelled folder would wait for jobs forever
        _refuse_missing(folder)
    queue = Queue(folder)
    with stdout_to_stderr(), show(quiet) as progress:
        result = work(queue, Trainer(), progress, until_empty)
    lines = [f"finished  {path}" for path in result.finished]
    lines += [f"failed    {path}: {reason}" for path, reason in result.failed.items()]
    data = {"finished": result.finished, "failed": result.failed, "stopped": result.stopped}
    emit(data, "\n".join(lines) or "nothing to do", as_json)
    if result.stopped and not as_json:
        note("stopped; unfinished jobs go on with the next worker")
    return 130 if result.stopped else int(bool(result.failed))


@click.command("runs", short_help="List runs with their states, and find them by words.")
@click.argument("words", nargs=-1, metavar="[WORDS]...")
@runs_option
@_all_option
@json_option
def runs_command(words: tuple[str, ...], folder: Path, everything: bool, as_json: bool) -> None:
    """List runs with their states, the newest first.

    WORDS must all occur in a run's name, words, prompts or image names.
    """
    _refuse_missing(folder)
    runs = find_runs(folder, words)
    jobs = {job.run.path: job for job in Queue(folder).jobs()} if (folder / FILE).is_file() else {}
    rows = []
    for summary in runs if everything else runs[:SHOWN]:
        job = jobs.get(absolute(summary.run.path))
        rows.append(summary.as_dict(queued=job is not None) | ({"request": job.request} if job else {}))
    more = len(runs) - len(rows)
    text = _table(rows, ["state", "steps", "changed", "run", "words"]) if rows else "no runs"
    emit({"runs": rows, "more": more}, text + (f"\n… and {more} more (--all)" if more else ""), as_json)
