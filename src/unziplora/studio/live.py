"""Live view of a run, read from its folder: state, figures, loss curve, failure, and sample sheets."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unziplora.config.recipe import Recipe, resolve
from unziplora.errors import UserError
from unziplora.jobs.state import LOG, RunSummary, find_runs, log_tail, read_failure
from unziplora.jobs.trainings import TRAININGS, training_of
from unziplora.runs.folder import RunFolder
from unziplora.studio import look
from unziplora.utils.inputs import read_json
from unziplora.utils.progress import duration

_MEMORY = re.compile(r"([\d.]+ [KMG]iB)$")
_STEP = re.compile(r"step (\d+)/(\d+)\b")

REMEDIES = (
    ("out of memory", "Choose the smaller settings that the message names, or close other programs, and try again."),
    ("disk is full", "Free some space on the disk, then press Continue: nothing is lost."),
    ("no such image", "Put the picture back where it was, then press Continue."),
)


def run_in(runs: Path, name: str | None) -> RunSummary | None:
    """Return the run of a name in the runs folder; None if there is none, wherever else the name may lead."""
    return next((summary for summary in find_runs(runs) if name and name_of(runs, summary) == name), None)


def name_of(runs: Path, summary: RunSummary) -> str:
    """Return the name of a run in the page: its folder, relative to the runs folder."""
    return summary.run.path.relative_to(runs).as_posix()


def current(summaries: Sequence[RunSummary]) -> RunSummary | None:
    """Return the run that is of most interest: one that is running, else the first."""
    running = (summary for summary in summaries if summary.state == "running")
    return next(running, summaries[0] if summaries else None)


def losses(run: RunFolder) -> list[float]:
    """Return the losses of the steps."""
    return [float(line["loss"]) for line in run.read_log() if isinstance(line.get("loss"), (int, float))]


def seconds_per_step(run: RunFolder, last: int = 20) -> float | None:
    """Return the mean duration of the last steps; None if there are none."""
    lines = run.read_log()[-last:]
    seconds = [float(line["seconds"]) for line in lines if isinstance(line.get("seconds"), (int, float))]
    return sum(seconds) / len(seconds) if seconds else None


def signature(summary: RunSummary, state: str) -> tuple[object, ...]:
    """Return what changes whenever the view of a run does."""
    run = summary.run
    sizes = tuple(file.stat().st_size if file.is_file() else 0 for file in (run.log_file, run.path / LOG))
    return (str(run.path), state, sizes, len(run.sheets))


def view(summary: RunSummary, state: str) -> str:
    """Return the live view of a run as HTML."""
    run = summary.run
    done, steps = progress_of(summary)
    parts = [f"<h2>{look.text(run.path.name)} {look.state_mark(state)}</h2>"]
    if words := ", ".join(summary.words.values()):
        parts.append(look.hint(words))
    if steps:
        parts.append(f'<progress value="{done}" max="{steps}" aria-label="steps done">{done} of {steps}</progress>')
    parts.append(look.figures(_figures(run, state, done, steps)))
    if state == "running" and (message := _activity(run)):
        parts.append(f'<p class="hint" role="status">{look.text(message)}</p>')
    parts.append(look.curve(losses(run), "loss"))
    if state == "finished":
        parts.append(check(run))
    if state == "failed":
        parts.append(failure(run))
    return f'<section class="run">{"".join(parts)}</section>'


def progress_of(summary: RunSummary) -> tuple[int, int]:
    """Return the steps done and all steps; those that learn the words of the style count while the log names them."""
    lines = summary.run.read_log()
    done = next((int(line["step"]) for line in reversed(lines) if "step" in line), 0)
    steps = summary.steps or 0
    counts = (match for line in reversed(log_tail(summary.run)) if (match := _STEP.match(line)))
    if steps and (count := next(counts, None)) and int(count[2]) > steps:
        seeds = summary.settings.get("seeds", 1)
        phase = (int(count[2]) - steps) // seeds  # each seed learns the words anew
        begun = -(-done * seeds // steps)
        return max(done + phase * begun, min(int(count[1]), done + phase * min(begun + 1, seeds))), int(count[2])
    return done, steps


def _figures(run: RunFolder, state: str, done: int, steps: int) -> list[tuple[str, str]]:
    loss, speed = losses(run), seconds_per_step(run)
    memory = next((match[1] for line in reversed(log_tail(run)) if (match := _MEMORY.search(line))), "")
    pairs = [("steps", f"{done} / {steps}" if steps else str(done))]
    if loss:
        pairs.append(("loss, mean of 20", f"{sum(loss[-20:]) / len(loss[-20:]):.4f}"))
    if speed:
        pairs.append(("per step", f"{speed:.2f} s"))
    if speed and state == "running" and steps > done:
        pairs.append(("left", duration((steps - done) * speed)))
    return [*pairs, ("memory", memory)]


def _activity(run: RunFolder) -> str:
    """Return what a running training does before its first step."""
    tail = [line for line in log_tail(run) if not line.startswith("checkpoint ")]
    if losses(run):
        return ""
    return (
        "Learning the words of the style." if tail and _STEP.match(tail[-1]) else (tail or ["Opening the model."])[-1]
    )


def check(run: RunFolder) -> str:
    """Return what the check of a finished run found, if there was one."""
    try:
        found = read_json(run.check_file)
    except (OSError, UserError):
        return ""
    lines = "".join(f"<li>{look.text(line)}</li>" for line in found.get("findings", []))
    return f"<h3>Did content and style come apart?</h3><ul>{lines}</ul>" if lines else ""


def failure(run: RunFolder) -> str:
    """Return the fault of a failed run, one remedy, and the last lines of its log."""
    fault = read_failure(run)
    if fault is None:
        return ""
    known = (remedy for mark, remedy in REMEDIES if mark in fault.message.lower())
    remedy = next(known, "Change what the message names in a new run from these settings, or try again.")
    log = "\n".join(fault.log)
    return (
        f'<div class="fault" role="alert">{look.text(fault.message)}</div><p><strong>What to do:</strong> '
        f"{look.text(remedy)}</p><details><summary>The last lines of its log</summary>"
        f'<pre class="log" tabindex="0">{look.text(log)}</pre></details>'
    )


def sheets(run: RunFolder) -> list[tuple[str, str]]:
    """Return the sample sheets with their steps, the first one first."""
    numbered = [(path, re.search(r"step(\d+)", path.stem)) for path in run.sheets]
    return [(str(path), f"step {int(step[1])}" if step else path.stem) for path, step in numbered]


def age(seconds: float) -> str:
    """Return the time since a moment in the largest unit that fits."""
    past = max(0.0, time.time() - seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if past >= length:
            return f"{int(past // length)} {unit} ago"
    return "just now"


def link(path: Path, label: str) -> str:
    """Return a link that downloads a file of the runs folder."""
    address = "gradio_api/file=" + quote(str(path))
    return f'<a href="{look.text(address)}" download="{look.text(path.name)}">{look.text(label)}</a>'


def set_keys(summary: RunSummary) -> tuple[str, dict[str, Any]]:
    """Return the method of a run and its settings that differ from what its recipe would choose by itself.

    Raises:
        UserError: the configuration belongs to no method.
    """
    training = training_of(summary.settings)
    method = next(name for name, other in TRAININGS.items() if other is training)
    return method, differing(training.recipe, summary.settings)


def differing(model: type[Recipe], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe would not choose by itself."""
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    basis = {name: settings[name] for name in settings if name in required or name in ("base", "preset")}
    plain = resolve(model, basis).model_dump(mode="json")
    return {name: value for name, value in settings.items() if name in basis or value != plain.get(name)}
