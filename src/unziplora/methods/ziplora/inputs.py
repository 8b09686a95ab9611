"""Two LoRAs of any origin to be merged: their files, the words of their runs, the pictures learned, their plain sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unziplora.config.recipe import KINDS, resolve
from unziplora.config.zip import ZipConfig, joined_prompt
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.lora.algebra import Pair, cat, scale, shape
from unziplora.lora.weights import Lora, format_shape
from unziplora.methods.class_images import FIRST_SEED
from unziplora.methods.data import conditioning_of, latents_of
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, generate_latents
from unziplora.sampling.sources import find_lora, require_available, training_base
from unziplora.training.loss import Examples, to_device
from unziplora.training.method import Setup


def complete(config: ZipConfig, base: Base | None = None) -> ZipConfig:
    """The recipe with what the LoRAs' own runs tell where it is silent: base, prompts, pictures, guidance.

    Args:
        base: used instead of looking for one, if it is loaded already.

    Raises:
        UserError: a LoRA is not there, or they were trained on different bases, or on one that is needed and not here.
    """
    given = {name: value for name, value in config.model_dump(exclude_unset=True).items() if value is not None}
    sources = {name: find_lora(getattr(config, f"{name}_lora"), name) for name in KINDS}
    found: dict[str, Any] = {}
    for run in (source.settings for source in reversed(sources.values()) if source.settings.get("sample_guidance")):
        found["sample_guidance"] = run["sample_guidance"]
        found["generated_guidance"] = run.get("generated_guidance", run["sample_guidance"])  # one key, in older runs
    for name, source in sources.items():
        # A sum needs words for its card alone, so a trigger word will do; ZipLoRA trains with them.
        if prompt := source.filled_prompt(name) or (source.trigger if config.method == "direct" else None):
            found[f"{name}_prompt"] = prompt
        if config.method == "zip":
            pictures = [Path(path) for path in source.settings.get("images", [])]
            found[f"{name}_images"] = [path for path in pictures if path.is_file()]
    if base is not None:
        found["base"] = base.name
    elif "base" not in given and (common := training_base(sources.values())):
        found["base"] = common if config.method == "direct" else require_available(common, sources.values())
    values = {**found, **given}
    if values.keys() >= {"content_prompt", "style_prompt"}:
        values.setdefault("full_prompt", joined_prompt(values["content_prompt"], values["style_prompt"]))
    return resolve(ZipConfig, values)


def read_loras(config: ZipConfig, unet_config: Mapping[str, Any] | None = None) -> dict[str, Lora]:
    """Both LoRAs by name, at their strengths.

    Args:
        unet_config: the base UNet's configuration, if known: settles doubts about small bases.

    Raises:
        UserError: a file is missing or no plain LoRA, or the two belong to bases of different shapes.
    """
    loras = {}
    for name in KINDS:
        lora = read_lora(find_lora(getattr(config, f"{name}_lora"), name).file, unet_config)
        strength = getattr(config, f"{name}_strength")
        modules = {path: scale(pair, strength) for path, pair in lora.modules.items()}
        text = {path: scale(pair, strength) for path, pair in lora.text.items()}
        loras[name] = replace(lora, modules=modules, text=text)
    content, style = ({**loras[name].modules, **loras[name].text} for name in KINDS)
    for path in content.keys() & style.keys():
        one, two = shape(content[path]), shape(style[path])
        if one != two:
            raise UserError(
                f"the LoRAs were made for bases of different shapes: {path} is {format_shape(one)} in "
                f"{config.content_lora} and {format_shape(two)} in {config.style_lora}. Take two of the same base"
            )
    return loras


def merge(loras: Mapping[str, Lora]) -> Lora:
    """The LoRA of the sum of several, exactly: of rank Σ rᵢ where they share a module; text encoders included."""
    unet, text = [lora.modules for lora in loras.values()], [lora.text for lora in loras.values()]
    return Lora(_summed(unet), text=_summed(text))


def _summed(parts: list[dict[str, Pair]]) -> dict[str, Pair]:
    return {path: cat([part[path] for part in parts if path in part]) for path in dict.fromkeys(chain(*parts))}


def check_zippable(config: ZipConfig, loras: Mapping[str, Lora]) -> None:
    """Refuse what column scales cannot be put on: convolutions, LoRAs without a common layer.

    Raises:
        UserError: names the file, and what to do instead.
    """
    for name, lora in loras.items():
        if any(down.dim() > 2 for down, _ in lora.modules.values()):
            raise UserError(
                f"{getattr(config, f'{name}_lora')}: it changes convolutions, which have no column scales; "
                "--method direct adds them as they are"
            )
    if not shared_layers(loras):
        raise UserError(
            f"{config.content_lora} and {config.style_lora} have no layer in common, so nothing can be in each "
            "other's way: take --method direct"
        )


def shared_layers(loras: Mapping[str, Lora]) -> list[str]:
    """The modules that both LoRAs have, in the order of the content LoRA."""
    content, style = (loras[name].modules for name in KINDS)
    return [path for path in content if path in style]


@dataclass(frozen=True)
class LearnedExamples:
    """What both LoRAs learned, by LoRA name: pictures with the conditioning of the LoRA's prompt.

    Attributes:
        alone: the prompt as the LoRA's own text encoders read it.
        merged: the same pictures; the prompt as the text encoders with both LoRAs read it.
        texts: the LoRAs' parts of the text encoders, which stay in the base; a LoRA may have none.
    """

    alone: dict[str, Examples]
    merged: dict[str, Examples]
    texts: AttachedLoras


def learned(
    setup: Setup, config: ZipConfig, loras: Mapping[str, Lora], pictures: Mapping[str, list[Image.Image]]
) -> LearnedExamples:
    """What the LoRAs learned: their pictures, else some that each makes itself; text encoders are changed in place."""
    base, prompts = setup.base, config.prompts()
    parts = {name: NamedLora(name, lora, {}, str(getattr(config, f"{name}_lora"))) for name, lora in loras.items()}
    latents = {name: _latents(setup, config, parts[name], pictures[name]) for name in KINDS}
    told = [replace(part, lora=replace(part.lora, modules={})) for part in parts.values() if part.lora.text]
    texts = AttachedLoras(base, told)

    def read(name: str) -> Examples:
        made = conditioning_of(base, Prompts(prompts[name]), setup.size, len(latents[name]))
        return to_device(Examples(latents[name], made), base)

    merged = {name: read(name) for name in KINDS}
    alone = dict(merged)
    for name in KINDS:
        if others := [part.name for part in told if part.name != name]:
            with texts.muted(*others):
                alone[name] = read(name)
    return LearnedExamples(alone, merged, texts)


def _latents(setup: Setup, config: ZipConfig, part: NamedLora, pictures: list[Image.Image]) -> Tensor:
    """Latents of the pictures, or of some that the base makes with this LoRA in it, [N, C, h, w]."""
    if pictures:
        return latents_of(setup.base, pictures)
    text = config.prompts()[part.name]
    setup.report(f"the {part.name} LoRA makes {config.teacher_images} pictures to learn from: {text}")
    settings = Settings.square(
        setup.size, steps=config.generated_steps, guidance=config.generated_guidance, batch_size=config.batch_size
    )
    seeds = [FIRST_SEED + number for number in range(config.teacher_images)]
    with AttachedLoras(setup.base, [part]):
        return generate_latents(setup.base, text, seeds, settings)
