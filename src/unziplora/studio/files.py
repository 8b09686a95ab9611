"""Tab Files: what a LoRA file contains and who loads it, in another layout, or smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from unziplora.errors import UserError
from unziplora.jobs.state import find_runs
from unziplora.studio import libraries, live, look, play
from unziplora.studio.events import Follower, shown
from unziplora.studio.runs import LAYOUTS
from unziplora.utils.files import file_stem, free_file, safe_name

DTYPES = (("as it is", ""), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"))


def tab(runs: Path, follower: Follower) -> None:
    """Make the tab."""
    with gr.Row(elem_classes="bar"):
        chosen = gr.Dropdown([], label="LoRA file", min_width=240, elem_id="file")
        upload = gr.UploadButton("Add a LoRA file", file_types=[".safetensors"], min_width=140, elem_id="file-upload")
    about = gr.HTML(look.empty("No file chosen", "Choose a LoRA of a run, or add a file."), elem_id="inspection")
    with gr.Row(elem_classes="bar"):
        layout = gr.Dropdown(list(LAYOUTS), value="kohya", label="File format", scale=2, min_width=300)
        dtype = gr.Dropdown(list(DTYPES), value="", label="Number format", min_width=160)
        rank = gr.Number(None, label="At most this rank", info="0: as it is", precision=0, minimum=0, min_width=120,
                         elem_id="file-rank")  # fmt: skip
        energy = gr.Number(
            None, label="Or keep this share", info="Such as 0.95; 0: as it is", minimum=0, maximum=1, min_width=120
        )
        begin = gr.Button("Write a new file", variant="primary", min_width=140, elem_id="file-write")
    result = gr.HTML(elem_id="file-result")

    def refresh(seen: Any) -> tuple[Any, Any]:
        names = list(lora_files(runs))
        return (gr.skip(), gr.skip()) if names == seen else (gr.update(choices=names), names)

    def inspect(name: str | None) -> str:
        libraries.load()
        from unziplora.api import inspect

        if not name:
            return ""
        lines = inspect(file_of(runs, name)).lines()
        lines[0] = lines[0].replace(str(runs) + "/", "")
        return f'<pre class="log" tabindex="0" aria-label="Contents of the file">{look.text(chr(10).join(lines))}</pre>'

    def add(file: str) -> tuple[Any, Any]:
        name = play.keep(runs, Path(file))
        names = list(lora_files(runs))
        return gr.update(choices=names, value=name), names

    def written(name: str | None, kind: str, numbers: str, most: float | None, share: float | None) -> str:
        target, remark = rewrite(runs, name or "", kind, numbers or None, int(most) if most else None, share or None)
        return f'<p class="downloads">{live.link(target, target.name)} {look.text(remark)}</p>'

    seen = gr.State(None)
    follower.add(refresh, [seen], [chosen, seen])
    upload.upload(shown(add), upload, [chosen, seen])
    chosen.change(shown(inspect), chosen, about)
    begin.click(shown(written), [chosen, layout, dtype, rank, energy], result)


def lora_files(runs: Path) -> dict[str, Path]:
    """Return the LoRA files in the runs folder by their names in the list."""
    own = (file for one in find_runs(runs) for file in one.run.loras.values())
    return {file.relative_to(runs).as_posix(): file for file in (*own, *play.uploaded_loras(runs))}


def file_of(runs: Path, name: str) -> Path:
    """Return the file that a name in the list stands for.

    Raises:
        UserError: it is not in the list.
    """
    file = lora_files(runs).get(name)
    if file is None:
        raise UserError(f"{name or 'no file'}: choose a LoRA file of the list")
    return file


def rewrite(
    runs: Path, name: str, layout: str, dtype: str | None, rank: int | None, energy: float | None
) -> tuple[Path, str]:
    """Write a LoRA in another layout, or at a lower rank, as a new file; return it with a remark.

    Raises:
        UserError, MachineError: as `unziplora.convert` and `unziplora.resize`.
    """
    libraries.load()
    from unziplora.api import convert, resize

    source = file_of(runs, name)
    ending = f"rank{rank}" if rank else f"{energy:g}" if energy else layout
    stem = safe_name(f"{file_stem(source)}-{ending}", "lora", longest=90)
    target = free_file(runs / play.LORAS / f"{stem}.safetensors")
    if rank or energy:
        kept = resize(source, target, rank, energy, layout, dtype).energy
        return target, f"{kept:.1%} of the change to the model is left."
    convert(source, target, layout, dtype)
    return target, ""
