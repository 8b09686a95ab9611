"""A view of one run that follows its folder: state, figures, samples, and the buttons that fit its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from unziplora.jobs.queue import Queue
from unziplora.jobs.state import find_runs
from unziplora.studio import actions, live, look
from unziplora.studio.events import run_list, shown
from unziplora.studio.workers import Workers

_NOTHING = look.empty("No run yet", "Start one above: its steps and samples will grow here.")
_IDLE = "Nobody works on the queue: the worker was stopped or has died. Nothing is lost. The worker's log is {}."


@dataclass
class Watch:
    """Components of a view.

    Attributes:
        choice: the run that is shown.
        outputs: what `choose` and `refresh` return values for.
    """

    runs: Path
    workers: Workers
    choice: Any
    seen: Any
    html: Any
    samples: Any
    pause: Any
    cancel: Any
    proceed: Any

    @property
    def outputs(self) -> list[Any]:
        return [self.choice, self.seen, self.html, self.samples, self.pause, self.cancel, self.proceed]

    def choose(self, name: str | None) -> tuple[Any, ...]:
        """Show a run."""
        return self.refresh(name, None)

    def refresh(self, name: str | None, seen: Any) -> tuple[Any, ...]:
        """Return the view of a run; nothing if it is as it was seen last.

        Args:
            seen: signature of the view in the page, and the number of sheets; None if there is none.
        """
        summaries = {live.name_of(self.runs, one): one for one in find_runs(self.runs)}
        summary = summaries.get(name or "") or live.current([*summaries.values()])
        names = list(summaries)
        if summary is None:
            sign: Any = [[], names, 0]
            hidden = gr.update(visible=False)
            empty = (gr.update(choices=[], value=None, visible=False), sign, _NOTHING, hidden, hidden, hidden, hidden)
            return (gr.skip(),) * 7 if sign == seen else empty
        job, pictures = actions.waiting(self.runs, summary.run), live.sheets(summary.run)
        state = actions.state(summary.run, job)
        idle = job is not None and state in ("queued", "interrupted") and not self.workers.present()
        sign = [[str(part) for part in (*live.signature(summary, state), idle)], names, len(pictures)]
        if sign == seen:
            return (gr.skip(),) * 7
        banner = f'<div class="fault" role="alert">{look.text(_IDLE.format(self.workers.log))}</div>' if idle else ""
        gallery = gr.update(value=pictures, visible=bool(pictures))
        # A choice that the page has is left alone: another run may have been chosen while this was asked for.
        choice = {} if seen and name in summaries else {"value": live.name_of(self.runs, summary)}
        return (
            gr.update(choices=names, visible=True, **choice),
            sign,
            banner + live.view(summary, state),
            gr.skip() if seen and seen[2] == sign[2] and seen[0][:1] == sign[0][:1] else gallery,
            gr.update(visible=state in ("queued", "running")),
            gr.update(visible=state in ("queued", "running", "paused", "pausing")),
            gr.update(visible=idle or state in ("paused", "interrupted", "failed")),
        )


def watch(runs: Path, workers: Workers, id: str) -> Watch:
    """Make a view of the current run, which follows its folder.

    Args:
        id: begins the components' ids in the page.
    """
    with gr.Row():
        choice = run_list(label="Run", visible=False, scale=3, min_width=200, elem_id=f"{id}-run")
        pause = gr.Button("Pause", visible=False, min_width=90)
        cancel = gr.Button("Stop and keep", visible=False, min_width=90, elem_id=f"{id}-cancel")
        proceed = gr.Button("Continue", visible=False, variant="primary", min_width=90, elem_id=f"{id}-continue")
    html = gr.HTML(_NOTHING, elem_id=f"{id}-live")
    samples = gr.Gallery(
        label="Samples, step by step", columns=2, height="auto", visible=False,
        object_fit="contain", buttons=["download", "fullscreen"], interactive=False,
        elem_id=f"{id}-samples", elem_classes="sheets",
    )  # fmt: skip
    made = Watch(runs, workers, choice, gr.State(None), html, samples, pause, cancel, proceed)

    def ask(action: str, name: str) -> tuple[Any, ...]:
        summary = live.run_in(runs, name)
        if summary is not None and (job := actions.waiting(runs, summary.run)):
            getattr(Queue(runs), action)(job.number)
        return made.choose(name)

    def go_on(name: str) -> tuple[Any, ...]:
        summary = live.run_in(runs, name)
        if summary is not None:
            actions.go_on(runs, summary.run)
            workers.ensure()
        return made.choose(name)

    pause.click(shown(lambda name: ask("pause", name)), choice, made.outputs)
    cancel.click(shown(lambda name: ask("cancel", name)), choice, made.outputs)
    proceed.click(shown(go_on), choice, made.outputs)
    choice.input(shown(made.choose), choice, made.outputs)
    return made
