"""The README of a run folder: trigger words, use in each program, settings of the training."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from unziplora.config.bases import HUB_ID
from unziplora.config.recipe import KINDS
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import absolute


@dataclass(frozen=True)
class LoraDescription:
    """Description of one LoRA file.

    Attributes:
        summary: what the LoRA adds to an image, such as "the style".
        trigger: words that activate it.
        hint: one sentence on its use, for the header.
    """

    summary: str
    trigger: str
    hint: str = ""


@dataclass(frozen=True)
class RunDescription:
    """Description of a run's LoRAs, by the method that trained them.

    Attributes:
        method: name and paper of the method.
        origin: how the LoRAs came about, as the beginning of a sentence.
        prompt: prompt of everything that was learned.
        files: the LoRAs by file name, without the suffix.
        separate_prompts: each LoRA has a prompt of its own where both act.
    """

    method: str
    origin: str
    prompt: str
    files: dict[str, LoraDescription]
    separate_prompts: bool = False


def card(run: RunFolder, config: TrainingConfig, description: RunDescription, full_size: bool) -> str:
    """Return the card as Markdown, with the front matter that model hubs read.

    Args:
        run: the card names the LoRA files and samples that exist in it.
        full_size: the base has SDXL's own size, so that other programs can load the files.
    """
    parts = [_head(config, description), _title(config, description), _files(run, description), _samples(run)]
    parts.append(_programs(run, config, description) if full_size else _small(run, config, description))
    parts.append(_settings(config))
    return "\n".join(part for part in parts if part)


def argument(text: str) -> str:
    """Quote a text for a command line: bare or in double quotes if all shells agree on its meaning."""
    if re.fullmatch(r"(?!~)[\w./:~-]+", text):
        return text
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def folder_argument(path: Path) -> str:
    """Quote a path for a command line, even one that looks like a flag."""
    text = path.as_posix()
    return argument(f"./{text}" if text.startswith("-") else text)


def image_count(config: ImageConfig) -> str:
    """Return the number of training images in words."""
    return "one picture" if len(config.images) == 1 else f"{len(config.images)} pictures"


def shared_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings for publication, without paths of this machine."""
    return {**config.model_dump(mode="json", exclude=config.marked("private")), "base": base_name(config)}


def base_name(config: TrainingConfig) -> str:
    """Return the name of the base for publication: the last part of a path, or the name as it is."""
    path = Path(config.base).expanduser()
    return absolute(path).name if path.exists() else config.base


def _head(config: TrainingConfig, description: RunDescription) -> str:
    base = f"base_model: {config.base}\n" if HUB_ID.fullmatch(base_name(config)) else ""
    words = _string(description.prompt)
    return (
        f"---\n{base}instance_prompt: {words}\nlibrary_name: diffusers\n"
        "tags: [lora, sdxl, text-to-image, unziplora]\n---\n"
    )


def _string(text: str) -> str:
    """Quote a text for YAML and Python, which both read strings of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _title(config: TrainingConfig, description: RunDescription) -> str:
    words = config.words()
    title = ", ".join(words[name] for name in KINDS if name in words) or description.prompt
    return f"# {title}\n\n{description.origin} by unziplora {version('unziplora')} ({description.method}).\n"


def _files(run: RunFolder, description: RunDescription) -> str:
    rows = ["| file | gives | trigger words |", "|---|---|---|"]
    for name, file in description.files.items():
        for layout, note in (("kohya", ""), ("diffusers", " (diffusers layout)")):
            if (path := run.lora(name, layout)).is_file():
                rows.append(f"| `{path.name}`{note} | {file.summary} | `{file.trigger}` |")
    return "\n".join(rows) + "\n"


def _samples(run: RunFolder) -> str:
    return f"![samples]({run.sheets[-1].relative_to(run.path).as_posix()})\n" if run.sheets else ""


def _small(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    return f"""## Use

These LoRAs fit only their base, `{base_name(config)}`. It is smaller than SDXL, so ComfyUI and similar programs
cannot load it. Sample with

```sh
{_commands(run, config, description)}
```
"""


def _commands(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    subject = config.sample_subject if isinstance(config, ImageConfig) else "dog"
    lines = []
    if "lora" in description.files or set(KINDS) <= description.files.keys():
        lines.append(f"unziplora sample {folder_argument(run.path)}")
    prompts = {"content": "{} on a beach", "style": f"a {subject} {{}}"}
    for name, file in description.files.items():
        if name != "lora":
            prompt = argument(prompts[name].format(file.trigger))
            lines.append(f"unziplora sample --{name} {folder_argument(run.path)} --prompts {prompt}")
    return "\n".join(lines)


def _programs(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    # A merged LoRA contains its two parts.
    titles = {file: run.lora(file).stem for file in (["lora"] if "lora" in description.files else description.files)}
    both, together = description.prompt, _together(run, description) if len(titles) > 1 else ""
    calls = " ".join(f"<lora:{title}:1>" for title in titles.values())
    loads = "\n".join(
        f'pipe.load_lora_weights({_string(run.path.as_posix())}, weight_name="{title}.safetensors", '
        f'adapter_name="{file}")'
        for file, title in titles.items()
    )
    return f"""## Use

Load the checkpoint of the training, `{base_name(config)}`. Begin with strength 1, as trained, and CFG
{config.sample_guidance:g}; turn the strength down if it dominates the picture.{together}

**ComfyUI**: copy to `ComfyUI/models/loras`, put one *Load LoRA* node per file between *Load Checkpoint* and the
sampler, prompt `{both}`.

**Forge, A1111**: copy to `models/Lora`, prompt `{both} {calls}`.

**InvokeAI**: *Models* → *Add Models* → path of the file; then choose it under *Concepts*.

**diffusers**:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.{_loading(config)}, torch_dtype=torch.float16).to("cuda")
{loads}
pipe.set_adapters({json.dumps(list(titles))}, {[1.0] * len(titles)})
pipe({_string(both)}, guidance_scale={config.sample_guidance:g}).images[0].save("picture.png")
```

**unziplora**:

```sh
{_commands(run, config, description)}
```
"""


def _together(run: RunFolder, description: RunDescription) -> str:
    """Describe the use of a content and a style LoRA together."""
    text = """

Either works alone, with its own trigger words. Both together restore the picture, or draw its content again in its
style.
"""
    if description.separate_prompts and any(run.samples.glob("*.png")):
        text += f"""The picture "together" in `samples` was made with a prompt for each LoRA. Other programs give both
the same one, as `unziplora sample {folder_argument(run.path)} --mode direct` does.
"""
    return text.rstrip()


def _loading(config: TrainingConfig) -> str:
    """Return the start of diffusers' call that opens the base, without its folder on this machine."""
    name = base_name(config)
    if not Path(config.base).expanduser().exists() and not name.endswith(".safetensors"):
        return f"from_pretrained({_string(name)}"
    call = "from_single_file" if name.endswith(".safetensors") else "from_pretrained"
    return f"{call}({_string('PATH/TO/' + name)}"


def _settings(config: TrainingConfig) -> str:
    values = {name: value for name, value in shared_settings(config).items() if value is not None}
    return f"<details><summary>Settings</summary>\n\n```toml\n{tomli_w.dumps(values)}```\n\n</details>\n"
