"""Tab Runs: all runs with their pictures, what can be done with each, and the queue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from unziplora.errors import UnziploraError, UserError
from unziplora.images.colors import to_rgb
from unziplora.images.files import open_upright
from unziplora.jobs.queue import Job, Queue
from unziplora.jobs.state import RunSummary, find_runs
from unziplora.studio import actions, libraries, live, look
from unziplora.studio.events import Follower, quietly, shown
from unziplora.studio.forms import copy_panel
from unziplora.studio.spelling import spell
from unziplora.studio.watch import Watch, watch
from unziplora.studio.workers import Workers
from unziplora.utils.files import absolute, write_png

LAYOUTS = (("ComfyUI, Forge, A1111, InvokeAI (kohya)", "kohya"), ("diffusers", "diffusers"),
           ("kohya names, diffusers blocks", "kohya-diffusers"))  # fmt: skip
SHOWN = 60
"""Runs in the gallery; words find the others."""

_SIDE = 256
_EMPTY = look.empty("No runs yet", "Start one in the tab Split.")
_NO_JOBS = look.empty("Nothing waits", "Runs that you start stand here until they are done.")


def tab(runs: Path, cache: Path, workers: Workers, follower: Follower, reuse: Callable[..., tuple[Any, Any]]) -> Watch:
    """Make the tab; return the view of the chosen run.

    Args:
        reuse: returns a handler that fills the form of the tab Split with the settings of a run, and its outputs.
    """
    search = gr.Textbox(label="Find", placeholder="words of the name, the subject, the style or the prompts")
    nothing = gr.HTML(_EMPTY)
    gallery = gr.Gallery(
        label="Runs, the newest first", columns=5, fit_columns=False, height="auto", allow_preview=False,
        object_fit="cover", buttons=[], interactive=False, visible=False, elem_id="runs",
    )  # fmt: skip
    chosen = watch(runs, workers, "chosen")
    with gr.Column(visible=False) as details:
        about = gr.HTML()
        _actions(runs, workers, chosen, reuse)
        _compare(runs, chosen)
        _settings(runs, chosen)
    _trash(runs, chosen)
    gr.HTML("<h2>Queue</h2>")
    _queue(runs, workers, follower, chosen, reuse)

    def list_runs(words: str | None, seen: Any) -> tuple[Any, Any, Any]:
        jobs, found = actions.jobs(runs), find_runs(runs, (words or "").split())[:SHOWN]
        tiles = [(thumbnail(cache, one), caption(runs, one, jobs.get(absolute(one.run.path)))) for one in found]
        sign = [list(tile) for tile in tiles]
        if sign == seen:
            return gr.skip(), gr.skip(), gr.skip()
        return gr.update(value=tiles, visible=bool(tiles)), gr.update(visible=not tiles), sign

    def describe(name: str | None, seen: str | None) -> tuple[Any, ...]:
        html = description(live.run_in(runs, name))
        return (gr.skip(),) * 3 if html == seen else (html, gr.update(visible=bool(html)), html)

    def pick(event: gr.SelectData) -> tuple[Any, ...]:
        return chosen.choose(str(event.value["caption"]).partition(" · ")[0])

    tiles_seen, about_seen = gr.State(None), gr.State(None)
    for event, function, inputs, outputs in (
        (search.change, list_runs, [search, tiles_seen], [gallery, nothing, tiles_seen]),
        (chosen.choice.change, describe, [chosen.choice, about_seen], [about, details, about_seen]),
    ):
        event(function, inputs, outputs, show_progress="hidden")
        follower.add(function, inputs, outputs)
    gallery.select(shown(pick), None, chosen.outputs, show_progress="hidden")
    return chosen


def caption(runs: Path, summary: RunSummary, job: Job | None) -> str:
    """Return the caption of a run in the gallery; it begins with the run's name."""
    state = actions.state(summary.run, job)
    return " · ".join([live.name_of(runs, summary), state, *summary.words.values(), live.age(summary.changed)])


def thumbnail(cache: Path, summary: RunSummary) -> str:
    """Return the file of a small picture of a run: its first image, else its last sheet, else an empty tile."""
    sources = [*summary.images[:1], *summary.run.sheets[-1:]]
    source = next((file for file in sources if file.is_file()), None)
    stamp = f"{source} {source.stat().st_mtime_ns}" if source else "empty"
    file = cache / "thumbnails" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.png"
    if not file.is_file():
        image = Image.new("RGB", (_SIDE, _SIDE), "#d6d3d1")
        if source is not None:
            with suppress(UnziploraError):  # the tile stays empty; opening the run says why
                image = open_upright(source, _SIDE, to_rgb)[0]
        image.thumbnail((_SIDE, _SIDE))
        write_png(file, image)
    return str(file)


