"""The check of a split against the truth: `python benchmarks/check.py FOLDER`.

FOLDER is that of `unziplora bench --methods unziplora` on the bundled base, with its runs. A row per run has the
check's scores and the true one. Then: how often the check finds the better one of two seeds, and the best one of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from statistics import correlation, mean
from typing import NamedTuple

import torch
from PIL import Image

from unziplora.bench.cases import load_cases
from unziplora.config.recipe import KINDS
from unziplora.config.split import SplitConfig
from unziplora.formats.files import read_lora
from unziplora.lora.weights import Lora
from unziplora.methods.unziplora.check import SEEDS, drawing_steps, prompts_alone, without_token
from unziplora.metrics.measures import Trained
from unziplora.metrics.separation import Alone, Separation, measure_separation
from unziplora.metrics.similarity import harmonic_mean
from unziplora.models.base import Base, load_base
from unziplora.runs.folder import RunFolder
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, generate


class Checked(NamedTuple):
    """One run: its case and seed, the score of the check, the true score."""

    case: str
    seed: str
    found: float
    true: float


def draw(base: Base, config: SplitConfig, prompts: list[str], lora: Lora | None) -> list[Image.Image]:
    """Draw as the check does, with one LoRA or with none."""
    settings = Settings(steps=drawing_steps(config), guidance=config.sample_guidance, batch_size=len(SEEDS))
    with AttachedLoras(base, [NamedLora("lora", lora, {}, "lora")] if lora else []):
        return [image for prompt in prompts for image in generate(base, prompt, SEEDS, settings)]


def check(base: Base, run: RunFolder, learned: Image.Image) -> Separation:
    """Check the LoRAs of a finished run."""
    config = run.config(SplitConfig)
    content, style = prompts_alone(config)
    plain = [without_token(prompt, config) for prompt in content]
    return measure_separation(
        Trained(),
        [learned],
        Alone(draw(base, config, content, read_lora(run.content)), draw(base, config, plain, None)),
        Alone(draw(base, config, style, read_lora(run.style)), draw(base, config, style, None)),
    )


def true_score(folder: Path) -> float:
    """Return the harmonic mean of the true scores of content and style, as the benchmark stored them."""
    rows = json.loads((folder / "scores.json").read_text())["pictures"]
    content, style = (mean(row["values"]["trained"]["score"] for row in rows if row["task"] == kind) for kind in KINDS)
    return harmonic_mean(content, style)


def main() -> None:
    """Print a row per run, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    base, cases, runs = load_base("bundled", torch.float32, "cpu"), {**load_cases("dev"), **load_cases("test")}, []
    for place in sorted(folder.glob("runs/unziplora/*/seed-*")):
        run = RunFolder(place / "split")
        if run.card.exists() and (place / "scores.json").exists():
            found = check(base, run, cases[place.parent.name].image)
            runs.append(Checked(place.parent.name, place.name, found.score, true_score(place)))
            print(f"{' '.join(runs[-1][:2])}: check {found.score:.2f}, true {runs[-1].true:.2f}, {found}", flush=True)
    print(f"correlation over {len(runs)} runs: {correlation([r.found for r in runs], [r.true for r in runs]):.2f}")
    by_case = [list(group) for _, group in itertools.groupby(runs, lambda run: run.case)]
    pairs = [pair for group in by_case for pair in itertools.combinations(group, 2)]
    better = sum((one.found > two.found) == (one.true > two.true) for one, two in pairs)
    print(f"the better one of two seeds: {better} of {len(pairs)}")
    whole = [group for group in by_case if len(group) > 2]
    chosen = [max(group, key=lambda run: run.found).true for group in whole]
    best = [max(run.true for run in group) for group in whole]
    print(f"the best one of three or more: {sum(map(float.__eq__, chosen, best))} of {len(whole)}")
    if whole:
        usual = mean(run.true for group in whole for run in group)
        print(f"true score: any seed {usual:.3f}, chosen {mean(chosen):.3f}, best {mean(best):.3f}")


if __name__ == "__main__":
    main()
