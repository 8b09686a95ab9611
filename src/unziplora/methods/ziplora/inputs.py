"""Inputs of a merge: two LoRAs of any origin, the settings of their runs, the images they learned, their plain sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from unziplora.config.recipe import KINDS, resolve
from unziplora.config.training import default_fit, read_crop
from unziplora.config.zip import ZipConfig, joined_prompt
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.images.preprocess import ImageFile
from unziplora.lora.algebra import Pair, cat, project, scale, shape
from unziplora.lora.weights import Lora, check_fits, format_shape
from unziplora.methods.class_images import FIRST_SEED
from unziplora.methods.data import conditioning_of, generation_settings, latents_of, sizes_of
from unziplora.models.base import Base
from unziplora.models.text import Prompts, time_ids
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import generate_latents
from unziplora.sampling.sources import find_lora, require_available, training_base
from unziplora.training.loss import Examples, to_device
from unziplora.training.method import ImageGroup, Setup

PRINCIPAL = 0.9
"""Null-space projection removes the input directions that make up this share of the style's ‖ΔW‖²."""


def complete(config: ZipConfig, base: Base | None = None) -> ZipConfig:
    """Complete a recipe from the LoRAs' own runs: base, prompts, images, guidance; its own values win.

    Args:
        base: used instead of looking for one, if it is loaded already.

    Raises:
        UserError: a LoRA is missing, the two were trained on different bases, or their base is needed and missing.
    """
    settings = {name: value for name, value in config.model_dump(exclude_unset=True).items() if value is not None}
    sources = {name: find_lora(path, name) for name, path in config.loras.items()}
    defaults: dict[str, Any] = {}
    for run in (source.settings for source in reversed(sources.values()) if source.settings.get("sample_guidance")):
        defaults["sample_guidance"] = run["sample_guidance"]
        defaults["generated_guidance"] = run.get("generated_guidance", run["sample_guidance"])  # one key, in older runs
    for name, source in sources.items():
        # A sum needs a prompt for its card only, so a trigger word is enough; ZipLoRA trains with the prompt.
        if prompt := source.filled_prompt(name) or (None if config.method == "zip" else source.trigger):
            defaults[f"{name}_prompt"] = prompt
        if config.method == "zip":
            images = [Path(path) for path in source.settings.get("images", [])]
            defaults[f"{name}_images"] = [path for path in images if path.is_file()]
    if base is not None:
        defaults["base"] = base.name
    elif "base" not in settings and (common := training_base(sources.values())):
        defaults["base"] = require_available(common, sources.values()) if config.method == "zip" else common
    values = {**defaults, **settings}
    if values.keys() >= {"content_prompt", "style_prompt"}:
        values.setdefault("full_prompt", joined_prompt(values["content_prompt"], values["style_prompt"]))
    return resolve(ZipConfig, values)


def read_loras(config: ZipConfig, unet_config: Mapping[str, Any] | None = None) -> dict[str, Lora]:
    """Read both LoRAs, at their strengths; return them by name.

    Args:
        unet_config: the base UNet's configuration, if known; resolves ambiguous keys of small bases.

    Raises:
        UserError: a file is missing or not a plain LoRA, or the two belong to bases of different shapes.
    """
    loras = {}
    for name, file in config.loras.items():
        lora, strength = read_lora(find_lora(file, name).file, unet_config), config.strengths[name]
        modules = {path: scale(pair, strength) for path, pair in lora.modules.items()}
        text = {path: scale(pair, strength) for path, pair in lora.text.items()}
        loras[name] = replace(lora, modules=modules, text=text)
    content, style = ({**loras[name].modules, **loras[name].text} for name in KINDS)
    for path in content.keys() & style.keys():
        one, two = shape(content[path]), shape(style[path])
        if one != two:
            raise UserError(
                f"the LoRAs were made for bases of different shapes: {path} is {format_shape(one)} in "
                f"{config.content_lora} and {format_shape(two)} in {config.style_lora}. Choose two of the same base"
            )
    return loras


def project_content(content: Lora, style: Lora, share: float) -> Lora:
    """Return the content LoRA projected away from the style's principal input directions (arXiv 2511.11051).

    Text encoders have no part in it, as in ZipLoRA.

    Args:
        share: see `project`.
    """
    modules = {
        path: project(pair, style.modules[path], share, PRINCIPAL) if path in style.modules else pair
        for path, pair in content.modules.items()
    }
    return replace(content, modules=modules)


def merge(loras: Mapping[str, Lora]) -> Lora:
    """Return the exact sum of several LoRAs, text encoders included; shared modules get rank Σ rᵢ."""
    unet, text = [lora.modules for lora in loras.values()], [lora.text for lora in loras.values()]
    return Lora(_summed(unet), text=_summed(text))


