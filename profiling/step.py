"""Time and peak memory of one training step of `split`, next to the bare UNet in the same run.

    python profiling/step.py --size small                  # the bundled base's size, on a CPU
    python profiling/step.py --size sdxl --device cuda --precision bf16 --kinds floor split

The UNet has random weights: neither time nor memory depends on them. The floor is forward + backward of the
frozen UNet without any LoRA, with the gradient carried to its input. No method that trains inside the UNet can go
below it. `weights` is forward + backward with a gradient for every weight, as full fine-tuning
needs. On a CPU rounds of all are interleaved, so that a busy machine disturbs them alike; on a GPU, which may not
hold several UNets, one is measured after the other. Medians are reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.profiler import ProfilerActivity

from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.methods.adapters import TrainingData
from unziplora.methods.blora import BLora
from unziplora.methods.dreambooth import DreamBooth
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.text import Conditioning
from unziplora.training.cuda_graphs import FIRST, Predict, Recorder
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.runner import autocast_for
from unziplora.training.trainer import Trainer

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "sample_size": 16,
        "in_channels": 24,
        "out_channels": 24,
        "block_out_channels": (96, 128, 192),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 6),
        "cross_attention_dim": 256,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 160 + 6 * 32,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}
PLACE = {"images": ["none.png"], "content": "subject", "style": "style", "out": "none"}
Autocast = Callable[[], Any]
SHOWN = ("floor", "weights", "split")
LATER = 1000
"""A step after every warm-up, and before the next."""

WARM_UP = FIRST + 1
"""Rounds that are not counted; in the last of them a GPU's passes are recorded."""


