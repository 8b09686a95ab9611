"""Tab Split: a picture and two words, what will be learned of it, and the run as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio.components.image_editor import EditorData
from PIL import Image, ImageChops

from unziplora.config.bases import SDXL
from unziplora.config.recipe import resolve
from unziplora.config.split import BUNDLED, SplitConfig
from unziplora.config.training import ImageConfig
from unziplora.errors import UnziploraError, UserError
from unziplora.images.colors import to_gray, to_rgb
from unziplora.images.files import open_upright
from unziplora.jobs.state import RunSummary, find_runs
from unziplora.studio import actions, libraries, live, look, poll
from unziplora.studio.events import quietly, shown
from unziplora.studio.forms import Form, copy_panel, settled
from unziplora.studio.spelling import spell
from unziplora.studio.watch import Watch, watch
from unziplora.studio.workers import Workers
from unziplora.utils.progress import duration, size

if TYPE_CHECKING:
    from unziplora.jobs.trainings import Forecast

SUBJECTS = ("cat", "dog", "fox", "bird", "house", "tree", "flower", "car", "rocket", "guitar", "robot", "teapot")
"""Suggestions for the subject: short nouns that every base knows."""

MODELS = (("Practice model (included)", "bundled"), ("SDXL (needs a graphics card)", SDXL))
RECIPES = (
    ("Recommended", "auto"),
    ("For SDXL", "default"),
    ("For the practice model", "bundled"),
    ("As published", "paper"),
)
WHOLE = "All of it, on white"
"""Shape that cuts nothing off."""

SHAPES = (("Recommended", ""), ("As the picture", "bucket"), ("Square", "crop"), (WHOLE, "pad"))

NOTHING = ("Nothing yet", "Drop a picture, and name what is in it and how it is made.")

SHEETS = 4
"""Sample sheets of a run unless its recipe says otherwise."""

_PAGE = ("images", "masks", "out", "content", "style", "base", "preset", "fit")
_SIMPLE = 5  # components of the simple form


EDITED = 2048
"""Shorter side in pixels to which a picture may be reduced when it comes back into the editor."""

_COPY = "files => files?.id ? undefined : files"

BRUSH = (20, 184, 166)
"""Color of the brush that paints the mask."""


class Split(NamedTuple):
    """Parts of this tab that other tabs use.

    Attributes:
        now: view of the current run.
        reuse: returns the values of the form for the settings of a run, which are to be changed if the second is True.
        fields: components of the form, the picture first, what is being changed last.
    """

    now: Watch
    reuse: Callable[[RunSummary, bool], list[Any]]
    fields: list[Any]


def tab(runs: Path, cache: Path, workers: Workers) -> Split:
    """Make the tab; return what other tabs use of it."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            pictures, edited, read = _picture()
        with gr.Column(scale=2, min_width=320):
            content = gr.Dropdown(
                list(SUBJECTS),
                value=None,
                allow_custom_value=True,
                label="2 · What is in it?",
                info="One word for the subject, such as cat",
                elem_id="content",
            )
            style = gr.Dropdown(
                list(BUNDLED["phrase_words"]),
                value=None,
                allow_custom_value=True,
                label="3 · How is it made?",
                info="A phrase for the style, such as pencil sketch",
                elem_id="style",
            )
            base = gr.Dropdown(list(MODELS), value="bundled", allow_custom_value=True, label="Model", elem_id="base")
            with gr.Row():
                preset = gr.Dropdown(list(RECIPES), value="auto", label="Recipe", min_width=170)
                fit = gr.Dropdown(list(SHAPES), value="", label="Shape", min_width=170)
            begin, changed = gr.Button("Start", variant="primary", elem_id="start"), gr.State(None)
    gr.HTML("<h2>What will be learned</h2>")
    with gr.Row():
        learned = gr.Image(
            label="The picture as it is learned",
            interactive=False,
            height=220,
            buttons=[],
            visible=False,
            min_width=220,
            elem_id="learned",
            alt_text="The picture as it is learned",
        )
        forecast = gr.HTML(look.empty(*NOTHING), elem_id="forecast")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        gr.HTML(look.hint("Empty fields stay as the recipe has them. Separate several values by semicolons."))
        form = Form(SplitConfig, "split", _PAGE)
    spelling, text = copy_panel()
    gr.HTML("<h2>Now</h2>")
    now = watch(runs, workers, "now")

    simple = [content, style, base, preset, fit]
    fields = [*simple, *form.components]

    def keys(values: Sequence[Any]) -> dict[str, Any]:
        named = dict(zip(("content", "style", "base", "preset", "fit"), values[:_SIMPLE], strict=True))
        return {**{name: value for name, value in named.items() if value}, **form.keys(values[_SIMPLE:])}

    def preview(files: Any, *values: Any) -> tuple[Any, str]:
        image, mask = opened(read(files))
        if image is None:
            return gr.update(visible=False), look.empty(*NOTHING)
        try:
            drawn, about = foreseen(runs, cache, keys(values), image, mask)
        except UnziploraError as error:
            return gr.update(visible=False), look.empty("Not ready yet", _clean(error))
        return gr.update(value=drawn, visible=True), about

    def submit(files: Any, name: str | None, *values: Any) -> Any:
        image, mask = opened(read(files))
        if image is None:
            raise UserError("there is no picture yet: drop one first")
        chosen = with_sheets(keys(values))
        if name is None:
            job = actions.start(runs, "split", chosen, str(values[0] or "image"), [image], mask)
        elif summary := live.run_in(runs, name):
            job = actions.change(runs, summary.run, chosen, image, mask)
        else:
            raise UserError(f"{name}: this run is not there any more; load the page again and start a new one")
        workers.ensure()
        return (*now.choose(live.name_of(runs, RunSummary(job.run))), *_begins(None))

    def copied(kind: Any, *values: Any) -> str:
        chosen = keys(values)
        name = str(runs / actions.safe_name(str(chosen.get("content", "image")), "image"))
        return spell("split", {"images": [Path("picture.png")], **chosen, "out": name}, kind)

    changes = [settled(field) for field in fields]
    gr.on([edited.change, *changes], preview, [edited, *fields], [learned, forecast], trigger_mode="always_last",
          show_progress="hidden")  # fmt: skip
    gr.on([spelling.change, *changes], copied, [spelling, *fields], text, trigger_mode="always_last",
          show_progress="hidden")  # fmt: skip
    copy_files(begin.click, pictures[0], edited).then(  # the last stroke may not have been copied yet
        shown(submit), [edited, changed, *fields], [*now.outputs, changed, begin], trigger_mode="once"
    )

    def reuse(summary: RunSummary, change: bool) -> list[Any]:
        method, chosen = live.set_keys(summary)
        if method != "split":
            raise UserError(f"{summary.run.path.name}: this is no split; copy its settings as a command instead")
        if len(chosen["images"]) > 1:
            raise UserError(f"{summary.run.path.name}: it has several pictures; copy its settings as a command instead")
        named = [chosen.get(name) for name in ("content", "style", "base")]
        again = edited_again(chosen)
        return [
            again,
            *_shown(again["background"] if again else None),
            *named,
            chosen.get("preset", "auto"),
            chosen.get("fit", ""),
            *form.values(chosen),
            *_begins(live.name_of(runs, summary) if change else None),
        ]

    return Split(now, reuse, [*pictures, *fields, changed, begin])


