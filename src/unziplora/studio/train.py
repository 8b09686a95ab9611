"""Tab Merge and train: two LoRAs to one, and the trainings on several pictures; all by the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from unziplora.config.bases import SDXL
from unziplora.errors import UserError
from unziplora.images.colors import to_rgb
from unziplora.images.files import open_upright
from unziplora.jobs.trainings import TRAININGS
from unziplora.studio import actions, look, play
from unziplora.studio.events import Follower, quietly, shown
from unziplora.studio.forms import Form, copy_panel, settled
from unziplora.studio.spelling import spell
from unziplora.studio.split import EDITED, MODELS
from unziplora.studio.watch import Watch
from unziplora.studio.workers import Workers

_PAGE = ("images", "masks", "crop", "out", "base", "content_lora", "style_lora")

ABOUT = {
    "zip": "Content of one LoRA and style of another become one file, for programs that take only one.",
    "dreambooth": "One LoRA of a subject, of a style, or of both, from one or several pictures of it.",
    "blora": "Content and style of a picture, a small LoRA each, without words; two blocks of SDXL are enough.",
}


@dataclass
class _Tab:
    """Objects that the parts of the tab share."""

    runs: Path
    workers: Workers
    follower: Follower
    tabs: Any
    chosen: Watch

    def part(self, method: str, inputs: Sequence[Any], base: str, read: Any) -> None:
        """Make the form of a method below its inputs.

        Args:
            inputs: components of what it learns from.
            base: chosen at first; "" for that of the LoRAs.
            read: returns keys and pictures for the values of the inputs.
        """
        name = gr.Textbox(value="", label="Name of the run", max_lines=1, elem_id=f"{method}-name")
        models = [*MODELS, ("That of the LoRAs", "")] if method == "zip" else [*MODELS]
        model = gr.Dropdown(models, value=base, allow_custom_value=True, label="Model")
        with gr.Accordion("Words and settings" if method != "zip" else "Settings", open=method == "dreambooth"):
            form = Form(TRAININGS[method].recipe, method, _PAGE)
        begin = gr.Button("Start", variant="primary", elem_id=f"{method}-start")
        spelling, text = copy_panel()
        fields = [name, model, *form.components]

        def start(*values: Any) -> tuple[Any, ...]:
            given, (title, base, *others) = values[: len(inputs)], values[len(inputs) :]
            keys, images = read(*given)
            keys |= {"base": base} if base else {}
            job = actions.start(self.runs, method, {**keys, **form.keys(others)}, title or method, images)
            self.workers.ensure()
            return (gr.Tabs(selected="runs"), *self.chosen.choose(job.run.path.relative_to(self.runs).as_posix()))

        def copied(kind: Any, title: str, base: str, *others: Any) -> str:
            sources = {"content_lora": Path("content.safetensors"), "style_lora": Path("style.safetensors")}
            first = sources if method == "zip" else {"images": [Path("picture.png")]}
            out = str(self.runs / actions.safe_name(title or method, method))
            return spell(method, {**first, "base": base or None, **form.keys(others), "out": out}, kind)

        begin.click(
            shown(start), [*inputs, *fields], [self.tabs, *self.chosen.outputs], trigger_mode="once", **quietly(text)
        )
        gr.on([spelling.change, *(settled(field) for field in fields)], shown(copied), [spelling, *fields], text,
              trigger_mode="always_last", show_progress="hidden")  # fmt: skip


def tab(runs: Path, workers: Workers, follower: Follower, tabs: Any, chosen: Watch) -> None:
    """Make the tab.

    Args:
        tabs, chosen: the tabs of the page and the view in the tab Runs, which show a run that was started.
    """
    shared = _Tab(runs, workers, follower, tabs, chosen)
    with gr.Tabs():
        with gr.Tab("Merge two LoRAs"):
            gr.HTML(look.hint(ABOUT["zip"]))
            _merge(shared)
        with gr.Tab("One LoRA (DreamBooth)"):
            gr.HTML(look.hint(ABOUT["dreambooth"]))
            shared.part("dreambooth", [_drop("dreambooth")], "bundled", _opened)
        with gr.Tab("Without words (B-LoRA)"):
            gr.HTML(look.hint(ABOUT["blora"]))
            shared.part("blora", [_drop("blora")], SDXL, _opened)


def _merge(shared: _Tab) -> None:
    """Make the inputs of a merge: two lists of the LoRAs that are here."""
    with gr.Row():
        content = gr.Dropdown([], label="Content from", min_width=240, elem_id="zip-content_lora")
        style = gr.Dropdown([], label="Style from", min_width=240, elem_id="zip-style_lora")

    def refresh(seen: Any) -> tuple[Any, ...]:
        names = play.lora_names(shared.runs)
        return (gr.skip(),) * 3 if names == seen else (play.offered(names), play.offered(names), names)

    def read(first: str | None, second: str | None) -> tuple[dict[str, Any], list[Image.Image]]:
        if not first or not second:
            raise UserError("choose a LoRA for the content and one for the style")
        pairs = (("content", first), ("style", second))
        return {f"{kind}_lora": play.lora_path(shared.runs, name, kind) for kind, name in pairs}, []

    seen = gr.State(None)
    shared.follower.add(refresh, [seen], [content, style, seen])
    shared.part("zip", [content, style], "", read)


def _drop(method: str) -> Any:
    return gr.File(
        label="Pictures", file_count="multiple", file_types=["image"], height=150, elem_id=f"{method}-images"
    )


def _opened(files: list[str] | None) -> tuple[dict[str, Any], list[Image.Image]]:
    """Open uploaded pictures.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if not files:
        raise UserError("there is no picture yet: drop one first")
    return {}, [open_upright(Path(file), EDITED, to_rgb)[0] for file in files]
