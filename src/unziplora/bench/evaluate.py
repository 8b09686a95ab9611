"""Evaluation of one method on one case: train, sample the LoRAs alone, together and mixed, compare with the truth."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unziplora.bench.cases import Case
from unziplora.bench.contenders import Adapters, Contender
from unziplora.bench.scores import Comparison, leak
from unziplora.bench.workspace import Workspace, json_hash, training_settings
from unziplora.config.templates import fill
from unziplora.lora.weights import Lora
from unziplora.metrics.embedders import ModelMeasure
from unziplora.metrics.measures import CaseMeasure
from unziplora.metrics.similarity import geometric_mean, similarity
from unziplora.models.base import Base
from unziplora.models.offload import base_on_cpu
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, generate
from unziplora.utils.files import atomic_write, write_png

TaskKind = Literal["content", "style", "both", "mix"]
SCORES, SAMPLES = "scores.json", "samples.json"


@dataclass(frozen=True)
class Task:
    """One prompt of the protocol.

    Attributes:
        target: the other style or concept, or the slug of the case whose style is used.
        truths: images that the results are compared with.
    """

    kind: TaskKind
    target: str
    prompts: Prompts
    loras: dict[str, Lora]
    truths: tuple[Image.Image, ...]

    @property
    def slug(self) -> str:
        """Beginning of the file names of its images."""
        return f"{self.kind}-{self.target.replace(' ', '-')}"


def make_tasks(case: Case, partner: Case, alone: Adapters, mixed: Adapters, token: str) -> list[Task]:
    """List all tasks of a case for the LoRAs of a method; a case that is its own partner is not mixed."""
    words = {"token": token, **case.words}
    content, style = fill(alone.content_phrase, words), fill(f"in {alone.style_phrase} style", words)
    tasks = [
        Task("content", e.word, Prompts(f"{content} in {e.word} style"), _present(content=alone.content), e.images)
        for e in case.targets
    ]
    tasks += [
        Task("style", e.word, Prompts(f"a {e.word} {style}"), _present(style=alone.style), e.images)
        for e in case.others
    ]
    tasks.append(_combined_task("both", case, case, alone, case.image, token))
    if partner.slug == case.slug:
        return tasks
    return [*tasks, _combined_task("mix", case, partner, mixed, case.mix, token)]


def _combined_task(
    kind: TaskKind, case: Case, styled: Case, adapters: Adapters, truth: Image.Image, token: str
) -> Task:
    """Make the task of a case's content in the style of `styled`."""
    words = {"token": token, **case.words, "style": styled.style}
    full = fill(f"{adapters.content_phrase} in {adapters.style_phrase} style", words)
    separate = [fill(text, words) for text in adapters.prompts or ()]
    loras = _present(lora=adapters.merged) or _present(content=adapters.content, style=adapters.style)
    return Task(kind, styled.slug, Prompts(full, *separate), loras, (truth,))


def _present(**loras: Lora | None) -> dict[str, Lora]:
    return {name: lora for name, lora in loras.items() if lora is not None}


def sample_task(base: Base, task: Task, seeds: Sequence[int], steps: int, guidance: float) -> list[Image.Image]:
    """Sample one image per seed and restore the base. Raises as `AttachedLoras` and `generate`."""
    loras = [NamedLora(name, lora, {}, f"{name} LoRA") for name, lora in task.loras.items()]
    with AttachedLoras(base, loras):
        return generate(base, task.prompts, seeds, Settings(steps=steps, guidance=guidance, batch_size=len(seeds)))


def score_images(measure: CaseMeasure, case: Case, task: Task, images: Sequence[Image.Image]) -> list[dict[str, float]]:
    """Return similarities to the truth, their geometric mean and the leak; one row per image.

    For the style alone, "content" is the kind of thing and not the drawing.
    """
    truths, style_alone = list(task.truths), task.kind == "style"
    compare: Comparison = getattr(measure, "compare", similarity)
    identity = measure.concept if style_alone else measure.content
    contents = compare(identity(images), identity(truths))
    image_styles, truth_styles = measure.style(images), measure.style(truths)
    styles = compare(image_styles, truth_styles)
    rows = [
        {"content": content, "style": style, "score": geometric_mean(content, style)}
        for content, style in zip(contents, styles, strict=True)
    ]
    if style_alone:
        leaks = leak(measure.content(images), measure.content(truths), measure.content([case.image]), compare)
    elif task.kind == "content":
        leaks = leak(image_styles, truth_styles, measure.style([case.image]), compare)
    else:
        return rows
    return [{**row, "leak": value} for row, value in zip(rows, leaks, strict=True)]