def _begins(name: str | None) -> tuple[str | None, Any]:
    """Return the name of the run that is being changed, and what the button says then."""
    return name, gr.update(value="Start" if name is None else f"Save the changes of “{name}”")


def _picture() -> tuple[list[Any], Any, Callable[[Any], Any]]:
    """Make the place where a picture is dropped, and the editor that takes its place then.

    The editor needs seconds until it can take a picture by itself; what is dropped on it earlier is lost.

    Returns:
        The editor, the place to drop, the parts that are shown with the editor, and the size of its picture. The files
        of the editor, which change when it does. A function that opens them as the editor's value.
    """
    drop = gr.Image(
        label="1 · Picture", type="filepath", image_mode=None, sources=("upload", "clipboard"), height=460,
        buttons=[], elem_id="drop", placeholder="Drop a picture here\nor click to choose one",
    )  # fmt: skip
    with gr.Column(visible=False) as editing:
        picture = gr.ImageEditor(
            label="1 · Picture", type="pil", image_mode="RGBA", format="png", sources=(), transforms=("crop",),
            layers=False, height=460, buttons=[], elem_id="picture",
            brush=gr.Brush(colors=["#{:02x}{:02x}{:02x}".format(*BRUSH)], color_mode="fixed", default_size=24),
        )  # fmt: skip
        about = gr.HTML(
            look.hint("Crop it with the first tool. Paint over the subject if only that should be learned.")
        )
        another = gr.Button("Another picture", size="md", elem_id="another")

    def edit(file: str) -> tuple[Any, ...]:
        image = _opened(Path(file))
        return {"background": image, "layers": [], "composite": None}, *_shown(image)

    def read(files: Any) -> Any:
        picture.blob_storage.clear()  # nobody asks for what the page sends in advance, and it would stay in the memory
        return picture.preprocess(EditorData(**files)) if files else None

    def fit(files: Any, known: list[int] | None) -> tuple[Any, Any]:
        edited = read(files)
        background = (edited or {}).get("background")
        size = list(background.size) if background is not None else None
        if edited is None or size is None or known in (None, size):
            return gr.skip(), gr.skip()
        return {**edited, "composite": None}, size

    quiet = quietly(about)
    size = gr.State(None)  # the editor leaves a cropped picture small and in a corner, but shows a new one large
    cropped = gr.Button("Show the picture again", visible="hidden", elem_id=poll.CROPPED)
    edited = gr.JSON(visible="hidden")
    copy_files(cropped.click, picture, edited).then(fit, [edited, size], [picture, size], **quiet)
    for event in (picture.change, picture.input):  # the first edit is reported as input, others as change
        copy_files(event, picture, edited)
    outputs = [picture, drop, editing, size]
    drop.upload(shown(edit), drop, outputs, **quiet)
    for event in (another.click, picture.clear):
        event(lambda: (None, *_shown(None)), None, outputs, **quiet)
    return outputs, edited, read


