"""One method on one case: train, sample what the LoRAs give alone, together and mixed, compare with the truth."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unziplora.bench.cases import Case
from unziplora.bench.contender import Adapters, Contender
from unziplora.bench.scores import leak, product, similarity
from unziplora.bench.workspace import Workspace, fingerprint, plain
from unziplora.lora.weights import Lora
from unziplora.metrics.measures import Measure
from unziplora.models.base import Base
from unziplora.models.offload import base_on_cpu
from unziplora.models.text import Prompts
from unziplora.sampling.adapters import AttachedLoras, Part
from unziplora.sampling.pipeline import Settings, generate
from unziplora.utils.files import atomic_write, write_png

Task = Literal["content", "style", "both", "mix"]
SCORES, SAMPLES = "scores.json", "samples.json"


@dataclass(frozen=True)
class Ask:
    """One prompt of the protocol.

    Attributes:
        task: content alone, style alone, both, or the content with another case's style.
        target: the other style or concept, or the case whose style is taken.
        prompts: what the base and the LoRAs see.
        loras: what is mounted, by name.
        truths: what the pictures should look like.
    """

    task: Task
    target: str
    prompts: Prompts
    loras: dict[str, Lora]
    truths: tuple[Image.Image, ...]

    @property
    def slug(self) -> str:
        """The beginning of its pictures' file names."""
        return f"{self.task}-{self.target.replace(' ', '-')}"


def asks(case: Case, partner: Case, alone: Adapters, mixed: Adapters, token: str) -> list[Ask]:
    """Everything that is asked of a method's LoRAs, task by task."""
    words = {"token": token, **case.words}
    subject, manner = alone.subject.format(**words), alone.manner.format(**words)
    found = [
        Ask("content", e.word, Prompts(f"{subject} in {e.word} style"), _named(content=alone.content), e.pictures)
        for e in case.targets
    ]
    found += [
        Ask("style", e.word, Prompts(f"a {e.word} in {manner} style"), _named(style=alone.style), e.pictures)
        for e in case.others
    ]
    for task, styled, made, truth in (("both", case, alone, case.picture), ("mix", partner, mixed, case.mix)):
        words = {"token": token, **case.words, "style": styled.style}
        full = f"{made.subject} in {made.manner} style".format(**words)
        seen = [text.format(**words) for text in made.prompts or ()]
        loras = _named(lora=made.merged) or _named(content=made.content, style=made.style)
        name: Task = "both" if task == "both" else "mix"
        found.append(Ask(name, styled.slug, Prompts(full, *seen), loras, (truth,)))
    return found


def _named(**loras: Lora | None) -> dict[str, Lora]:
    return {name: lora for name, lora in loras.items() if lora is not None}


def draw(base: Base, ask: Ask, seeds: Sequence[int], steps: int, guidance: float) -> list[Image.Image]:
    """One picture per seed; the base is left as it was. Errors as in `AttachedLoras` and `generate`."""
    parts = [Part(name, lora, {}, f"{name} LoRA") for name, lora in ask.loras.items()]
    mounted = AttachedLoras(base, parts, separate=ask.prompts.separate)
    try:
        return generate(base, ask.prompts, seeds, Settings(steps=steps, guidance=guidance, batch_size=len(seeds)))
    finally:
        mounted.remove()


def score(measure: Measure, case: Case, ask: Ask, made: Sequence[Image.Image]) -> list[dict[str, float]]:
    """Similarities of pictures to the truth, their product and what leaked; one row per picture.

    Where the style alone is asked for, content means the kind of thing, not the drawing.
    """
    truths, style_alone = list(ask.truths), ask.task == "style"
    identity = measure.concept if style_alone else measure.content
    contents = similarity(identity(made), identity(truths))
    made_styles, true_styles = measure.style(made), measure.style(truths)
    styles = similarity(made_styles, true_styles)
    rows = [
        {"content": content, "style": style, "score": product(content, style)}
        for content, style in zip(contents, styles, strict=True)
    ]
    leaks: list[float] = []
    if style_alone:
        leaks = leak(measure.content(made), measure.content(truths), measure.content([case.picture]))
    elif ask.task == "content":
        leaks = leak(made_styles, true_styles, measure.style([case.picture]))
    for row, value in zip(rows, leaks, strict=False):
        row["leak"] = value
    return rows