def description(summary: RunSummary | None) -> str:
    """Return the files and main settings of a run as HTML."""
    if summary is None:
        return ""
    run, settings = summary.run, summary.settings
    files = [
        live.link(file, f"{title} ({layout})")
        for name, title in (("content", "content LoRA"), ("style", "style LoRA"), ("lora", "LoRA"))
        for _, layout in LAYOUTS
        if (file := run.lora(name, layout)).is_file()
    ]
    names = ("base", "preset", "rank", "steps", "seed", "resolution")
    pairs = [(name, settings[name]) for name in names if settings.get(name) is not None]
    links = f'<p class="downloads">{"".join(files)}</p>' if files else ""
    return links + look.facts([*pairs, ("changed", live.age(summary.changed))])


def _run(runs: Path, name: str) -> RunSummary:
    summary = live.run_in(runs, name)
    if summary is None:
        raise UserError("this run is not there any more; choose another one")
    return summary


def _actions(runs: Path, workers: Workers, chosen: Watch, reuse: Callable[..., tuple[Any, Any]]) -> None:
    """Make the buttons that do something with the chosen run."""
    with gr.Row(elem_classes="bar"):
        again = gr.Button("New run from these settings", min_width=180, elem_id="reuse")
        twice = gr.Button("Run it again", min_width=110)
        trash = gr.Button("Move to trash", min_width=110, variant="stop", elem_id="trash")
    with gr.Accordion("Train on, rename, other file formats", open=False):
        with gr.Row(elem_classes="bar"):
            steps = gr.Number(100, label="More steps for a finished run", precision=0, minimum=1, min_width=180)
            more = gr.Button("Train on", min_width=110, elem_id="extend")
        with gr.Row(elem_classes="bar"):
            name = gr.Textbox(label="New name", min_width=180)
            rename = gr.Button("Rename", min_width=110)
        with gr.Row(elem_classes="bar"):
            layout = gr.Dropdown(list(LAYOUTS), value="diffusers", label="File format", min_width=180)
            write = gr.Button("Write both LoRAs in it", min_width=110, elem_id="write")

    def extend(run: str, count: float) -> Any:
        actions.extend(runs, _run(runs, run).run, int(count or 0))
        workers.ensure()
        return chosen.choose(run)

    def renamed(run: str, new: str) -> Any:
        moved = actions.rename(runs, _run(runs, run).run, new)
        return chosen.choose(moved.path.relative_to(runs).as_posix())

    def duplicate(run: str) -> Any:
        job = actions.duplicate(runs, _run(runs, run).run)
        workers.ensure()
        return chosen.choose(job.run.path.relative_to(runs).as_posix())

    def trashed(run: str) -> Any:
        actions.trash(runs, _run(runs, run).run)
        gr.Info("It is in the trash, below; from there it comes back.", duration=5)
        return chosen.choose(None)

    def convert(run: str, kind: str) -> None:
        libraries.load()
        from unziplora.api import convert

        folder = _run(runs, run).run
        if not folder.loras:
            raise UserError(f"{run}: there are no LoRAs yet; wait until the run is finished")
        for lora, file in folder.loras.items():
            target = folder.lora(lora, kind)
            if not target.is_file():
                convert(file, target, kind)
        gr.Info("Written. The links are under the run's name.", duration=5)

    fill, outputs = reuse(lambda run: _run(runs, run))
    again.click(shown(fill), chosen.choice, outputs, **quietly(chosen.html))
    more.click(shown(extend), [chosen.choice, steps], chosen.outputs)
    rename.click(shown(renamed), [chosen.choice, name], chosen.outputs)
    twice.click(shown(duplicate), chosen.choice, chosen.outputs)
    trash.click(shown(trashed), chosen.choice, chosen.outputs)
    write.click(shown(convert), [chosen.choice, layout], None)


def _compare(runs: Path, chosen: Watch) -> None:
    """Make the comparison of the chosen run with another one: last sheets, and settings that differ."""
    with gr.Accordion("Compare with another run", open=False) as panel:
        other = gr.Dropdown([], label="Other run")
        with gr.Row():
            left = gr.Image(label="This run", interactive=False, buttons=["fullscreen"], min_width=260)
            right = gr.Image(label="Other run", interactive=False, buttons=["fullscreen"], min_width=260)
        table = gr.HTML()

    def names(run: str) -> Any:
        return gr.update(choices=[name for one in find_runs(runs) if (name := live.name_of(runs, one)) != run])

    def show(run: str, second: str) -> tuple[Any, Any, str]:
        pair = _run(runs, run), _run(runs, second)
        sheets = [str(one.run.sheets[-1]) if one.run.sheets else None for one in pair]
        return *sheets, differences(*pair)  # type: ignore[return-value]

    panel.expand(names, chosen.choice, other, show_progress="hidden")
    other.input(shown(show), [chosen.choice, other], [left, right, table])


