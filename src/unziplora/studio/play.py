"""Tab Play: a content LoRA and a style LoRA with a dial each; pictures that contain their recipe and bring it back."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from unziplora.config.bases import HUB_ID, is_bundled
from unziplora.config.recipe import KINDS, resolve
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig
from unziplora.errors import OutOfMemory, UserError, first_line, out_of_memory
from unziplora.jobs.state import find_runs
from unziplora.models.kept import KeptBase
from unziplora.studio import libraries, live, look
from unziplora.studio.events import Follower, shown
from unziplora.studio.forms import Form, copy_panel, settled
from unziplora.studio.spelling import read, spell, write
from unziplora.utils.files import copy_file, file_stem, free_file, safe_name
from unziplora.utils.inputs import parse_json
from unziplora.utils.progress import Progress

if TYPE_CHECKING:
    from unziplora.models.base import Base

LORAS, PICTURES = "loras", "pictures"
"""Folders in the runs folder for uploaded LoRA files, and for the pictures that are made here."""

GRID = "grid"
"""Name of the files of grids, which are not compared with pictures."""

NONE = "none"
NO_LORA = "None yet: split a picture first, or add a file in the tab Files"
NO_PICTURE = ("Your picture appears here", "Choose a content, a style or both, and press “Make a picture”.")
RECENT = 24

_PAGE = (*KINDS, "out", "prompts", "negative", "content_strength", "style_strength", "seeds", "steps")
_DIALS = ("content", "style", "content_strength", "style_strength", "prompts", "negative", "steps")


class Player:
    """Makes pictures, one request at a time, on a base that stays loaded until another one is needed.

    Between two pictures it waits in the memory of the computer, because the worker may need that of the GPU.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept = KeptBase()

    def make(self, action: str, keys: dict[str, Any], report: Any) -> list[Image.Image]:
        """Return pictures or one grid; each contains its recipe.

        Args:
            action: "sample" or "grid".

        Raises:
            UserError, MachineError: as the functions of the same name.
        """
        libraries.load()
        from unziplora.api import grid, sample
        from unziplora.models.offload import base_at_work

        config = resolve(GridConfig if action == "grid" else SampleConfig, keys)
        with self.lock:
            base = self._load(config)
            keys = {**keys, "base": base, "progress": report}
            try:
                with base_at_work(base):
                    return [grid(**keys)] if action == "grid" else sample(**keys)
            except Exception as error:
                if out_of_memory(error):
                    self.kept.drop()
                    raise OutOfMemory(f"not enough memory for this picture ({first_line(error)})") from None
                raise

    def _load(self, config: GenerationConfig) -> Base:
        """Return the base of a configuration, in the number format that it is used in, on the CPU."""
        from unziplora.models.device import pick_device, pick_dtype
        from unziplora.sampling.sources import choose_base, find_loras

        device, name = pick_device(config.device), choose_base(config, find_loras(config))
        return self.kept.load(name, pick_dtype(config.precision, device), device, waiting=True)


