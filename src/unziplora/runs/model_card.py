"""The README of a run folder: trigger words, use in each program, settings of the training."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from unziplora.config.bases import HUB_ID
from unziplora.config.recipe import KINDS
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import absolute
from unziplora.utils.text import table


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


def card(
    run: RunFolder,
    config: TrainingConfig,
    description: RunDescription,
    full_size: bool,
    findings: Sequence[str] = (),
) -> str:
    """Return the card as Markdown, with the front matter that model hubs read: first the use, at the end the settings.

    Args:
        run: the card names the LoRA files and samples that exist in it.
        full_size: the base has SDXL's own size, so that other programs can load the files.
        findings: sentences of a check of the LoRAs.
    """
    use = _programs(run, config, description) if full_size else _small(run, config, description)
    parts = [
        _head(config, description),
        _title(config, description),
        _files(run, description),
        use,
        _samples(run),
        _check(findings),
    ]
    origin = f"{description.origin} by unziplora {version('unziplora')} ({description.method}).\n"
    return "\n".join(part for part in (*parts, origin, _settings(config)) if part)


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
    return "one image" if len(config.images) == 1 else f"{len(config.images)} images"


def shared_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings for publication, without paths of this machine."""
    return {**config.model_dump(mode="json", exclude=config.marked("private")), "base": base_name(config)}


def base_name(config: TrainingConfig) -> str:
    """Return the name of the base for publication: the last part of a path, or the name as it is."""
    path = Path(config.base).expanduser()
    return config.base if HUB_ID.fullmatch(config.base) and not path.exists() else absolute(path).name


def _head(config: TrainingConfig, description: RunDescription) -> str:
    base = f"base_model: {config.base}\n" if HUB_ID.fullmatch(base_name(config)) else ""
    words = _string(description.prompt)
    return (
        f"---\n{base}instance_prompt: {words}\nlibrary_name: diffusers\n"
        "tags: [lora, sdxl, text-to-image, unziplora]\n---\n"
    )


def _string(text: str) -> str:
    """Quote a text for YAML and Python, which both read strings of JSON once what YAML cannot contain is escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", quoted)


def _plain(text: str) -> str:
    """Escape a text so that Markdown and HTML show it as it is."""
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Quote a text as code, by a fence longer than any in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _title(config: TrainingConfig, description: RunDescription) -> str:
    words = config.words()
    return f"# {_plain(', '.join(words[name] for name in KINDS if name in words) or description.prompt)}\n"


def _files(run: RunFolder, description: RunDescription) -> str:
    rows = []
    for name, file in description.files.items():
        for layout, note in (("kohya", ""), ("diffusers", " (diffusers layout)")):
            if (path := run.lora(name, layout)).is_file():
                rows.append((_code(path.name) + note, file.summary, _code(file.trigger)))
    return table(("file", "gives", "trigger words"), rows) + "\n"


def _place(run: RunFolder) -> Path:
    """Return the run folder as it was given, or `.`: a published card contains no path of this machine."""
    return Path(".") if run.path.is_absolute() else run.path


def _where(run: RunFolder) -> str:
    """Return a comment on where commands with `_place` work, if that is not where the run began."""
    return "# in the folder of this file\n" if run.path.is_absolute() else ""


def _samples(run: RunFolder) -> str:
    return f"![samples]({run.sheets[-1].relative_to(run.path).as_posix()})\n" if run.sheets else ""


def _check(findings: Sequence[str]) -> str:
    lines = "".join(f"- {_plain(line)}\n" for line in findings)
    return f"## Check\n\n{lines}" if findings else ""


def _small(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    return f"""## Use

These LoRAs fit only their base, {_code(base_name(config))}. It is smaller than SDXL, so ComfyUI and similar programs
cannot load it. Sample with

```sh
{_where(run)}{_commands(run, config, description)}
```
"""


def _commands(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    subject = config.sample_subject if isinstance(config, ImageConfig) else "dog"
    lines = []
    if "lora" in description.files or set(KINDS) <= description.files.keys():
        lines.append(f"unziplora sample {folder_argument(_place(run))}")
    prompts = {"content": "{} on a beach", "style": f"a {subject} {{}}"}
    for name, file in description.files.items():
        if name != "lora":
            prompt = argument(" ".join(prompts[name].replace("{}", file.trigger).split()))
            lines.append(f"unziplora sample --{name} {folder_argument(_place(run))} --prompts {prompt}")
    return "\n".join(lines)


def _programs(run: RunFolder, config: TrainingConfig, description: RunDescription) -> str:
    # A merged LoRA contains its two parts.
    titles = {file: run.lora(file).stem for file in (["lora"] if "lora" in description.files else description.files)}
    both, together = _code(description.prompt), _together(run, description) if len(titles) > 1 else ""
    calls = " ".join(f"<lora:{title}:1>" for title in titles.values())
    loads = "\n".join(
        f'pipe.load_lora_weights({_string(_place(run).as_posix())}, weight_name="{title}.safetensors", '
        f'adapter_name="{file}")'
        for file, title in titles.items()
    )
    return f"""## Use

Load the checkpoint of the training, {_code(base_name(config))}. Begin with strength 1, as trained, and CFG
{config.sample_guidance:g}; turn the strength down if it dominates the image.{together}

**ComfyUI**: copy to `ComfyUI/models/loras`, put one *Load LoRA* node per file between *Load Checkpoint* and the
sampler, prompt {both}.

**Forge, A1111**: copy to `models/Lora`, prompt {_code(f"{description.prompt} {calls}")}.

**InvokeAI**: *Models* → *Add Models* → path of the file; then choose it under *Concepts*.

**diffusers**:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.{_loading(config)}, torch_dtype=torch.float16).to("cuda")
{_where(run)}{loads}
pipe.set_adapters({json.dumps(list(titles))}, {[1.0] * len(titles)})
pipe({_string(description.prompt)}, guidance_scale={config.sample_guidance:g}).images[0].save("image.png")
```

**unziplora**:

```sh
{_where(run)}{_commands(run, config, description)}
```
"""


def _together(run: RunFolder, description: RunDescription) -> str:
    """Describe the use of a content and a style LoRA together."""
    text = """

Either works alone, with its own trigger words. Both together restore the image, or draw its content again in its
style.
"""
    if description.separate_prompts and any(run.samples.glob("*.png")):
        text += f"""The image "together" in `samples` was made with a prompt for each LoRA. Other programs give both
the same one, as `unziplora sample {folder_argument(_place(run))} --mode direct` does.
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
