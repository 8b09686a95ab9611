"""Base models as diffusers folders: early checks by headers and configurations alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from unziplora.errors import MachineError, UserError, first_line
from unziplora.formats.identify import PICKLES, UNPICKLE, pipeline_family
from unziplora.formats.safetensors import Header, read_header
from unziplora.models.quantized import scaled_weights
from unziplora.utils.inputs import check_regular, read_json

WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLES)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# model.safetensors, diffusion_pytorch_model.fp16.safetensors, model-00001-of-00002.safetensors …
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
_UNUSABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError),
    *(ArithmeticError, AssertionError, RuntimeError, StrictDataclassError),
)


def is_unusable(error: Exception) -> bool:
    """Return True for what diffusers, transformers and torch raise on values of an unexpected type or size."""
    return isinstance(error, _UNUSABLE) or type(error) is Exception  # the only type that tokenizers raises


def check_suffix(path: Path) -> None:
    """Refuse a single file that cannot be a base by its name.

    Raises:
        UserError: it is a pickle or a file of another format.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path}: {UNPICKLE}")
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: not a .safetensors file; bases are diffusers folders or .safetensors files")


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file of a diffusers folder.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, so {path.parent} is an incomplete diffusers folder; copy or download it again"
        ) from None


@contextmanager
def usable_config(source: str) -> Iterator[None]:
    """Turn what values of an unexpected type or size raise, wherever they are used, into one message."""
    try:
        yield
    except PermissionError as error:
        raise MachineError(f"base {source!r}: no permission to read {error.filename or 'it'}") from None
    except Exception as error:
        if not is_unusable(error):
            raise
        raise UserError(f"base {source!r}: its configuration cannot be used ({first_line(error)})") from None


