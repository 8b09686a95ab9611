"""Generation of images by a base with any LoRAs attached, from one prompt or from three separate ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from unziplora.errors import OutOfMemory, UserError, first_line, out_of_memory
from unziplora.lora.inject import inject, unwrap
from unziplora.lora.layer import BranchedLinear
from unziplora.models.base import Base
from unziplora.models.offload import moved_to, text_encoders_ready
from unziplora.models.text import Conditioning, Prompts, embed_negative, embed_prompts, join_rows
from unziplora.models.vae import unscale_latents
from unziplora.sampling.schedulers import make_scheduler

StepCallback = Callable[[int, int], None]
"""Callback with (finished, total) denoising steps of all images."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the sampler, as in `SampleConfig`; three negative prompts are for full, content and style."""

    steps: int = 30
    guidance: float = 5.0
    guidance_rescale: float = 0.0
    negative: str | tuple[str, str, str] = ""
    width: int | None = None
    height: int | None = None
    scheduler: str = "base"
    batch_size: int = 1


def generate(
    base: Base, prompts: Prompts | str, seeds: Sequence[int], settings: Settings | None = None
) -> list[Image.Image]:
    """Generate one image per seed with the LoRAs that are attached: `generate_latents`, then `decode`."""
    return decode(base, generate_latents(base, prompts, seeds, settings))


@torch.no_grad()
def generate_latents(
    base: Base,
    prompts: Prompts | str,
    seeds: Sequence[int],
    settings: Settings | None = None,
    progress: StepCallback | None = None,
) -> Tensor:
    """Denoise one latent per seed, [N, C, h, w] on the UNet's device, in the UNet's scaling.

    With three prompts the base sees the full one and each LoRA its own (arXiv 2412.04465, section 3.2): their
    embeddings are joined on the feature axis, and so are their negative ones. An image depends on its seed
    alone, not on the others of its batch; the global random state is not touched. The UNet is left as it was.

    Raises:
        UserError: a size that does not fit, a scheduler that does not suit the base, an empty prompt.
        OutOfMemory: memory does not suffice.
    """
    settings = settings or Settings()
    prompts = Prompts(prompts) if isinstance(prompts, str) else prompts
    width, height = settings.width or base.resolution, settings.height or base.resolution
    _check_size(base, width, height)
    make_scheduler(base, settings.scheduler)  # refuses one that does not suit the base before any work
    results = []
    with _memory(f"{settings.batch_size} × {width}×{height} pixels"), _ready(base, prompts):
        with text_encoders_ready(base):
            positive, negative = embed_prompts(base, prompts), _negative(base, settings, prompts)
        for start in range(0, len(seeds), settings.batch_size):
            batch = seeds[start : start + settings.batch_size]
            report = portion(progress, settings.steps * start, settings.steps * len(seeds), len(batch))
            results.append(_denoise(base, positive, negative, batch, settings, (height, width), report))
    return torch.cat(results)


def _denoise(
    base: Base,
    positive: Conditioning,
    negative: Conditioning | None,
    seeds: Sequence[int],
    settings: Settings,
    size: tuple[int, int],
    report: StepCallback | None,
) -> Tensor:
    """Denoise a batch of seeds by diffusers' own SDXL pipeline around the UNet alone."""
    scheduler = make_scheduler(base, settings.scheduler)
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=base.unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.vae_scale_factor = base.pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, base.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in size))
    # drawn in fp32 on the CPU: the same start on every device and in every number format
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    def step_done(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        if report:
            # Heun's scheduler has two timesteps per step.
            report((step + 1) * settings.steps // len(scheduler.timesteps), settings.steps)
        return {}

    prompt = positive.repeat(len(seeds))
    against = negative.repeat(len(seeds)) if negative else None
    return pipe(
        prompt_embeds=prompt.tokens,
        pooled_prompt_embeds=prompt.pooled,
        negative_prompt_embeds=against.tokens if against else None,
        negative_pooled_prompt_embeds=against.pooled if against else None,
        latents=noise.to(base.device, base.dtype),
        generator=generators,
        height=size[0],
        width=size[1],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        guidance_rescale=settings.guidance_rescale,
        callback_on_step_end=step_done,
        output_type="latent",
    ).images


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> list[Image.Image]:
    """Decode latents [N, C, h, w] in the UNet's scaling to images, one at a time, in the VAE's own number format.

    Raises:
        OutOfMemory: memory does not suffice.
    """
    vae, images = base.vae, []
    with _memory("decoding an image"), moved_to([vae], latents.device):
        for row in latents.to(vae.dtype).split(1):
            if not torch.isfinite(row).all():
                warnings.warn("an image contains NaN; choose precision bf16 or fp32", stacklevel=3)
            image = _decoded(vae, unscale_latents(base, row).nan_to_num())
            images += base.pipe.image_processor.postprocess(image.float(), output_type="pil")
    return images


def _decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """Decode a latent to an image in −1…1, [1, 3, H, W]; tile by tile if memory does not suffice for the whole."""
    try:
        return vae.decode(latent, return_dict=False)[0]
    except RuntimeError as error:
        if not out_of_memory(error) or not hasattr(vae, "tile_latent_min_size") or vae.use_tiling:
            raise
    # Not inside `except`: the error keeps references to the tensors that did not fit.
    if latent.device.type == "cuda":
        torch.cuda.empty_cache()
    elif latent.device.type == "mps":
        torch.mps.empty_cache()
    sizes = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = sizes[0] // 2, sizes[1] // 2
    try:
        return vae.decode(latent, return_dict=False)[0]
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = sizes


def _negative(base: Base, settings: Settings, prompts: Prompts) -> Conditioning | None:
    if settings.guidance <= 1:
        return None
    texts = (settings.negative,) * 3 if isinstance(settings.negative, str) else settings.negative
    return join_rows(embed_negative(base, texts)) if prompts.separate else embed_negative(base, texts[:1])


@contextmanager
def _ready(base: Base, prompts: Prompts) -> Iterator[None]:
    """Prepare the UNet: eval mode, and for three prompts, every cross-attention K and V able to split them."""
    unet, was_training = base.unet, base.unet.training
    unet.eval()
    added = []
    if prompts.separate:
        cross = [name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        added = [name for name in cross if not isinstance(unet.get_submodule(name), BranchedLinear)]
        inject(unet, added)
    try:
        yield
    finally:
        for name in added:
            unwrap(unet, name)
        unet.train(was_training)


def _check_size(base: Base, width: int, height: int) -> None:
    unit = base.pipe.vae_scale_factor
    for name, side in (("width", width), ("height", height)):
        if side < unit or side % unit:
            near = max(unit, round(side / unit) * unit)
            raise UserError(f"{name} {side}: must be a multiple of {unit}; the nearest is {near}")


def portion(progress: StepCallback | None, before: int, total: int, images: int = 1) -> StepCallback | None:
    """Report the steps of some images at once as a portion of `total` steps, `before` of which are done."""
    return progress and (lambda done, _: progress(before + done * images, total))


def nested_progress(progress: StepCallback | None, index: int, count: int) -> StepCallback | None:
    """Report the steps of one of `count` equal parts as a portion of the whole."""
    return progress and (lambda done, steps: progress(index * steps + done, count * steps))


@contextmanager
def _memory(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory ({what}: {first_line(error)}); choose a smaller size, batch_size 1 or precision bf16"
        ) from error