def make_unet(size: str, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """A UNet of SDXL's topology with random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws billions of numbers in a second
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            **SIZES[size],
        )
    return unet.to(dtype).requires_grad_(False)


def make_examples(unet: UNet2DConditionModel, latent_side: int, joined: bool) -> Examples:
    """One random image with random prompts of 77 tokens."""
    config, device = unet.config, unet.device
    width = config.cross_attention_dim * (3 if joined else 1)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shape = (1, config.in_channels, latent_side, latent_side)
    rows = torch.randn(1, 77, width), torch.randn(1, pooled), torch.full((1, 6), 1024.0)
    return Examples(torch.randn(shape).to(device), Conditioning(*(row.to(device, unet.dtype) for row in rows)))


def bare(
    unet: UNet2DConditionModel, predict: Predict, latent_side: int, batch: int, autocast: Autocast
) -> Callable[[int], None]:
    """Forward + backward of the UNet as it is."""
    scheduler, examples = DDPMScheduler(), make_examples(unet, latent_side, joined=False)
    # The conditioning carries a gradient, so that the backward pass runs down to the first block's attention.
    examples.conditioning.tokens.requires_grad_()

    def step(index: int) -> None:
        with autocast():
            loss = denoising_loss(predict, scheduler, examples, batch_size=batch, draw=generator(index))
        loss.backward()
        examples.conditioning.tokens.grad = None
        unet.zero_grad()

    return step


def make_split(unet: UNet2DConditionModel, options: argparse.Namespace, autocast: Autocast) -> Trainer:
    """`split` with all three separations, past the first choice of columns."""
    config = resolve(SplitConfig, {**PLACE, **words(options), "column_periods": 1})
    data = TrainingData(make_examples(unet, options.latent_side, joined=True))
    method = UnZipLora(unet, DDPMScheduler(), data, config, autocast=autocast)
    trainer = Trainer(method, config)
    for step in (config.column_warmup - 1, config.column_warmup):  # the second one scores and chooses columns
        trainer.step(step)
    return trainer


def make_dreambooth(unet: UNet2DConditionModel, options: argparse.Namespace, autocast: Autocast) -> Trainer:
    """`train dreambooth` without prior and text encoders: one LoRA on all attentions."""
    config = resolve(DreamBoothConfig, {**PLACE, **words(options)})
    examples = make_examples(unet, options.latent_side, joined=False)
    return Trainer(DreamBooth(unet, DDPMScheduler(), TrainingData(examples), config, autocast=autocast), config)


def make_blora(unet: UNet2DConditionModel, options: argparse.Namespace, autocast: Autocast) -> Trainer:
    """`train blora`: the LoRAs of two blocks."""
    config = resolve(BLoraConfig, {**PLACE, **words(options)})
    examples = make_examples(unet, options.latent_side, joined=False)
    method = BLora(unet, DDPMScheduler(), TrainingData(examples), config, autocast=autocast)
    return Trainer(method, config)


TRAININGS = {"split": make_split, "dreambooth": make_dreambooth, "blora": make_blora}
KINDS = ("floor", "weights", *TRAININGS)


def words(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of all trainings."""
    return {"steps": 10**6, "rank": options.rank, "batch_size": options.batch}


def void(_: object) -> None:
    """Drop a value."""


def make(kind: str, options: argparse.Namespace) -> Callable[[int], None]:
    """The step function of one kind on a UNet of its own."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    autocast = autocast_for(torch.device(options.device), dtype)
    unet = make_unet(options.size, dtype, options.device)
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    if kind in TRAININGS:
        trainer = TRAININGS[kind](unet, options, autocast)
        trainer.method.predict = recorded(unet, trainer.parameters(), options)
        return lambda index: void(trainer.step(LATER + index))
    unet.requires_grad_(kind == "weights")
    predict = recorded(unet, [*unet.parameters()] if kind == "weights" else [], options)
    return bare(unet, predict, options.latent_side, options.batch, autocast)


def recorded(unet: UNet2DConditionModel, parameters: list[torch.Tensor], options: argparse.Namespace) -> Predict:
    """Return the UNet's passes recorded as CUDA graphs, as in a run on a GPU, or the UNet itself."""
    if options.device.startswith("cuda") and not options.eager and not options.checkpointing:
        return Recorder(unet, parameters)
    return unet


def timed(step: Callable[[int], None], index: int, gpu: bool) -> float:
    """Seconds of one step."""
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(index)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_a_gpu(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and peak bytes by kind, one kind after the other."""
    seconds, memory = {}, {}
    for kind in options.kinds:
        step = make(kind, options)
        torch.cuda.reset_peak_memory_stats()  # the UNet is drawn in fp32 and then cast, which no training does
        times = [timed(step, index, gpu=True) for index in range(options.rounds + WARM_UP)]
        seconds[kind], memory[kind] = statistics.median(times[WARM_UP:]), torch.cuda.max_memory_allocated()
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return seconds, memory


def on_a_cpu(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds by kind of interleaved rounds, and peak bytes of a process of its own for each."""
    memory = {kind: memory_of(kind) for kind in options.kinds}
    steps = {kind: make(kind, options) for kind in options.kinds}
    times: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    for index in range(options.rounds + WARM_UP):
        for kind, step in steps.items():
            times[kind].append(timed(step, index, gpu=False))
    return {kind: statistics.median(values[WARM_UP:]) for kind, values in times.items()}, memory


def memory_of(kind: str) -> int:
    """Peak bytes of a process that does three steps."""
    command = [sys.executable, __file__, "--memory-of", kind, *sys.argv[1:]]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def profile(options: argparse.Namespace, gpu: bool) -> str:
    """torch's table of the operations that take the most time in three steps."""
    step = make(options.profile, options)
    for index in range(WARM_UP):
        step(index)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as found:
        for index in range(WARM_UP, WARM_UP + 3):
            step(index)
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


def print_own_memory(options: argparse.Namespace) -> None:
    """What `memory_of` starts."""
    import resource  # of Unix alone

    step = make(options.memory_of, options)
    for index in range(3):
        step(index)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--resolution", type=int, help="pixels; default: 128 for small, 1024 for sdxl")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, help="default: 16 for small, 64 for sdxl")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--eager", action="store_true", help="on a GPU: without CUDA graphs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=SHOWN, help="default: floor weights split")
    parser.add_argument("--profile", choices=KINDS, help="show where one kind's time goes, and nothing else")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.resolution = options.resolution or {"small": 128, "sdxl": 1024}[options.size]
    options.latent_side = options.resolution // 8
    options.rank = options.rank or {"small": 16, "sdxl": 64}[options.size]
    if options.memory_of:
        print_own_memory(options)
        return
    gpu = options.device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)
    if options.profile:
        print(profile(options, gpu))
        return
    report(options, gpu, *(on_a_gpu if gpu else on_a_cpu)(options))


def report(options: argparse.Namespace, gpu: bool, seconds: dict[str, float], memory: dict[str, int]) -> None:
    """Print the table, and write it as JSON if asked for."""
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    threads = "" if gpu else f", {torch.get_num_threads()} threads"
    print(
        f"{options.size} UNet, {options.resolution} px, batch {options.batch}, rank {options.rank}, "
        f"{options.precision}, checkpointing {'on' if options.checkpointing else 'off'}, "
        f"{'eager' if options.eager or not gpu else 'CUDA graphs'}; {name}{threads}; "
        f"torch {torch.__version__}; median of {options.rounds}"
    )
    print("| | seconds per step | × first | peak memory |\n|---|---|---|---|")
    labels = {
        "floor": "UNet, frozen: forward + backward (floor)",
        "weights": "UNet, all weights",
        **{kind: f"`{kind}`" for kind in TRAININGS},
    }
    for kind in options.kinds:
        ratio = seconds[kind] / seconds[options.kinds[0]]
        print(f"| {labels[kind]} | {seconds[kind]:.3f} | {ratio:.2f} | {memory[kind] / 2**30:.2f} GiB |")
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "memory_of")}
        result = {"device": name, "torch": torch.__version__, "settings": settings, "seconds": seconds, "bytes": memory}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