def copy_files(event: Any, picture: Any, files: Any) -> Any:
    """Let an event of the page copy the files of the editor, within the page; return the event after it.

    No event of the server may have the editor as an input: Gradio would then read it at every event of the page, and
    each time the page would send the picture to the server, up to five times. After an edit, the first look at the
    editor may return no files but an id that is valid once. The second look returns files.
    """
    return event(None, picture, files, js=_COPY).then(None, picture, files, js=_COPY)


def _shown(image: Image.Image | None) -> tuple[Any, Any, list[int] | None]:
    """Return what shows the editor instead of the place to drop a picture, or the other way around."""
    there = image is not None
    return gr.update(value=None, visible=not there), gr.update(visible=there), list(image.size) if image else None


def _opened(file: Path) -> Image.Image:
    return open_upright(file, EDITED, to_rgb)[0].convert("RGBA")


def edited_again(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the value of the editor for the picture and the mask of a run; None if they are gone."""
    images, masks = settings.get("images") or [], settings.get("masks") or []
    if not images or not Path(str(images[0])).is_file():
        return None
    background = _opened(Path(str(images[0])))
    layers = []
    if masks and Path(str(masks[0])).is_file():
        mask = open_upright(Path(str(masks[0])), EDITED, to_gray)[0].resize(background.size)
        layers = [Image.merge("RGBA", [mask.point(lambda _, level=level: level) for level in BRUSH] + [mask])]
    return {"background": background, "layers": layers, "composite": None}


def opened(edited: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the picture of an editor, without transparency, and the mask that was painted on it, if any."""
    background = (edited or {}).get("background")
    if background is None or not background.getbbox():
        return None, None
    image = Image.new("RGBA", background.size, "white")
    image.alpha_composite(background.convert("RGBA"))
    mask = Image.new("L", background.size, 0)
    for layer in edited.get("layers") or []:
        painted = layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level > 32))
        mask = ImageChops.lighter(mask, painted.resize(mask.size, Image.Resampling.NEAREST))
    return image.convert("RGB"), mask if mask.getbbox() else None


