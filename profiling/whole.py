"""Peak memory and time of whole runs of `split` on full-size SDXL, next to the estimate of `--dry-run`.

    python profiling/whole.py --base /tmp/sdxl

SDXL's weights are random, which neither time nor memory depends on; they are written to the folder on first use (7 GB).
Every run reads the base, encodes an image, trains a few steps, writes both files and samples. Peak memory is what
torch allocated at once, and what else is held on the card, which nobody else may use meanwhile; "reserved" is what
torch took of the card, some of it for later. `--card 12` gives it no more than a card of 12 GiB has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from unziplora.config.split import SplitConfig
from unziplora.methods.unziplora.method import UnZipLora, split
from unziplora.models.checkpoint import clip_tokenizer
from unziplora.models.folder import PARTS, read_json
from unziplora.models.sizes import FULL_SIZE, build_part, inspect_base
from unziplora.training.memory import estimate

CHECKPOINTING = {"gradient_checkpointing": True}
EIGHT_BIT = {**CHECKPOINTING, "optimizer": "adamw8bit"}
RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "768": {"resolution": 768},
    "512": {"resolution": 512},
    "checkpointing": CHECKPOINTING,
    "checkpointing-768": {**CHECKPOINTING, "resolution": 768},
    "checkpointing-512": {**CHECKPOINTING, "resolution": 512},
    "8bit": EIGHT_BIT,
    "8bit-512": {**EIGHT_BIT, "resolution": 512},
    "paper": {"preset": "paper", "optimizer": "adamw"},
}
HEAD = "| run | estimate, GiB | peak | reserved | seconds per step |\n|---|---|---|---|---|"
LINE = "| {run} | {estimate:.1f} | {peak:.1f} | {reserved:.1f} | {seconds:.2f} |"


def write_random_sdxl(folder: Path, device: str) -> None:
    """SDXL's pipeline with random weights in half precision."""
    index = read_json(FULL_SIZE / "model_index.json")
    torch.manual_seed(0)
    with torch.device(device):
        parts = {name: build_part(FULL_SIZE, name, index).half() for name in PARTS}
    StableDiffusionXLPipeline(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        scheduler=EulerDiscreteScheduler.from_config(read_json(FULL_SIZE / "scheduler" / "scheduler_config.json")),
        add_watermarker=False,
    ).save_pretrained(folder)


def settings(name: str, options: argparse.Namespace, folder: Path) -> SplitConfig:
    """A short run: every phase of a real one, with few steps in each."""
    image = folder / "image.png"
    Image.effect_mandelbrot((1024, 1024), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(image)
    # One choice of columns, in the first half, whose steps are not timed.
    short: dict[str, Any] = {"steps": options.steps, "column_periods": 1, "column_warmup": 1}
    short |= {"sample_seeds": [0], "sample_steps": 4}
    place: dict[str, Any] = {"images": [image], "content": "cat", "style": "ink", "base": str(options.base)}
    return SplitConfig(out=folder / name, **place, **short, device=options.device, **RUNS[name])


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """GiB and seconds of one run."""
    config = settings(name, options, folder)
    sizes = inspect_base(config.base)
    expected = estimate(config, sizes, UnZipLora.layers(config, sizes.names)).total
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run = split(config)
    took = time.perf_counter() - start
    free, total = torch.cuda.mem_get_info()
    other = total - free - torch.cuda.memory_reserved()
    steps = [json.loads(line)["seconds"] for line in run.log_file.read_text().splitlines() if "seconds" in line]
    gib = 2**30
    return {
        "estimate": expected / gib,
        "peak": (torch.cuda.max_memory_allocated() + other) / gib,
        "reserved": (torch.cuda.max_memory_reserved() + other) / gib,
        "seconds": statistics.median(steps[options.steps // 2 :]),
        "whole": took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="where the random SDXL is, or is to be written")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--card", type=float, help="GiB that the runs may take; default: all that the GPU has")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    options = parser.parse_args()
    if not options.base.exists():
        write_random_sdxl(options.base, options.device)
    if options.card:
        room = torch.cuda.get_device_properties(options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * 2**30 / room))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": {}}
    print(f"{result['device']}; torch {result['torch']}\n{HEAD}")
    with tempfile.TemporaryDirectory() as folder:
        for run in options.runs:
            found = result["runs"][run] = measure(run, options, Path(folder))
            print(LINE.format(run=run, **found), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