def check_folder(folder: Path, half: bool) -> tuple[str | None, dict[str, dict[Path, Header]]]:
    """Check a diffusers folder without loading it; return its variant ('fp16' or None) and each part's headers.

    Args:
        half: half precision suffices, so fp16 files are preferred.

    Raises:
        UserError: it is of another family, or a part is missing, damaged, quantized or only a pickle.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder}: not a base model (model_index.json is missing). Give a folder in diffusers layout, as "
            "pipe.save_pretrained writes it, or a .safetensors checkpoint"
        )
    with usable_config(str(folder)):
        return _check_parts(folder, half)


def _check_parts(folder: Path, half: bool) -> tuple[str | None, dict[str, dict[Path, Header]]]:
    for file in (*folder.glob("*.json"), *folder.glob("*/*")):
        if not file.is_dir():
            check_regular(file)
    check_class(read_config(folder / "model_index.json"), str(folder))
    check_unet_config(folder, str(folder))
    for name in ("tokenizer", "tokenizer_2"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder}: {name} is missing; copy or download the whole folder again")
    weights = {part: _weights(folder / part) for part in PARTS}
    plain = all("" in variants for variants in weights.values())
    choice = "" if plain and not (half and any("fp16" in variants for variants in weights.values())) else "fp16"
    files: dict[str, dict[Path, Header]] = {}
    for part, variants in weights.items():
        config = folder / part / "config.json"
        if (method := read_config(config).get("quantization_config")) is not None:
            kind = method.get("quant_method") if isinstance(method, dict) else method
            raise UserError(f"{config}: the {part} is quantized ({kind}); take the folder in fp16, bf16 or fp32")
        files[part] = {path: read_header(path) for path in variants.get(choice) or variants[""]}
        for path, header in files[part].items():
            scaled_weights(path, header, part)
    return choice or None, files


def _weights(part: Path) -> dict[str, list[Path]]:
    """Find the weight files of one part by variant ('' or 'fp16'), with every shard that the index names."""
    named = [(WEIGHTS.fullmatch(path.name), path) for path in sorted(part.glob("*.safetensors"))]
    variants: dict[str, list[Path]] = {}
    for match, path in named:
        if match and match[1] in (None, "fp16"):
            variants.setdefault(match[1] or "", []).append(path)
    if not variants:
        pickles = [path for path in part.glob("*") if path.suffix in PICKLES]
        if pickles:
            raise UserError(f"{pickles[0]}: {UNPICKLE}, for example with pipe.save_pretrained(...)")
        raise UserError(f"{part}: the weights are missing; copy or download the whole folder again")
    for index in part.glob("*.safetensors.index*.json"):
        for name in sorted(set(read_config(index).get("weight_map", {}).values())):
            if not (part / name).is_file():
                raise UserError(f"{part / name}: missing; copy or download the whole folder again")
    return variants


def check_class(index: dict[str, Any], source: str) -> None:
    """Refuse a pipeline of another family by its class, before its weights are downloaded.

    Raises:
        UserError: it is not an SDXL pipeline.
    """
    name = str(index.get("_class_name"))
    if not name.startswith("StableDiffusionXL"):
        raise other_family(source, pipeline_family(name))


def check_unet_config(folder: Path, source: str) -> None:
    """Refuse a UNet of another family, or another noise schedule, by the configurations.

    Raises:
        UserError: it is not of SDXL's topology, has inputs other than noisy latents, or has another noise schedule.
    """
    config = read_config(folder / "unet" / "config.json")
    index = read_config(folder / "model_index.json")
    if config.get("in_channels", 4) == 9:
        raise other_family(source, "an inpainting model (9 input channels)")
    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    if inputs != outputs:  # a small base may have latents of more channels than SDXL's 4
        raise other_family(source, f"a model with {inputs} input and {outputs} output channels")
    if index.get("requires_aesthetics_score") or index.get("text_encoder", [""])[0] is None:
        raise other_family(source, "the SDXL refiner")
    if config.get("addition_embed_type") != "text_time":
        raise other_family(source, "Stable Diffusion 1 or 2")
    schedule = read_config(folder / "scheduler" / "scheduler_config.json")
    _check_schedule(schedule, str(schedule.get("_class_name")), source)


def check_pipeline(pipe: Any, source: str) -> None:
    """Check a loaded pipeline: all weights are present and finite, and the noise schedule is one of SDXL's.

    Raises:
        UserError: weights are missing, NaN or infinite, or the noise schedule is not one of SDXL's.
    """
    for part in PARTS:
        weights = getattr(pipe, part).state_dict()
        missing = [name for name, weight in weights.items() if weight.is_meta]
        if missing:
            raise UserError(
                f"base {source!r}: {len(missing)} weights of its {part} are missing, such as {missing[0]}; "
                "download it again"
            )
        # NaN and infinity are in the minimum or the maximum, which takes a tenth of the time of looking at each number.
        extremes = {name: torch.stack(weight.aminmax()) for name, weight in weights.items() if weight.numel()}
        if broken := [name for name, pair in extremes.items() if not pair.isfinite().all()]:
            kind = str(weights[broken[0]].dtype).removeprefix("torch.")
            raise UserError(
                f"base {source!r}: {len(broken)} weights of its {part} contain NaN or infinity (in {kind}), such as "
                f"{broken[0]}. Download it again, or choose another precision or base"
            )
    if not getattr(pipe.unet, "down_blocks", None) or not _has_attention(pipe.unet.up_blocks):
        raise other_family(source, "a UNet without SDXL's blocks")
    _check_schedule(pipe.scheduler.config, type(pipe.scheduler).__name__, source)


def _check_schedule(config: Mapping[str, Any], kind: str, source: str) -> None:
    prediction = config.get("prediction_type", "epsilon")
    if kind.startswith(("EDM", "FlowMatch")) or prediction not in ("epsilon", "v_prediction"):
        raise other_family(source, f"a model with another noise schedule ({kind}, {prediction})")


def _has_attention(blocks: Iterable[Any]) -> bool:
    return any(getattr(block, "attentions", None) for block in blocks)


def other_family(source: str, family: str) -> UserError:
    """Return the error for a base of another family."""
    return UserError(
        f"base {source}: this is {family}; a base of SDXL's topology is needed, such as SDXL base 1.0, one of its "
        "finetunes, or 'bundled'"
    )