def evaluate(
    place: Workspace,
    base: Base,
    measures: Sequence[Measure],
    method: Contender,
    cases: dict[str, Case],
    case: Case,
    seed: int,
) -> dict[str, Any]:
    """Train, sample and score; return what scores.json holds.

    What is there already with the same settings is kept: trainings, pictures, scores.

    Raises:
        UserError, MachineError, Interrupted: as trainings and `generate`.
    """
    folder = place.run_folder(method.name, case, seed)
    partner, settings = cases[case.partner], settings_hash(place, method, cases, case, seed)
    found = _read(folder / SCORES)
    names = [measure.name for measure in measures]
    marks = {measure.name: mark for measure in measures if (mark := getattr(measure, "mark", ""))}
    same = all(found.get("marks", {}).get(name, mark) == mark for name, mark in marks.items())
    if found.get("settings") == settings and set(names) <= set(found.get("measures", [])) and same:
        return found
    start = time.monotonic()
    with base_on_cpu(base):
        alone = method.train(place, case, seed)
        mixed = method.mix(place, case, partner, seed)
    trained = time.monotonic()
    listed, seeds = asks(case, partner, alone, mixed, place.config.token), list(range(place.config.samples))
    known = _read(folder / SAMPLES)
    named = [[folder / "samples" / f"{ask.slug}-{number}.png" for number in seeds] for ask in listed]
    keep = known.get("settings") == settings and all(file.is_file() for files in named for file in files)
    if not keep:
        (folder / SAMPLES).unlink(missing_ok=True)  # from now on the pictures may be of two settings
    rows = []
    for ask, files in zip(listed, named, strict=True):
        made = _opened(files) if keep else _drawn(place, base, ask, seeds, files)
        values = {measure.name: score(measure, case, ask, made) for measure in measures}
        rows += [
            {"task": ask.task, "target": ask.target, "seed": number, "file": f"samples/{file.name}"}
            | {"values": {name: scored[index] for name, scored in values.items()}}
            for index, (number, file) in enumerate(zip(seeds, files, strict=True))
        ]
    if not keep:
        seconds = {"training": round(trained - start, 2), "sampling": round(time.monotonic() - trained, 2)}
        known = {"settings": settings, "seconds": seconds}
        atomic_write(folder / SAMPLES, json.dumps(known) + "\n")
    result = {"method": method.name, "case": case.slug, "seed": seed, "measures": names, "marks": marks}
    result |= {**known, "pictures": rows}
    atomic_write(folder / SCORES, json.dumps(result, indent=1) + "\n")
    return result


def settings_hash(place: Workspace, method: Contender, cases: dict[str, Case], case: Case, seed: int) -> str:
    """A fingerprint of everything that decides the pictures: recipes, pictures learned, prompts, sampling, version."""
    config, partner = place.config, cases[case.partner]
    told = [
        config.model_dump(mode="json", include={"base", "token", "samples", "sample_steps", "guidance", "precision"}),
        [plain(recipe) for one in (case, partner) for recipe in method.recipes(place, one, seed)],
        [_fingerprint(one) for one in (case, partner)],
        version("unziplora"),
    ]
    return fingerprint(told)


def _fingerprint(case: Case) -> list[str]:
    examples = [*case.targets, *case.others, *case.oracle_content, *case.oracle_style]
    pictures = [case.picture, case.mix, *(picture for example in examples for picture in example.pictures)]
    sums = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()
    return [case.slug, case.content, case.style, *(example.word for example in examples), sums]


def _drawn(place: Workspace, base: Base, ask: Ask, seeds: Sequence[int], files: Sequence[Path]) -> list[Image.Image]:
    made = draw(base, ask, seeds, place.config.sample_steps, place.config.guidance)
    for picture, file in zip(made, files, strict=True):
        write_png(file, picture)
    return made


def _opened(files: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none, or a damaged one: it is made anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
