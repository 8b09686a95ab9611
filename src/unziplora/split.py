"""Split a picture into a content LoRA and a style LoRA: the whole job, from a configuration to a run folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image

from unziplora.atomic import atomic_write
from unziplora.base import Base, load_base
from unziplora.card import base_name, card, content_words, style_words
from unziplora.config import SplitConfig
from unziplora.device import pick_device, pick_dtype
from unziplora.encode import conditioning, encode_pictures, loss_weights, to_device
from unziplora.errors import Interrupted, UserError
from unziplora.generate import Settings, generate_latents
from unziplora.images import load_mask, load_picture, to_tensor
from unziplora.lora.blocks import read_blocks
from unziplora.lora.families import sdxl_sized
from unziplora.lora.files import Lora, write_lora
from unziplora.lora.metadata import metadata_for
from unziplora.lora.separation import NAMES
from unziplora.methods.unziplora import UnZipLora
from unziplora.objective import Examples
from unziplora.progress import Callback, Progress
from unziplora.prompts import Prompts
from unziplora.run import RunFolder
from unziplora.samples import sample_sheet
from unziplora.train import StepReport, Trainer, train

METHOD = "UnZipLoRA (arXiv 2412.04465)"
PRIVATE = {"images", "masks", "out", "blocks"}


def split(config: SplitConfig, resume: bool = False, progress: Callback | None = None) -> RunFolder:
    """Train a content and a style LoRA on the configured picture and write them into a run folder.

    Args:
        config: the recipe; see `SplitConfig`.
        resume: continue an interrupted run in `config.out` from its last checkpoint, with the same result as
            if it had not been interrupted.
        progress: told after every step, and of every file that is worth a look.

    Raises:
        UserError: a picture, a word, the base, the folder or a setting is not usable.
        MachineError: disk full, no permission, out of memory.
        Interrupted: stopped on request; a checkpoint is saved.
    """
    job = Job(config, progress or (lambda _: None))
    for path in config.images:
        load_picture(path, 64)  # a bad picture is told before a folder is made and a base is loaded
    read_blocks(config.blocks)
    config.prompts()
    job.run = RunFolder.resume(config.out, config) if resume else RunFolder.create(config.out, config)
    with job.run.lock():
        job.do()
    return job.run


@dataclass
class Job:
    """One run of `split`, step by step."""

    config: SplitConfig
    progress: Callback
    run: RunFolder = field(init=False)
    recent: list[float] = field(default_factory=list)  # seconds of the last steps

    def do(self) -> None:
        """Load, train, export, sample."""
        config, run = self.config, self.run
        if run.card.exists():  # the last file to be written
            raise UserError(f"{run.path}: this run is finished; choose another --out for a new one")
        device = pick_device(config.device)
        dtype = pick_dtype(config.precision, device)
        accelerator = make_accelerator(config, device, dtype, run.path)
        self.tell(f"loading base {config.base}")
        base = load_base(config.base, dtype, device)
        pictures = self.pictures(base)
        method = self.method(base, pictures, accelerator)
        self.tell("training", memory=True)
        done = self.train(base, method, pictures, accelerator)
        if done < config.steps:
            raise Interrupted(
                f"stopped after step {done} of {config.steps}, checkpoint saved; continue with:\n"
                f"  unziplora split --resume --out {run.path}"
            )
        self.export(method, base, pictures)
        if config.sample_seeds:
            self.sample(base, method, pictures, "samples")
        shapes = {path: (b.up.shape[0], b.down.shape[1]) for path, b in method.branches["content"].items()}
        atomic_write(run.card, card(run, config, sdxl_sized(shapes)))
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # twice the size of everything else
        accelerator.end_training()

    def pictures(self, base: Base) -> list[Image.Image]:
        """The input pictures, square, at the training resolution."""
        resolution = self.config.resolution or base.resolution
        unit = base.pipe.vae_scale_factor * 4  # two halvings of the latents inside the UNet
        if resolution % unit:
            near = max(unit, round(resolution / unit) * unit)
            raise UserError(f"resolution {resolution}: must be a multiple of {unit} for this base, such as {near}")
        return [load_picture(path, resolution) for path in self.config.images]

    def method(self, base: Base, pictures: list[Image.Image], accelerator: Accelerator) -> UnZipLora:
        """Encode what is needed once, then inject both LoRAs; VAE and text encoders leave the device."""
        config = self.config
        examples = to_device(self.examples(base, pictures), base)
        weights = {"content": config.content_prior, "style": config.style_prior}
        templates = {"content": config.content_class_prompt, "style": config.style_class_prompt}
        priors = {
            name: to_device(self.prior(base, config.fill(templates[name]), pictures[0].width), base)
            for name in NAMES
            if weights[name] > 0
        }
        for module in (base.vae, *base.text_encoders):
            module.to("cpu")
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        scheduler = DDPMScheduler.from_config(base.scheduler.config)
        blocks = read_blocks(config.blocks)
        return UnZipLora(base.unet, scheduler, examples, config, blocks, priors, accelerator.autocast)

    def examples(self, base: Base, pictures: list[Image.Image]) -> Examples:
        """The pictures as latents, the three prompts as their conditioning, masks as weights of the loss."""
        config = self.config
        size = pictures[0].width
        latents = encode_pictures(base, [to_tensor(picture) for picture in pictures])
        words = config.prompts()
        prompts = Prompts(**words) if config.prompt_separation else Prompts(words["full"])
        masks = [load_mask(m, size, picture=p) for m, p in zip(config.masks, config.images, strict=False)]
        weights = loss_weights(masks, latents, config.background_weight)
        return Examples(latents, conditioning(base, prompts, size, len(pictures)), weights)

    def prior(self, base: Base, prompt: str, size: int) -> Examples:
        """Class pictures by the base itself, as latents, for prior preservation (DreamBooth, arXiv 2208.12242)."""
        config = self.config
        self.tell(f"generating {config.prior_images} class pictures: {prompt}")
        settings = Settings(steps=config.sample_steps, guidance=config.sample_guidance, width=size, height=size)
        seeds = range(config.seed + 1_000_000, config.seed + 1_000_000 + config.prior_images)
        latents = generate_latents(base, prompt, seeds, settings)
        prompts = Prompts(prompt, prompt, prompt) if config.prompt_separation else Prompts(prompt)
        return Examples(latents, conditioning(base, prompts, size, len(latents)))

    def train(self, base: Base, method: UnZipLora, pictures: list[Image.Image], accelerator: Accelerator) -> int:
        """Train from the last checkpoint or from the start; return the steps done."""
        config, run = self.config, self.run
        trainer = Trainer(method, config, accelerator)
        start = 0
        latest = run.latest()
        if latest is not None:
            start, folder = latest
            trainer.load(folder)
            self.tell(f"resuming after step {start}")
        run.rewind_log(start)

        def report(step: StepReport) -> None:
            run.log(step=step.done, loss=step.loss, learning_rate=step.learning_rate, seconds=round(step.seconds, 4))
            accelerator.log({"loss": step.loss, "learning_rate": step.learning_rate}, step=step.done)
            self.step(step)

        def save(done: int) -> None:
            self.tell(f"checkpoint {run.checkpoint(done, trainer.save)}", done)

        def sample(done: int) -> None:
            self.sample(base, method, pictures, f"step-{done:06d}", done)

        return train(trainer, start, report, save, sample)

    def export(self, method: UnZipLora, base: Base, pictures: list[Image.Image]) -> None:
        """Write both LoRAs, with masks, scales and alpha folded in, in every layout asked for."""
        config = self.config
        triggers = {"content": content_words(config), "style": style_words(config)}
        hints = {
            "content": f'Add to any prompt: "{triggers["content"]}". Pair with the style LoRA to restore the picture.',
            "style": f'Add to any prompt: "{triggers["style"]}". Pair with any content LoRA.',
        }
        for name, modules in method.export().items():
            metadata = metadata_for(
                title=f"{self.run.path.name}-{name}",
                trigger=triggers[name],
                hint=hints[name],
                base=base_name(config),
                resolution=pictures[0].size,
                prediction=base.prediction_type,
                zero_terminal_snr=base.zero_terminal_snr,
                layers_per_block=base.unet.config.layers_per_block,
                method=f"{METHOD}, {name} LoRA",
                # no paths of this machine: files are shared
                settings={**config.model_dump(mode="json", exclude=PRIVATE), "base": base_name(config)},
                thumbnail=pictures[0],
            )
            for layout in config.formats:
                path = getattr(self.run, name)
                if layout != "kohya":
                    path = path.with_name(f"{name}.{layout}.safetensors")
                write_lora(Lora(modules, metadata), path, layout, metadata=metadata, dtype=config.save_precision)
                self.tell(f"wrote {path}", config.steps)

    def sample(self, base: Base, method: UnZipLora, pictures: list[Image.Image], name: str, done: int = 0) -> None:
        """Write a labelled sheet: input, both together, content in another style, style on another subject."""
        sheet = sample_sheet(base, method, self.config, pictures[0])
        self.tell(f"samples {self.run.save_picture(name, sheet)}", done or self.config.steps)

    def step(self, step: StepReport) -> None:
        """Report a step with the mean speed of the last twenty."""
        self.recent = [*self.recent[-19:], step.seconds]
        speed = sum(self.recent) / len(self.recent)
        self.progress(Progress(step.done, self.config.steps, step.loss, speed, peak_memory()))

    def tell(self, message: str, done: int = 0, memory: bool = False) -> None:
        """Report something worth a line."""
        self.progress(
            Progress(done, self.config.steps, memory_bytes=peak_memory() if memory else None, message=message)
        )


def make_accelerator(config: SplitConfig, device: torch.device, dtype: torch.dtype, folder: Path) -> Accelerator:
    """accelerate, with the precision and the trackers of the configuration.

    Raises:
        UserError: a tracker's package is not installed.
    """
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: choose bf16 or fp32 on a CPU")
    for name in config.trackers:
        if find_spec(name) is None:  # accelerate would leave it out without a word
            raise UserError(f"tracker {name} is not installed: pip install 'unziplora[{name}]', or leave it out")
    # accelerate keeps its settings for the whole process; several runs in one process may differ.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        log_with=list(config.trackers) or None,
        project_dir=str(folder / "trackers") if config.trackers else None,
    )
    if config.trackers:
        accelerator.init_trackers("unziplora", config=flat(config))
    return accelerator


def flat(config: SplitConfig) -> dict[str, Any]:
    """The configuration as trackers take it: numbers and strings only."""
    values = config.model_dump(mode="json", exclude_none=True)
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}


def peak_memory() -> int:
    """Peak bytes of the GPU if there is one, else the present ones of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