def with_sheets(keys: dict[str, Any]) -> dict[str, Any]:
    """Let a run show sample sheets while it goes, unless its settings say something of them."""
    if "sample_every" in keys or "base" not in keys:
        return keys
    placeholder = {"images": ["picture"], "out": "run"}
    steps = resolve(SplitConfig, placeholder, keys).steps
    return {**keys, "sample_every": max(1, steps // SHEETS)}


def foreseen(
    runs: Path, cache: Path, keys: dict[str, Any], image: Image.Image, mask: Image.Image | None
) -> tuple[Image.Image, str]:
    """Return what will be learned as an image, and prompts, memory and time as HTML.

    Raises:
        UserError: the settings or the picture cannot be used.
    """
    missing = [what for what, key in (("what is in it", "content"), ("how it is made", "style")) if key not in keys]
    if missing:
        raise UserError(f"Name {' and '.join(missing)}.")
    libraries.load()
    from unziplora.jobs.trainings import foresee

    with TemporaryDirectory(dir=cache) as folder:
        files: dict[str, Any] = {"images": [Path(folder, "picture.png")]}
        image.save(files["images"][0])
        if mask is not None:
            files["masks"] = [Path(folder, "mask.png")]
            mask.save(files["masks"][0])
        config = resolve(SplitConfig, keys, files, {"out": Path(folder, "run")})
        forecast = foresee(config)
    memory, prompts = forecast.memory, forecast.prompts
    fits = {True: "fits", False: f"does not fit{memory.needs_less}", None: "free memory is unknown"}[memory.fits]
    about = [
        ("together", f"“{prompts['full']}”"),
        ("content", f"“{prompts['content']}”"),
        ("style", f"“{prompts['style']}”"),
        ("size", "{} × {} pixels".format(*forecast.size)),
        ("memory", f"about {size(memory.total)} on the {memory.device} ({fits})"),
        ("time", predicted(runs, config)),
    ]
    return forecast.image, look.remarks(remarks(forecast)) + look.facts(about)


def remarks(forecast: Forecast) -> list[str]:
    """Return what a picture loses on its way to what is learned, and how to mend it in the page."""
    from unziplora.images.preprocess import Enlarged

    found = []
    for flaw in forecast.flaws:
        if isinstance(flaw, Enlarged):
            found.append(
                "The picture has only {} × {} pixels and is enlarged to {} × {}, which makes it blurred. "
                "Take a larger one, or crop less of it.".format(*flaw.size, *flaw.learned)
            )
        else:
            square = " to a square" if flaw.learned[0] == flaw.learned[1] else ""
            what = "what you painted over" if flaw.of_subject else "the picture"
            found.append(
                f"{flaw.share:.0%} of {what} is cut off, at the {flaw.sides}. To learn all of it, choose the shape "
                f"“{WHOLE}”. To choose the part yourself, crop the picture{square} with the first tool."
            )
    if forecast.ineffective:
        found.append(f"Leave out {', '.join(forecast.ineffective)}: here it is only read as letters.")
    return found


def predicted(runs: Path, config: ImageConfig) -> str:
    """Return the time that a run will take, as the steps of the last one with the same model and size took."""
    from unziplora.jobs.trainings import method_of

    for summary in find_runs(runs):
        same = ("base", "resolution", "batch_size", "gradient_checkpointing")
        alike = all(summary.settings.get(name) == getattr(config, name) for name in same)
        if alike and (speed := live.seconds_per_step(summary.run, 200)):
            steps = (method_of(config).phase_steps(config) + config.steps) * getattr(config, "seeds", 1)
            return f"about {duration(steps * speed)} (as fast as “{summary.run.path.name}”)"
    return "known after the first run on this computer"


def _clean(error: UnziploraError) -> str:
    """Return an error's message without the path of the temporary picture."""
    return " ".join(word for word in str(error).split(" ") if "/.studio/" not in word)