def tab(runs: Path, follower: Follower) -> None:
    """Make the tab."""
    player = Player()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            content = gr.Dropdown([NONE], value=NONE, label="Content from", elem_id="play-content")
            content_strength = gr.Slider(
                0, 2, 1, step=0.05, label="How much of the content", elem_id="content-strength"
            )
            style = gr.Dropdown([NONE], value=NONE, label="Style from", elem_id="play-style")
            style_strength = gr.Slider(0, 2, 1, step=0.05, label="How much of the style", elem_id="style-strength")
            upload = gr.UploadButton("Add a LoRA file", file_types=[".safetensors"], size="md", elem_id="play-upload")
            prompt = gr.Textbox(
                value="", label="Prompt", info="Leave it empty for the words of the runs", lines=2, elem_id="prompt"
            )
            negative = gr.Textbox(value="", label="Not in the picture", max_lines=1)
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
                locked = gr.Checkbox(True, label="Keep the seed", min_width=120, elem_id="lock")
            steps = gr.Slider(1, 100, 30, step=1, label="Steps of a picture", elem_id="play-steps")
            make = gr.Button("Make a picture", variant="primary", elem_id="make")
        with gr.Column(scale=3, min_width=320):
            slider = gr.ImageSlider(
                label="The picture before, and this one", type="filepath", interactive=False, max_height=520,
                buttons=["download", "fullscreen"], elem_id="picture-now", visible=False,
            )  # fmt: skip
            nothing = gr.HTML(look.empty(*NO_PICTURE))
            with gr.Accordion("Grid of both dials", open=False):
                down = gr.Textbox("0; 0.5; 1", label="Content, row by row", elem_id="down")
                across = gr.Textbox("0; 0.5; 1", label="Style, column by column", elem_id="across")
                draw = gr.Button("Make the grid", elem_id="draw")
                sheet = gr.Image(label="Grid", type="filepath", interactive=False, elem_id="grid",
                                 buttons=["download", "fullscreen"])  # fmt: skip
            recent = gr.Gallery(
                label="Pictures made here, the newest first", columns=4, fit_columns=False, height="auto",
                interactive=False, object_fit="cover", buttons=["download", "fullscreen"], elem_id="pictures",
                visible=False,
            )  # fmt: skip
            dropped = gr.File(label="Drop a picture that was made here: its settings come back", height=180,
                              file_types=["image"], elem_id="dropped")  # fmt: skip
    with gr.Accordion("Advanced: a prompt for each LoRA, strengths by block, size", open=False):
        gr.HTML(look.hint("Strengths by block: up_blocks.0.attentions.1=0.5; mid_block=0"))
        form = Form(SampleConfig, "play", _PAGE)
    spelling, text = copy_panel()

    dials = [content, style, content_strength, style_strength, prompt, negative, steps]
    fields = [*dials, seed, *form.components]

    def keys(values: Sequence[Any]) -> dict[str, Any]:
        return chosen_keys(runs, dict(zip(_DIALS, values, strict=False)), values[len(_DIALS)], form.keys(values[8:]))

    def sample(lock: bool, *values: Any, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        if not lock:
            values = (*values[:7], secrets.randbelow(2**31), *values[8:])
        before = [file for file in pictures(runs) if not Path(file).name.startswith(GRID)][:1]
        made = player.make("sample", keys(values), _reporting(progress))
        files = [str(save(runs, image, "picture")) for image in made]
        pair = (before[0] if before else files[-1], files[-1])
        return gr.update(value=pair, visible=True), gr.update(visible=False), values[7], _gallery(pictures(runs))

    def grid(rows: str, columns: str, *values: Any, progress: Any = gr.Progress()) -> tuple[str, Any]:  # noqa: B008
        listed = {"content_strengths": rows, "style_strengths": columns}
        lists = {name: read(GridConfig.model_fields[name], text) for name, text in listed.items() if text.strip()}
        skipped = ("content_strength", "style_strength", "batch_size")
        known = {name: value for name, value in keys(values).items() if name not in skipped}
        made = player.make(
            "grid", {**known, **{k: v for k, v in lists.items() if k[:-10] in known}}, _reporting(progress)
        )
        return str(save(runs, made[0], GRID)), _gallery(pictures(runs))

    def restore(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(fields)
        settings = recipe_of(Path(file))
        base = str(settings.get("base"))
        if not is_bundled(base) and not HUB_ID.fullmatch(base):
            settings.pop("base", None)  # the name of a file, without its folder: the LoRAs know the path
        found = found_loras(runs, settings)
        values = [found.get("content", NONE), found.get("style", NONE)]
        values += [settings.get("content_strength", 1), settings.get("style_strength", 1), settings.get("prompt", "")]
        values += [settings.get("negative", ""), settings.get("steps", 30), settings.get("seed", 0)]
        both = "content" in found and "style" in found and settings.get("mode") != "direct"
        skipped = () if both else ("content_prompt", "style_prompt")
        return [*values, *(write(settings[name]) if settings.get(name) not in (None, [], "") and name not in skipped
                           else "" for name in form.fields)]  # fmt: skip

    def add(file: str) -> tuple[Any, ...]:
        name = keep(runs, Path(file))
        gr.Info(f"{look.text(name)} is in both lists now.", duration=5)
        return refresh(None)

    def refresh(seen: Any) -> tuple[Any, ...]:
        names = [NONE, *lora_names(runs)]
        sign = [names, pictures(runs)]
        if sign == seen:
            return (gr.skip(),) * 4
        return offered(names), offered(names), _gallery(pictures(runs)), sign

    def copied(kind: Any, *values: Any) -> str:
        return spell("sample", {**keys(values), "out": PICTURES}, kind)

    seen = gr.State(None)
    lists = [content, style, recent, seen]
    follower.add(refresh, [seen], lists)
    upload.upload(shown(add), upload, lists)
    make.click(
        shown(sample),
        [locked, *fields],
        [slider, nothing, seed, recent],
        concurrency_limit=1,
        show_progress_on=[nothing, slider],
    )
    draw.click(shown(grid), [down, across, *fields], [sheet, recent], concurrency_limit=1, show_progress_on=sheet)
    dropped.change(shown(restore), dropped, fields)
    gr.on([spelling.change, *(settled(field) for field in fields)], shown(copied), [spelling, *fields], text,
          trigger_mode="always_last", show_progress="hidden")  # fmt: skip


def chosen_keys(runs: Path, dials: dict[str, Any], seed: Any, others: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a sample configuration from the values of the page."""
    known: dict[str, Any] = {"seeds": [int(seed or 0)], "steps": int(dials["steps"] or 30)}
    for kind in KINDS:
        if dials[kind] not in (None, "", NONE):
            known[kind] = lora_path(runs, dials[kind], kind)
            known[f"{kind}_strength"] = float(dials[f"{kind}_strength"])
    if (dials["prompts"] or "").strip():
        known["prompts"] = [dials["prompts"]]
    if (dials["negative"] or "").strip():
        known["negative"] = dials["negative"]
    return {**known, **others}


def lora_names(runs: Path) -> list[str]:
    """Return what can be chosen as a LoRA: runs that have one, and uploaded files."""
    names = [live.name_of(runs, one) for one in find_runs(runs) if one.run.loras]
    return names + [f"{LORAS}/{file.name}" for file in uploaded_loras(runs)]


def uploaded_loras(runs: Path) -> list[Path]:
    """Return the uploaded LoRA files, without hidden ones."""
    return sorted((runs / LORAS).glob("[!.]*.safetensors"))


def offered(names: list[str]) -> Any:
    """Return what fills a list of LoRAs; an empty one says where LoRAs come from."""
    return gr.update(choices=names, info=NO_LORA if names in ([], [NONE]) else None)


def lora_path(runs: Path, name: str, kind: str) -> Path:
    """Return the LoRA of a kind that a name in the list stands for.

    Raises:
        UserError: the name is not in the list.
    """
    if name not in lora_names(runs):
        raise UserError(f"{name}: this LoRA is not there any more; choose another one")
    path = runs / name
    if path.is_file():
        return path
    loras = live.RunFolder(path).loras
    return loras.get("lora") or loras.get(kind) or path


def keep(runs: Path, file: Path) -> str:
    """Copy an uploaded LoRA into the runs folder; return its name in the lists.

    Raises:
        UserError: it is not a LoRA for SDXL.
    """
    libraries.load()
    from unziplora.api import read_lora

    read_lora(file)
    stem = safe_name(file_stem(file), "lora", longest=80)
    target = free_file(runs / LORAS / f"{stem}.safetensors")
    copy_file(file, target)
    return f"{LORAS}/{target.name}"


def pictures(runs: Path) -> list[str]:
    """Return the newest pictures that were made here."""
    files = sorted((runs / PICTURES).glob("*.png"), key=lambda file: -file.stat().st_mtime_ns)
    return [str(file) for file in files[:RECENT]]


def _gallery(files: list[str]) -> Any:
    return gr.update(value=files, visible=bool(files))


def save(runs: Path, image: Image.Image, name: str) -> Path:
    """Write a picture with its recipe into the folder of pictures."""
    from unziplora.sampling.sample import write_image

    text: dict[str, str] = {key: str(image.info[key]) for key in ("parameters", "unziplora") if key in image.info}
    return write_image(image, runs / PICTURES / f"{name}.png", text)


def recipe_of(file: Path) -> dict[str, Any]:
    """Read the recipe of a picture.

    Raises:
        UserError: it contains none, or not one of this program.
    """
    fault = f"{file.name}: this picture contains no recipe of unziplora; drop one that was made here"
    try:
        with Image.open(file, formats=["PNG"]) as image:
            settings = parse_json(str(image.info["unziplora"]))
    except (OSError, KeyError, ValueError, SyntaxError, RecursionError):
        raise UserError(fault) from None
    if not isinstance(settings, dict):
        raise UserError(fault)
    fields = set(SampleConfig.model_fields) - {*KINDS, "out", "prompts", "seeds", "base"}
    known = {name: value for name, value in settings.items() if name in fields and value is not None}
    seed, prompt = settings.get("seed", 0), settings.get("prompt", "")
    resolve(SampleConfig, {name: value for name, value in known.items() if not name.startswith(KINDS)},
            {"seeds": [seed], "prompts": [prompt]})  # fmt: skip
    return {**settings, **known}


def found_loras(runs: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the names of the LoRAs of a recipe by kind, found by their hashes.

    Raises:
        UserError: one of them is not here.
    """
    hashes = settings.get("loras")
    known = hashes if isinstance(hashes, dict) else {}
    wanted = {kind: known.get(str(settings[kind])) for kind in KINDS if kind in settings} if known else {}
    found = {}
    for kind, digest in wanted.items():
        names = (name for name in lora_names(runs) if _digest(lora_path(runs, name, kind)) == digest)
        name = next(names, None)
        if name is None:
            raise UserError(f"the {kind} LoRA of this picture ({settings[kind]}) is not here: add its file first")
        found[kind] = name
    return found


def _digest(file: Path) -> str | None:
    from unziplora.formats.safetensors import body_hash, read_header

    if not file.is_file():
        return None
    return read_header(file).metadata.get("sshs_model_hash") or body_hash(file)


def _reporting(progress: Any) -> Any:
    def report(event: Progress) -> None:
        if event.steps:
            progress((event.step, event.steps), desc=event.message or "making the picture")

    return report