def evaluate(
    workspace: Workspace,
    base: Base,
    measures: Sequence[CaseMeasure],
    method: Contender,
    cases: dict[str, Case],
    case: Case,
    seed: int,
) -> dict[str, Any]:
    """Train, sample and score; return the contents of scores.json.

    Trainings, images and scores that exist with the same settings are reused.

    Raises:
        UserError, MachineError, Interrupted: as trainings and `generate`.
    """
    folder = workspace.run_folder(method.name, case, seed)
    settings = settings_hash(workspace, method, cases, case, seed)
    stored = _read_json(folder / SCORES)
    names = [measure.name for measure in measures]
    hashes = {measure.name: digest for measure in measures if (digest := getattr(measure, "weights_hash", ""))}
    same = all(stored.get("marks", {}).get(name, digest) == digest for name, digest in hashes.items())
    if stored.get("settings") == settings and set(names) <= set(stored.get("measures", [])) and same:
        return stored
    samples, images = _train_and_sample(workspace, base, method, (case, cases[case.partner]), seed, settings)
    rows = []
    with ExitStack() as stack:
        for measure in measures:
            if isinstance(measure, ModelMeasure):
                stack.enter_context(measure.on(base.device))
        for task, files in images:
            opened = [Image.open(file).convert("RGB") for file in files]
            values = {measure.name: score_images(measure, case, task, opened) for measure in measures}
            rows += [
                {"task": task.kind, "target": task.target, "seed": number, "file": f"samples/{file.name}"}
                | {"values": {name: scores[number] for name, scores in values.items()}}
                for number, file in enumerate(files)
            ]
    result = {"method": method.name, "case": case.slug, "seed": seed, "measures": names, "marks": hashes}
    result |= {**samples, "pictures": rows}
    atomic_write(folder / SCORES, json.dumps(result, indent=1) + "\n")
    return result


def _train_and_sample(
    workspace: Workspace, base: Base, method: Contender, pair: tuple[Case, Case], seed: int, settings: str
) -> tuple[dict[str, Any], list[tuple[Task, list[Path]]]]:
    """Train on a case and its partner, then sample all tasks unless the images exist with the same settings.

    Returns:
        The contents of samples.json, and the image files of each task.
    """
    case, partner = pair
    folder, config = workspace.run_folder(method.name, case, seed), workspace.config
    start = time.monotonic()
    recipes = [recipe for one in pair for recipe in method.recipes(workspace, one, seed)]
    trained = all(RunFolder(recipe.out).card.exists() for recipe in recipes)
    with nullcontext() if trained else base_on_cpu(base):
        alone = method.train(workspace, case, seed)
        mixed = alone if partner.slug == case.slug else method.mix(workspace, case, partner, seed)
    ready = time.monotonic()
    seeds = list(range(config.samples))
    files = [
        (task, [folder / "samples" / f"{task.slug}-{number}.png" for number in seeds])
        for task in make_tasks(case, partner, alone, mixed, config.token)
    ]
    samples = _read_json(folder / SAMPLES)
    if samples.get("settings") == settings and all(file.is_file() for _, paths in files for file in paths):
        return samples, files
    (folder / SAMPLES).unlink(missing_ok=True)  # from now on the images may be of two settings
    for task, paths in files:
        images = sample_task(base, task, seeds, config.sample_steps, config.guidance)
        for image, path in zip(images, paths, strict=True):
            write_png(path, image)
    seconds = {"training": round(ready - start, 2), "sampling": round(time.monotonic() - ready, 2)}
    samples = {"settings": settings, "seconds": seconds}
    atomic_write(folder / SAMPLES, json.dumps(samples) + "\n")
    return samples, files


def settings_hash(workspace: Workspace, method: Contender, cases: dict[str, Case], case: Case, seed: int) -> str:
    """Hash everything that affects the images: recipes, training images, prompts, sampling settings, version."""
    config, partner = workspace.config, cases[case.partner]
    values = [
        config.model_dump(mode="json", include={"base", "token", "samples", "sample_steps", "guidance", "precision"}),
        [training_settings(recipe) for one in (case, partner) for recipe in method.recipes(workspace, one, seed)],
        [_describe_case(one) for one in (case, partner)],
        version("unziplora"),
    ]
    return json_hash(values)


def _describe_case(case: Case) -> list[str]:
    """Return the words of a case and a hash of its images."""
    examples = [*case.targets, *case.others, *case.oracle_content, *case.oracle_style]
    images = [case.image, case.mix, *(image for example in examples for image in example.images)]
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
    return [case.slug, case.content, case.style, *(example.word for example in examples), digest]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or damaged, so that it is written again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
