"""Quantized weights: numbers that need a scale, which is in another tensor.

ComfyUI's scaled fp8 is understood: `X.weight` in fp8 and `X.scale_weight` (or `X.weight_scale`), one number or one per
output, with which it is multiplied. fp8 without a scale is a number format like any other. Everything else is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats.safetensors import DTYPE_NAMES

_SCALE = re.compile(r"(.+\.)(?:scale_weight|weight_scale)\Z")
# Scales of activations, which only a multiplication in fp8 needs, and marks of the format.
_UNUSED = re.compile(r"(?:.+\.)?(?:scale_input|input_scale|scaled_fp8|comfy_quant)\Z")
_OTHERS = {  # searched in the names of tensors
    r"\.(SCB|weight_format)\Z": "bitsandbytes int8",
    r"\.(nested_)?(absmax|quant_map)\Z|\.quant_state\.": "bitsandbytes 4-bit",
    r"\.(wscales|smooth_factor(_orig)?)\Z": "SVDQuant",
    r"\.(qweight|qzeros|g_idx)\Z": "GPTQ or AWQ",
    r"weight[._]_?(data|qdata)\Z": "quanto or torchao",
    r"\.weight_(packed|zero_point|scale_inv)\Z": "compressed tensors",
}
_FLOATS = [name for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point]


def find_scales(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each scaled fp8 weight → the name of its scale.

    Args:
        shapes: shapes of a file's tensors by name.
        dtypes: number formats by safetensors' names, such as F16 and F8_E4M3.

    Raises:
        UserError: the file is quantized in another way.
    """
    scales = {}
    for name in shapes:
        if match := _SCALE.fullmatch(name):
            weight = f"{match[1]}weight"
            if dtypes.get(weight) not in ("F8_E4M3", "F8_E5M2") or not _fits(name, weight, shapes, dtypes):
                raise _refusal("a scale that does not fit", name)
            scales[weight] = name
        elif other := next((kind for pattern, kind in _OTHERS.items() if re.search(pattern, name)), None):
            raise _refusal(other, name)
        elif name.endswith("weight") and dtypes[name] not in _FLOATS:
            raise _refusal(dtypes[name], name)
        elif not _UNUSED.fullmatch(name) and (owner := _owner(name, shapes)):
            raise _refusal(f"{owner[:120]!r} has a companion", name)
    return scales


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with scaled fp8 weights multiplied by their scales, and without the scales.

    Raises:
        UserError: they are quantized in another way.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    scales = find_scales(shapes, dtypes)
    values = {name: rescaled(tensors[name], tensors[scale]) for name, scale in scales.items()}
    ignored = {*scales.values(), *filter(_UNUSED.fullmatch, tensors)}
    return {name: values.get(name, tensor) for name, tensor in tensors.items() if name not in ignored}


def rescaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Return a weight [out, …] times its scale, one number or one per output, in fp32."""
    scale = scale.to(weight.device, torch.float32)
    return weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))


def _fits(scale: str, weight: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> bool:
    numbers = math.prod(shapes[scale])
    per_output = shapes[scale][:1] == shapes[weight][:1] == (numbers,)
    return dtypes[scale] in ("F32", "F16", "BF16") and (numbers == 1 or per_output)


def _owner(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the matrix that a tensor seems to belong to: `X.weight` for `X.zero_point`, `X.weight_zero`, `X_zero`."""
    owner, _, last = name.rpartition(".")
    if last in ("weight", "bias"):
        return None
    owners = [owner, *(f"{owner}.{last[: match.start()]}" for match in re.finditer("_", last[:100]))]
    matrices = (weight for owner in owners for weight in (f"{owner}.weight", owner) if len(shapes.get(weight, ())) > 1)
    return next(matrices, None)


def _refusal(kind: str, name: str) -> UserError:
    return UserError(
        f"the weights are quantized ({kind}: {name[:120]!r}), in a way that is not understood; "
        "take the file in fp16, bf16 or fp32, or ComfyUI's scaled fp8"
    )
