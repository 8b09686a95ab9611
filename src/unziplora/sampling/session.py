"""Sampling sessions: a base with the LoRAs of a configuration attached, and the prompts to sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from unziplora.config.recipe import KINDS
from unziplora.config.sample import GenerationConfig, read_blocks
from unziplora.config.templates import warn_of_ui_syntax
from unziplora.formats.files import read_lora
from unziplora.formats.safetensors import body_hash
from unziplora.lora.weights import check_fits, check_strengths
from unziplora.models.base import Base, open_base
from unziplora.models.device import computing_on
from unziplora.models.sizes import described_unet, scale_of
from unziplora.models.text import Prompts
from unziplora.runs.folder import MERGED
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings
from unziplora.sampling.prompts import plan_prompts
from unziplora.sampling.sources import choose_base, choose_guidance, choose_size, find_loras
from unziplora.utils.files import absolute, file_stem


@dataclass(frozen=True)
class SamplingPlan:
    """Everything about a session that needs no weights of a base; `prompts` has one entry per image of a seed."""

    base: str
    loras: list[NamedLora]
    prompts: list[Prompts]
    settings: Settings


@dataclass(frozen=True)
class SamplingSession:
    """A base with LoRAs attached at the configured strengths, and the prompts to sample.

    Attributes:
        hashes: hash of each LoRA's file, by a name that reveals nothing of the machine.
        kinds: these names by kind, content or style.
    """

    base: Base
    loras: AttachedLoras
    prompts: list[Prompts]
    settings: Settings
    hashes: dict[str, str]
    kinds: dict[str, str]


@contextmanager
def open_session(config: GenerationConfig, base: Base | None = None) -> Iterator[SamplingSession]:
    """Load a base and attach LoRAs for sampling; a base that is passed in is left as it was.

    Raises:
        UserError, MachineError: as `plan_sampling`, `open_base` and `AttachedLoras`.
    """
    plan = plan_sampling(config, base)
    if base is None:
        base = open_base(plan.base, config.precision, config.device)
    files = {Path(named.source): named.lora.metadata.get("sshs_model_hash") for named in plan.loras}
    shared = shared_names(files)
    hashes = {shared[file]: recorded or body_hash(file) for file, recorded in files.items()}
    kinds = {named.name: shared[Path(named.source)] for named in plan.loras}
    with computing_on(base.device), AttachedLoras(base, plan.loras) as loras:
        loras.set_strengths(**{name: getattr(config, f"{name}_strength") for name in loras.names})
        yield SamplingSession(base, loras, plan.prompts, plan.settings, hashes, kinds)


def plan_sampling(config: GenerationConfig, base: Base | None = None) -> SamplingPlan:
    """Read the LoRAs of a configuration and fill its prompts; of a base, only the configuration is read.

    Raises:
        UserError: a LoRA, the base or a prompt is missing, damaged or does not fit.
        MachineError: a file cannot be read.
    """
    sources = find_loras(config)
    name = choose_base(config, sources) if base is None else base.name
    prompts = plan_prompts(config, sources)
    unet = described_unet(name) if base is None else base.unet
    files = {file: read_lora(file, unet and unet.config) for file in dict.fromkeys(source.file for source in sources)}
    if base is None and unet is not None:  # an open base is checked where the LoRAs are attached
        for file, lora in files.items():
            check_fits(lora, unet, str(file), f"base {name}")
    loras = []
    for source in sources:
        blocks = read_blocks(getattr(config, f"{source.kind}_blocks"))
        check_strengths(files[source.file], blocks, str(source.file))
        loras.append(NamedLora(source.kind, files[source.file], blocks, str(source.file)))
    warn_of_ui_syntax(text or "" for one in prompts for text in (one.full, one.content, one.style, config.negative))
    width, height = choose_size(config, sources, scale_of(name) if base is None else base.scale)
    keys = config.model_dump(include={"steps", "guidance_rescale", "negative", "scheduler", "batch_size"})
    settings = Settings(guidance=choose_guidance(config, sources), width=width, height=height, **keys)
    return SamplingPlan(name, loras, prompts, settings)


def shared_names(files: Iterable[Path]) -> dict[Path, str]:
    """Return the name under which others see each LoRA file.

    It is the file's own, with that of its folder in front if every run, or another of the files, has the same. Names
    that are still equal are numbered.
    """
    paths = {file: absolute(file) for file in files}
    common = Counter(file_stem(path) for path in paths.values()) + Counter([*KINDS, MERGED] * 2)
    names: dict[Path, str] = {}
    for file, path in paths.items():
        stem = file_stem(path)
        name = f"{path.parent.name}-{stem}" if common[stem] > 1 else stem
        taken = set(names.values())
        numbered = (f"{name}-{number}" for number in count(2))
        names[file] = name if name not in taken else next(one for one in numbered if one not in taken)
    return names
