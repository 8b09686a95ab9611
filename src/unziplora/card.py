"""The README of a run folder: trigger words, how to use the files in each program, how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import tomli_w

from unziplora.base_hub import HUB_ID
from unziplora.config import SplitConfig
from unziplora.run import RunFolder


def card(run: RunFolder, config: SplitConfig, full_size: bool, scores: Mapping[str, float] | None = None) -> str:
    """The card as Markdown, with the head that model hubs read.

    Args:
        run: its LoRA files and samples are named where they are there.
        config: the run's recipe.
        full_size: the base has SDXL's own size, so that other programs can load the files.
        scores: measured scores by name.
    """
    parts = [_head(config), _title(config), _files(run, config), _samples(run)]
    parts.append(_programs(run, config) if full_size else _small(run, config))
    if scores:
        rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
        parts.append(f"## Measured\n\n| score | value |\n|---|---|\n{rows}\n")
    parts.append(_settings(config))
    return "\n".join(part for part in parts if part)


def content_words(config: SplitConfig) -> str:
    """The words that call up the content."""
    return config.prompts()["content"]


def style_words(config: SplitConfig) -> str:
    """The words that call up the style."""
    return config.fill("in {style} style")


def base_name(config: SplitConfig) -> str:
    """The base as others may know it: of a path on this machine, the last part."""
    path = Path(config.base).expanduser()
    return path.resolve().name if path.exists() else config.base


def _head(config: SplitConfig) -> str:
    # JSON strings are YAML strings: words with quotes or colons stay whole.
    base = f"base_model: {config.base}\n" if HUB_ID.fullmatch(base_name(config)) else ""
    words = json.dumps(config.prompts()["full"], ensure_ascii=False)
    return (
        f"---\n{base}instance_prompt: {words}\nlibrary_name: diffusers\n"
        "tags: [lora, sdxl, text-to-image, unziplora]\n---\n"
    )


def _title(config: SplitConfig) -> str:
    return (
        f"# {config.content}, {config.style}\n\n"
        f"Two LoRAs split from {'one picture' if len(config.images) == 1 else f'{len(config.images)} pictures'} by "
        f"unziplora {version('unziplora')} (UnZipLoRA, arXiv 2412.04465).\n"
    )


def _files(run: RunFolder, config: SplitConfig) -> str:
    rows = ["| file | gives | trigger words |", "|---|---|---|"]
    for name, words in (("content", content_words(config)), ("style", style_words(config))):
        for path in sorted(run.path.glob(f"{name}*.safetensors")):
            note = "" if path.stem == name else f" ({path.stem.removeprefix(name + '.')} layout)"
            rows.append(f"| `{path.name}`{note} | the {name} | `{words}` |")
    return "\n".join(rows) + "\n"


def _samples(run: RunFolder) -> str:
    found = sorted(run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime)
    return f"![samples]({found[-1].relative_to(run.path).as_posix()})\n" if found else ""


def _small(run: RunFolder, config: SplitConfig) -> str:
    return f"""## Use

These LoRAs fit the base they were trained on, `{base_name(config)}`, and no other: it is smaller than SDXL, so ComfyUI
and its like cannot load them. Sample with

```sh
{_commands(run, config)}
```
"""


def _commands(run: RunFolder, config: SplitConfig) -> str:
    return (
        f"unziplora sample {run.path}\n"
        f'unziplora sample --content {run.path} --prompts "{content_words(config)} on a beach"\n'
        f'unziplora sample --style {run.path} --prompts "a {config.sample_subject} {style_words(config)}"'
    )


def _programs(run: RunFolder, config: SplitConfig) -> str:
    name = run.path.resolve().name
    content, style = f"{name}-content", f"{name}-style"
    both = f"{content_words(config)} {style_words(config)}"
    return f"""## Use

Give the files names of their own when you copy them, such as `{content}.safetensors`. Either works alone; both
together restore the picture or show its content anew in its style. Strength 1 is as trained; turn one down if it
rules the other.

**ComfyUI**: copy to `ComfyUI/models/loras`, put one *Load LoRA* node per file between *Load Checkpoint* and the
sampler, prompt `{both}`.

**Forge, A1111**: copy to `models/Lora`, prompt `{both} <lora:{content}:1> <lora:{style}:1>`.

**InvokeAI**: *Models* → *Add Models* → path of the file; then choose it under *Concepts*.

**diffusers**:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained("{base_name(config)}", torch_dtype=torch.float16).to("cuda")
pipe.load_lora_weights("{run.path.as_posix()}", weight_name="content.safetensors", adapter_name="content")
pipe.load_lora_weights("{run.path.as_posix()}", weight_name="style.safetensors", adapter_name="style")
pipe.set_adapters(["content", "style"], [1.0, 1.0])
pipe("{both}", guidance_scale=5.0).images[0].save("picture.png")
```

**unziplora**:

```sh
{_commands(run, config)}
```
"""


def _settings(config: SplitConfig) -> str:
    paths = {"images", "masks", "out"}  # these tell about a person's machine, and nothing about the LoRAs
    values = config.model_dump(mode="json", exclude_none=True, exclude=paths)
    shown = tomli_w.dumps({**values, "base": base_name(config)})
    return f"<details><summary>Settings</summary>\n\n```toml\n{shown}```\n\n</details>\n"