def _summed(parts: list[dict[str, Pair]]) -> dict[str, Pair]:
    return {path: cat([part[path] for part in parts if path in part]) for path in dict.fromkeys(chain(*parts))}


def check_zippable(config: ZipConfig, loras: Mapping[str, Lora], unet: nn.Module | None) -> None:
    """Check that the LoRAs have a common layer, whose columns can be scaled, and fit the base's UNet if it is known.

    Raises:
        UserError: they do not.
    """
    if not shared_layers(loras):
        raise UserError(
            f"{config.content_lora} and {config.style_lora} have no layer in common, so there is nothing "
            "to separate; use --method direct"
        )
    if unet is not None:
        for name, lora in loras.items():
            check_fits(lora, unet, str(config.loras[name]), f"base {config.base}")


def shared_layers(loras: Mapping[str, Lora]) -> list[str]:
    """Return the modules that both LoRAs have, in the order of the content LoRA."""
    content, style = (loras[name].modules for name in KINDS)
    return [path for path in content if path in style]


@dataclass(frozen=True)
class TeacherExamples:
    """Two LoRAs by name, and what they learned: images with the conditioning of their prompts.

    Attributes:
        loras: at their strengths.
        alone: prompts encoded with the LoRA's own text encoders.
        merged: the same images; prompts encoded with the text encoders of both LoRAs.
        texts: text-encoder parts of the LoRAs, attached to the base; a LoRA may have none.
        images: the images, content first; none if the LoRAs generated them.
    """

    loras: Mapping[str, Lora]
    alone: dict[str, Examples]
    merged: dict[str, Examples]
    texts: AttachedLoras
    images: Sequence[Image.Image]


def learned_images(config: ZipConfig, name: str) -> ImageGroup:
    """Return the images of a LoRA; those of its run are cropped and fitted as they were there."""
    paths: list[Path] = getattr(config, f"{name}_images")
    run = find_lora(config.loras[name], name).settings
    learned = list(zip_longest(run.get("images", []), run.get("masks", []), run.get("crop", [])))
    own = {str(path) for path in paths} <= {image for image, *_ in learned}
    files = []
    for path in paths:
        part = next((part for part in learned if part[0] == str(path)), None) if own else None
        _, mask, crop = part or (None, None, None)
        if part:
            learned.remove(part)  # an image may have been learned twice, in two crops
        mask = Path(mask) if mask and Path(mask).is_file() else None
        files.append(ImageFile(path, mask, read_crop(crop) if crop else None))
    if any(file.mask is None for file in files):  # all images have masks, or none does
        files = [replace(file, mask=None) for file in files]
    return ImageGroup(files, (own and run.get("fit")) or default_fit(config.base))


def encode_teachers(setup: Setup, config: ZipConfig, loras: Mapping[str, Lora]) -> TeacherExamples:
    """Encode the images of the LoRAs, or images that they generate; the base's text encoders change in place."""
    base, prompts = setup.base, config.filled_prompts()
    parts = {name: NamedLora(name, lora, {}, str(config.loras[name])) for name, lora in loras.items()}
    latents = {name: _latents(setup, config, parts[name]) for name in KINDS}
    text_parts = [replace(part, lora=replace(part.lora, modules={})) for part in parts.values() if part.lora.text]
    texts = AttachedLoras(base, text_parts)

    def encode(name: str) -> Examples:
        images, count = setup.images.groups[name], len(latents[name])
        sizes = sizes_of(images) if images else time_ids(*setup.size, count)
        conditioning = conditioning_of(base, Prompts(prompts[name]), sizes)
        return to_device(Examples(latents[name], conditioning), base)

    merged = {name: encode(name) for name in KINDS}
    alone = dict(merged)
    for name in KINDS:
        if others := [part.name for part in text_parts if part.name != name]:
            with texts.muted(*others):
                alone[name] = encode(name)
    return TeacherExamples(loras, alone, merged, texts, [image for name in KINDS for image in setup.images.of(name)])


def _latents(setup: Setup, config: ZipConfig, part: NamedLora) -> Tensor:
    """Return latents of the LoRA's images, or of some that the base generates with it, [N, C, h, w]."""
    if images := setup.images.of(part.name):
        return latents_of(setup.base, images)
    text = config.filled_prompts()[part.name]
    setup.report(f"generating {config.teacher_images} images with the {part.name} LoRA: {text}")
    seeds = [FIRST_SEED + number for number in range(config.teacher_images)]
    with AttachedLoras(setup.base, [part]):
        return generate_latents(setup.base, text, seeds, generation_settings(setup, config))
