"""Base models of SDXL's topology, opened by `load_base` from any form in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel

from unziplora.config.bases import BUNDLED_BASE, is_bundled
from unziplora.config.recipe import Precision
from unziplora.errors import MachineError, UserError, first_line, out_of_memory
from unziplora.formats.safetensors import Header, read_header
from unziplora.lora.inject import adapted_layers, remove
from unziplora.models import checkpoint as base_checkpoint
from unziplora.models import folder as base_files
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.hub import download, names_a_model, no_such_base
from unziplora.models.quantized import rescale
from unziplora.utils.files import absolute, file_stem
from unziplora.utils.logging import quiet

BUNDLED = Path(__file__).parent / "bundled"
FINGERPRINTED = 16_384
"""Numbers of each tensor in a fingerprint. Tensors up to twice as large count in full, such as SDXL's first layer."""

SAMPLE_SIZE = 128
"""Side of the latents if the base's configuration has none: SDXL's."""


@dataclass(frozen=True)
class Scale:
    """A base's own resolution, and the pixels of an image per pixel of its latents."""

    resolution: int
    latent: int

    def sizes(self, side: int) -> list[tuple[int, int]]:
        """Return widths and heights for images of any proportions, of about the area of a square with this side.

        For SDXL's 1024 pixels these are the sizes of its training (arXiv 2307.01952, appendix I): multiples of 64 with
        90 to 100 % of the square's area, at most twice as long as it. Below 768 pixels the steps are half as large.
        """
        unit = self.latent * (8 if side >= 96 * self.latent else 4)
        steps = range(-(-side // 2 // unit) * unit, 2 * side + 1, unit)
        pairs = [(width, height) for width in steps for height in steps]
        return [(side, side), *(pair for pair in pairs if 0.9 * side**2 <= pair[0] * pair[1] <= side**2)]


@dataclass
class Base:
    """A base model, ready for use: frozen, in eval mode.

    Attributes:
        name: 'bundled', the name of a folder or file, or a hub id.
        resolution: side of the images it was trained on, in pixels.
        prediction_type: 'epsilon' or 'v_prediction'.
        device: where it computes; `models.offload` may temporarily move parts elsewhere.
    """

    pipe: StableDiffusionXLPipeline
    name: str
    resolution: int
    prediction_type: str
    device: torch.device

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipe.unet

    @property
    def vae(self) -> AutoencoderKL:
        """VAE, in fp32 if its configuration has `force_upcast`: SDXL's overflows in fp16."""
        return self.pipe.vae

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    @property
    def scheduler(self) -> SchedulerMixin:
        return self.pipe.scheduler

    @property
    def zero_terminal_snr(self) -> bool:
        """True if the last timestep is pure noise (arXiv 2305.08891)."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def scale(self) -> Scale:
        return Scale(self.resolution, self.pipe.vae_scale_factor)

    def forked_rng(self) -> AbstractContextManager[None]:
        """Restore torch's random states afterwards, of the CPU and of the base's GPU."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def fingerprint(self) -> str:
        """Hash the weights to 16 hex digits, small tensors in full, large ones in part; fp32 and bf16 give the same."""
        digest = hashlib.sha256()
        for part in _parts(self.pipe):
            for name, tensor in part.state_dict().items():
                flat = tensor.detach().flatten()
                sample = flat[:: max(1, flat.numel() // FINGERPRINTED)].to("cpu", torch.bfloat16)
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_base(source: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Base:
    """Open 'bundled', a diffusers folder, a hub id or a single .safetensors checkpoint, frozen, in eval mode.

    A single file that is not of SDXL's own size needs its configuration next to it, see `config_folder`.

    Raises:
        UserError: nothing is there, a part is missing or damaged, or it is not of SDXL's topology.
        MachineError: the hub cannot be reached, or memory does not suffice.
    """
    with _failures(source):
        path = _locate(source, dtype)
        with quiet():
            pipe = _from_file(path, dtype) if path.is_file() else _from_folder(path, dtype)
        return _finish(pipe, _name(source), device)


def open_base(source: str, precision: Precision = "auto", device: str = "auto") -> Base:
    """Open a base in the number format and on the device of a recipe.

    Raises:
        UserError, MachineError: as `load_base` and `pick_device`.
    """
    place = pick_device(device)
    return load_base(source, pick_dtype(precision, place), place)


@contextmanager
def borrowed(pipe: StableDiffusionXLPipeline) -> Iterator[Base]:
    """Use a pipeline that is in memory as a base, and leave it as it was.

    Raises:
        UserError: it is not of SDXL's topology.
    """
    if any(getattr(pipe, part, None) is None for part in base_files.PARTS):
        raise base_files.other_family(str(pipe.name_or_path or "a pipeline in memory"), type(pipe).__name__)
    trained = [parameter for part in _parts(pipe) for parameter in part.parameters() if parameter.requires_grad]
    shown, dtype = getattr(pipe, "_progress_bar_config", {}), pipe.vae.dtype
    with _placed(pipe):
        try:
            if pipe.vae.config.get("force_upcast", True):
                pipe.vae.float()
            yield _finish(pipe, str(pipe.name_or_path or "a pipeline in memory"), pipe.unet.device)
        finally:
            with quiet():  # diffusers warns of every change of the number format
                pipe.vae.to(dtype)
            for parameter in trained:
                parameter.requires_grad_(True)
            pipe.set_progress_bar_config(**shown)


@contextmanager
def restored(base: Base) -> Iterator[None]:
    """Restore a base after a run: no LoRAs, every part on its device and in its mode, checkpointing as before.

    Raises:
        UserError: the base contains LoRAs already, which would be removed with the run's own.
    """
    unet, checkpointing = base.unet, base.unet.is_gradient_checkpointing
    if adapted_layers(unet) or any(getattr(part, "peft_config", None) for part in _parts(base.pipe)):
        raise UserError(f"base {base.name}: it contains LoRAs already; remove them before a run")
    with _placed(base.pipe):
        try:
            yield
        finally:
            remove(unet)
            with base.forked_rng():  # diffusers creates linear layers that replace PEFT's, which draws random numbers
                base.pipe.unload_lora_weights()
            if unet.is_gradient_checkpointing and not checkpointing:
                unet.disable_gradient_checkpointing()


def _parts(pipe: StableDiffusionXLPipeline) -> list[nn.Module]:
    return [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]


@contextmanager
def _placed(pipe: StableDiffusionXLPipeline) -> Iterator[None]:
    """Restore the device and the mode of every part afterwards."""
    before = [(part, part.training, next(part.parameters()).device) for part in _parts(pipe)]
    try:
        yield
    finally:
        for part, training, device in before:
            part.train(training).to(device)


def _name(source: str) -> str:
    path = Path(source).expanduser()
    return "bundled" if is_bundled(source) else file_stem(absolute(path)) if path.exists() else source


def _locate(source: str, dtype: torch.dtype) -> Path:
    """Return the folder or file of a source, downloaded from the hub if necessary."""
    if is_bundled(source):
        return BUNDLED_BASE
    path = Path(source).expanduser()
    if path.exists():
        return path
    if names_a_model(source):
        return download(source, dtype)
    raise no_such_base(source)


def _from_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    variant, files = base_files.check_folder(folder, half=dtype != torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder,
        dtype={"default": dtype, "vae": _vae_dtype(folder, dtype)},
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        add_watermarker=False,
    )
    for part, headers in files.items():
        for weights, header in headers.items():
            rescale(pipe, weights, header, part)
    return pipe


def _from_file(path: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    folder, header = described(path)
    base_files.check_unet_config(folder, str(path))
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    vae = AutoencoderKL.from_single_file(str(path), subfolder="vae", dtype=_vae_dtype(folder, dtype), **options)
    parts: dict[str, Any] = {"vae": vae}
    if folder == BUNDLED / "sdxl":
        parts.update(tokenizer=base_checkpoint.clip_tokenizer(), tokenizer_2=base_checkpoint.clip_tokenizer(pad="!"))
    pipe = StableDiffusionXLPipeline.from_single_file(str(path), dtype=dtype, add_watermarker=False, **options, **parts)
    pipe.register_to_config(_name_or_path=str(path))  # diffusers names the folder of its configuration
    rescale(pipe, path, header)
    if changes := base_checkpoint.marked_schedule(header):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def described(path: Path) -> tuple[Path, Header]:
    """Return the configuration folder of a single-file checkpoint, and its header; no weights are read.

    Raises:
        UserError: it is not a complete SDXL checkpoint, or it has no configuration folder.
    """
    base_files.check_suffix(path)
    header = read_header(path)
    base_checkpoint.check_checkpoint(path, header)
    return config_folder(path, header), header


def config_folder(path: Path, header: Header) -> Path:
    """Return the configuration folder of a single-file checkpoint.

    This is a folder of the file's name without its suffix, else the folder that contains the file, else SDXL's own
    configuration.

    Raises:
        UserError: none of them exists.
    """
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "model_index.json").is_file():
            return folder
    if base_checkpoint.is_full_size(header):
        return BUNDLED / "sdxl"
    raise UserError(
        f"{path}: this checkpoint is not of SDXL's own size and has no configuration; put a folder {path.stem!r} next "
        "to the file, with the model_index.json, the config.json of each part and the tokenizers of a diffusers folder"
    )


def _vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    config = base_files.read_config(folder / "vae" / "config.json")
    return torch.float32 if config.get("force_upcast", True) else dtype


def _finish(pipe: StableDiffusionXLPipeline, name: str, device: str | torch.device) -> Base:
    base_files.check_pipeline(pipe, name)
    for part in _parts(pipe):
        part.eval().requires_grad_(False).to(device)
    pipe.set_progress_bar_config(disable=True)
    side = latent_side(pipe.unet.config) * pipe.vae_scale_factor
    return Base(pipe, name, side, pipe.scheduler.config.get("prediction_type", "epsilon"), pipe.unet.device)


def latent_side(config: Mapping[str, Any]) -> int:
    """Return the side of the latents that a UNet is made for; its configuration may contain one, two or none."""
    size = config["sample_size"] or SAMPLE_SIZE
    return size if isinstance(size, int) else max(size)


@contextmanager
def _failures(source: str) -> Iterator[None]:
    """Translate the libraries' errors on bad files and full memory into messages for a person."""
    try:
        yield
    except NotImplementedError as error:  # a tensor is still on the meta device: the file does not contain it
        raise UserError(f"base {source!r}: weights are missing from the file; download it again") from error
    except PermissionError as error:
        raise MachineError(f"base {source!r}: no permission to read {error.filename or 'it'}") from error
    except Exception as error:
        if not (base_files.is_unusable(error) or isinstance(error, SafetensorError | MemoryError)):
            raise
        if out_of_memory(error):
            raise MachineError(
                f"base {source!r}: not enough memory to load it ({first_line(error)}). Close other programs, "
                "choose precision bf16 or a smaller base"
            ) from error
        raise UserError(
            f"base {source!r} cannot be loaded: {first_line(error)}. Download it again, or convert it to a "
            "diffusers folder"
        ) from error
