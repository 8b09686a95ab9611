"""Single-file base models in the original SDXL layout: checks, noise schedule and tokenizer."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from unziplora.errors import UserError
from unziplora.formats import identify
from unziplora.formats.safetensors import Header
from unziplora.models.folder import other_family
from unziplora.models.quantized import scaled_weights

LDM = "model.diffusion_model."


def check_checkpoint(path: Path, header: Header) -> None:
    """Refuse a single file that is not a complete SDXL checkpoint.

    Raises:
        UserError: another family, a LoRA, a part is missing, or it is quantized in a way that is not understood.
    """
    shapes = header.shapes
    kind, family = identify.kind(shapes), identify.family(shapes)
    if family and kind != identify.LORA:
        raise other_family(str(path), family)
    if kind != identify.CHECKPOINT:
        raise other_family(str(path), kind)
    entry = shapes.get(LDM + "input_blocks.0.0.weight", (0, 4))
    if entry[1] == 9:
        raise other_family(str(path), "an inpainting model (9 input channels)")
    parts = {
        LDM: "UNet",
        "first_stage_model.": "VAE",
        "conditioner.embedders.0.transformer.": "first text encoder",
        "conditioner.embedders.1.model.": "second text encoder",
    }
    missing = [name for prefix, name in parts.items() if not any(key.startswith(prefix) for key in shapes)]
    if missing:
        raise UserError(
            f"{path}: incomplete checkpoint, without {', '.join(missing)}; use a full checkpoint or a diffusers folder"
        )
    if LDM + "label_emb.0.0.weight" not in shapes or entry[1] != 4:
        raise other_family(str(path), "another UNet")
    scaled_weights(path, header)


def is_full_size(header: Header) -> bool:
    """Check whether a checkpoint's UNet has SDXL's own sizes, so that SDXL's own configuration applies."""
    expected = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "label_emb.0.0.weight": (1280, 2816),
        "middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    }
    return all(header.shapes.get(LDM + key) == shape for key, shape in expected.items())


def marked_schedule(header: Header) -> dict[str, Any]:
    """Return the scheduler settings that a single file declares: v-prediction and zero-terminal SNR.

    Finetunes contain empty tensors `v_pred` and `ztsnr` (as ComfyUI reads them) or a modelspec entry.
    """
    declared = header.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" not in header.shapes and declared not in ("v", "v_prediction"):
        return {}
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header.shapes:
        changes.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return changes


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build CLIP's tokenizer from its merges; SDXL pads with the end marker, and with '!' for the second encoder."""
    path = Path(__file__).parent / "bundled" / "sdxl" / "tokenizer" / "merges.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words: Iterable[str] = (
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    )
    vocabulary = {word: index for index, word in enumerate(words)}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad, model_max_length=77)
