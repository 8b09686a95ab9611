"""The four nodes: schemas, choices and calls. Heavy imports wait for the first execution, so ComfyUI starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from unziplora.config.recipe import KINDS
from unziplora.config.sample import SCHEDULER_NAMES
from unziplora.config.split import PRESETS
from unziplora.errors import UserError

CATEGORY = "unziplora"
NONE = "none"


class _ListOfFiles(str):
    """Type of an output that connects to any list of files. ComfyUI compares types by ``!=``, and a list is a type."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, list) and str.__ne__(self, other)


_FILE = io.Custom("COMBO")
_FILE.io_type = _ListOfFiles("COMBO")


def _choices(folder: str) -> list[str]:
    return [NONE, *folder_paths.get_filename_list(folder)]


def _path(folder: str, name: str) -> Path:
    """Return the path of a file of a folder of ComfyUI.

    Raises:
        UserError: there is none.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise UserError(
            f"{name}: not in ComfyUI's folder for {folder}; choose a file of the list, or press R to renew it"
        )
    return Path(path)


class UnziploraPair(io.ComfyNode):
    """A content LoRA and a style LoRA with a dial each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def dial(kind: str) -> Any:
            return io.Float.Input(f"{kind}_strength", default=1.0, min=-10.0, max=10.0, step=0.05)

        def blocks(kind: str) -> Any:
            example = "Strength per block, such as up_blocks.0.attentions.1=0.5"
            return io.String.Input(f"{kind}_blocks", default="", optional=True, tooltip=example)

        return io.Schema(
            node_id="UnziploraPair",
            display_name="unziplora pair",
            category=CATEGORY,
            description="Load a content LoRA and a style LoRA with a dial each, and the words in their headers.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Combo.Input("content", options=_choices("loras")),
                dial("content"),
                io.Combo.Input("style", options=_choices("loras")),
                dial("style"),
                blocks("content"),
                blocks("style"),
                io.Float.Input(
                    "projection",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Null-space projection: keeps the content away from the style's directions; 0 is off.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.String.Output(display_name="triggers"),
                io.String.Output(display_name="prompt"),
                io.String.Output(display_name="content prompt"),
                io.String.Output(display_name="style prompt"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, content: str | None = NONE, style: str | None = NONE, **_: Any) -> str:
        """Return a text that changes when one of the files does. An input that is a link is None here."""
        names = [name for name in (content, style) if name not in (None, NONE)]
        paths = [folder_paths.get_full_path("loras", name) for name in names]
        return repr([(path, Path(path).stat().st_mtime_ns) for path in paths if path])

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        content: str,
        content_strength: float,
        style: str,
        style_strength: float,
        content_blocks: str = "",
        style_blocks: str = "",
        projection: float = 0.0,
    ) -> io.NodeOutput:
        from .pair import read_pair, words_of
        from .patches import apply_pair, check_model

        sizes = check_model(model)
        files = {kind: _path("loras", name) for kind, name in zip(KINDS, (content, style), strict=True) if name != NONE}
        strengths = {"content": content_strength, "style": style_strength}
        pair = read_pair(files, strengths, {"content": content_blocks, "style": style_blocks}, projection, sizes)
        model, clip = apply_pair(model, clip, pair)
        words = words_of(pair)
        return io.NodeOutput(model, clip, words.triggers, words.full, words.content, words.style)


class UnziploraSeparatePrompts(io.ComfyNode):
    """A prompt for each LoRA of a pair."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnziploraSeparatePrompts",
            display_name="unziplora prompt for each LoRA",
            category=CATEGORY,
            description="Let the base read the full prompt, and each LoRA of a pair its own, as in unziplora sample.",
            inputs=[
                io.Model.Input("model", tooltip="From unziplora pair."),
                io.Conditioning.Input("positive", tooltip="The full prompt."),
                io.Conditioning.Input("content_positive", tooltip="The prompt of the content LoRA."),
                io.Conditioning.Input("style_positive", tooltip="The prompt of the style LoRA."),
                io.Conditioning.Input("negative"),
                io.Conditioning.Input("content_negative", optional=True, tooltip="Default: negative."),
                io.Conditioning.Input("style_negative", optional=True, tooltip="Default: negative."),
            ],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        content_positive: Any,
        style_positive: Any,
        negative: Any,
        content_negative: Any = None,
        style_negative: Any = None,
    ) -> io.NodeOutput:
        from .patches import join_conditioning, separate_prompts

        return io.NodeOutput(
            separate_prompts(model),
            join_conditioning(positive, content_positive, style_positive),
            join_conditioning(
                negative,
                negative if content_negative is None else content_negative,
                negative if style_negative is None else style_negative,
            ),
        )


class UnziploraSplit(io.ComfyNode):
    """An image to a content LoRA and a style LoRA, by the command line in a process of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnziploraSplit",
            display_name="unziplora split image",
            category=CATEGORY,
            description="Learn a content LoRA and a style LoRA from an image. A stopped run is saved and continued.",
            inputs=[
                io.Image.Input("image", tooltip="One image, or a batch of one subject in one style."),
                io.String.Input("name", default="", tooltip="Name of the run and its files, such as cat."),
                io.String.Input("content", default="", tooltip="Word for the subject, such as cat."),
                io.String.Input("style", default="", tooltip="Phrase for the style, such as pencil sketch."),
                io.Combo.Input("base", options=[*folder_paths.get_filename_list("checkpoints"), "bundled"]),
                io.Combo.Input("preset", options=["auto", *PRESETS], default="auto"),
                io.Int.Input("steps", default=0, min=0, max=100_000, tooltip="0: as in the preset."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, control_after_generate=False),
                io.Boolean.Input("save_memory", default=True, tooltip="Gradient checkpointing: for 16 GiB and less."),
            ],
            outputs=[
                _FILE.Output("content_file", display_name="content"),
                _FILE.Output("style_file", display_name="style"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image: Any, base: str, **settings: Any) -> io.NodeOutput:
        import comfy.model_management
        import comfy.utils

        from unziplora.runs.folder import RunFolder

        from .images import store_inputs
        from .process import run
        from .split import FOLDER, Request, install

        output = Path(folder_paths.get_output_directory())
        path = base if base == "bundled" else str(_path("checkpoints", base))
        Request([], base=path, **settings).check()
        request = Request(store_inputs(image, output / FOLDER / "inputs"), base=path, **settings)
        folder = RunFolder(request.folder(output))
        if not request.is_done(folder):
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
            bar = comfy.utils.ProgressBar(1)
            run(
                request.arguments(folder),
                bar.update_absolute,
                comfy.model_management.throw_exception_if_processing_interrupted,
            )
        names = install(folder, Path(folder_paths.get_folder_paths("loras")[0]))
        return io.NodeOutput(*names.values(), ui={"text": list(names.values())})


class UnziploraSaveRecipe(io.ComfyNode):
    """Images saved with the settings of `unziplora sample` inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnziploraSaveRecipe",
            display_name="unziplora save recipe",
            category=CATEGORY,
            description="Save images as PNG with the settings of unziplora sample and the workflow inside.",
            inputs=[
                io.Image.Input("images"),
                io.Model.Input("model", tooltip="From unziplora pair, or from prompt for each LoRA."),
                io.Int.Input("seed", min=0, max=0xFFFFFFFFFFFFFFFF, force_input=True),
                io.Int.Input("steps", min=1, max=10_000, force_input=True),
                io.Float.Input("cfg", min=1.0, max=100.0, force_input=True),
                io.String.Input("filename_prefix", default="unziplora"),
                io.String.Input("prompt", multiline=True),
                io.Combo.Input("sampler", options=list(SCHEDULER_NAMES), tooltip="unziplora's name of the sampler."),
                io.String.Input("content_prompt", default="", optional=True, tooltip="If each LoRA read its own."),
                io.String.Input("style_prompt", default="", optional=True, tooltip="If each LoRA read its own."),
                io.String.Input("negative", default="", optional=True),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        filename_prefix: str,
        prompt: str,
        sampler: str,
        content_prompt: str = "",
        style_prompt: str = "",
        negative: str = "",
    ) -> io.NodeOutput:
        from unziplora.sampling.sample import write_image

        from .images import to_pil
        from .patches import pair_of
        from .recipe import model_name, prompts_of, recipe, workflow_text

        pair, graph = pair_of(model), cls.hidden.prompt
        prompts = prompts_of(pair, prompt, content_prompt, style_prompt)
        size = images.shape[2], images.shape[1]
        place = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory(), *size)
        folder, name, counter, subfolder, _ = place
        settings = {"steps": steps, "guidance": cfg, "scheduler": sampler, "negative": negative}
        saved = []
        for number, image in enumerate(map(to_pil, images)):
            text = recipe(pair, image, model_name(graph), prompts, seed, **settings)
            file = Path(folder) / f"{name}_{counter + number:05}_.png"
            file = write_image(image, file, {**text, **workflow_text(graph, cls.hidden.extra_pnginfo)})
            saved.append({"filename": file.name, "subfolder": subfolder, "type": "output"})
        return io.NodeOutput(ui={"images": saved})


NODES: tuple[type[io.ComfyNode], ...] = (UnziploraPair, UnziploraSeparatePrompts, UnziploraSplit, UnziploraSaveRecipe)