def differences(one: RunSummary, two: RunSummary) -> str:
    """Return the settings in which two runs differ as a table."""
    skipped = ("out", "images", "masks")
    keys = [key for key in {**one.settings, **two.settings} if key not in skipped]
    rows = [(key, one.settings.get(key, "–"), two.settings.get(key, "–")) for key in keys]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return look.hint("Both runs have the same settings.")
    return look.table(["setting", one.run.path.name, two.run.path.name], rows)


def _settings(runs: Path, chosen: Watch) -> None:
    """Make the panel that shows the chosen run as command, TOML or Python."""
    spelling, text = copy_panel()

    def copied(run: str, kind: Any) -> str:
        summary = live.run_in(runs, run)
        return spell(*live.set_keys(summary), kind) if summary is not None else ""

    gr.on([chosen.choice.change, spelling.change], shown(copied), [chosen.choice, spelling], text,
          show_progress="hidden")  # fmt: skip


def _trash(runs: Path, chosen: Watch) -> None:
    """Make the list of removed runs."""
    with gr.Accordion("Trash", open=False) as panel, gr.Row(elem_classes="bar"):
        removed = gr.Dropdown([], label="Removed runs", min_width=180, elem_id="removed")
        back = gr.Button("Put back", min_width=110, elem_id="restore")

    def names() -> Any:
        found = [live.name_of(runs / actions.TRASH, one) for one in find_runs(runs / actions.TRASH)]
        return gr.update(choices=found, value=found[0] if found else None)

    def restore(name: str) -> tuple[Any, ...]:
        run = actions.restore(runs, _run(runs / actions.TRASH, name).run)
        return (names(), *chosen.choose(run.path.relative_to(runs).as_posix()))

    panel.expand(names, None, removed, show_progress="hidden")
    back.click(shown(restore), removed, [removed, *chosen.outputs])


def _queue(runs: Path, workers: Workers, follower: Follower, chosen: Watch, reuse: Callable[..., Any]) -> None:
    """Make the list of the jobs, and the buttons that change their order."""
    table, seen = gr.HTML(_NO_JOBS, elem_id="queue"), gr.State(None)
    with gr.Row(elem_classes="bar", visible=False) as row:
        job = gr.Dropdown([], label="Job", min_width=200, elem_id="job")
        change = gr.Button("Change", min_width=90, elem_id="change")
        first, earlier, later, pause, retry, cancel = (
            gr.Button(label, min_width=90) for label in ("First", "Earlier", "Later", "Pause", "Go on", "Cancel")
        )

    def refresh(known: Any) -> tuple[Any, ...]:
        rows = [(job.number, job.name, actions.state(job.run, job)) for job in actions.jobs(runs).values()]
        sign = [list(one) for one in rows]
        if sign == known:
            return (gr.skip(),) * 4
        html = look.table(["job", "run", "state"], rows) if rows else _NO_JOBS
        options = [(f"{number}: {name}", number) for number, name, _ in rows]
        return html, gr.update(choices=options), gr.update(visible=bool(rows)), sign

    def asked(action: Callable[[Queue, Any], object]) -> Callable[[int | None], tuple[Any, ...]]:
        def handler(number: int | None) -> tuple[Any, ...]:
            action(Queue(runs), _named(number))
            if action is Queue.retry:
                workers.ensure()
            return refresh(None)

        return shown(handler)

    def waiting(number: int | None) -> RunSummary:
        run = Queue(runs).job(_named(number)).run
        if run.log_file.exists():
            raise UserError(f"{run.path.name}: this run has begun; start a new one from its settings")
        if not run.path.is_relative_to(runs):
            raise UserError(f"{run.path}: this run is in another folder; cancel it, and start a new one here")
        return _run(runs, run.path.relative_to(runs).as_posix())

    fill, fields = reuse(waiting, change=True)
    change.click(shown(fill), job, fields, **quietly(chosen.html))
    outputs = [table, job, row, seen]
    handlers = {first: lambda queue, number: queue.move(number), earlier: _earlier, later: _later,
                pause: Queue.pause, retry: Queue.retry, cancel: Queue.cancel}  # fmt: skip
    for button, action in handlers.items():
        button.click(asked(action), job, outputs)
    follower.add(refresh, [seen], outputs)


def _earlier(queue: Queue, number: Any) -> None:
    numbers = [job.number for job in queue.jobs()]
    place = numbers.index(number) if number in numbers else 0
    if place:
        queue.move(number, numbers[place - 1])


def _later(queue: Queue, number: Any) -> None:
    numbers = [job.number for job in queue.jobs()]
    if number in numbers[:-1]:
        queue.move(numbers[numbers.index(number) + 1], number)


def _named(job: int | None) -> int:
    """Return the number of the chosen job.

    Raises:
        UserError: none is chosen.
    """
    if job is None:
        raise UserError("choose a job first")
    return job
