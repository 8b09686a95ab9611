"""Loader of the vision models that users name, from a folder or the hub, never from pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unziplora.errors import UserError, first_line
from unziplora.utils.logging import quiet


@dataclass(frozen=True)
class VisionModelSpec:
    """Requirements of one flag.

    Attributes:
        flag: such as `--clip`, for messages.
        model, processor: names of classes of transformers.
        types: accepted values of `model_type`.
        description: accepted models in words, for messages.
    """

    flag: str
    model: str
    processor: str
    types: tuple[str, ...]
    description: str


CLIP = VisionModelSpec(
    "--clip", "CLIPModel", "CLIPProcessor", ("clip",), "a CLIP model in .safetensors with its processor"
)


def check_vision_model(spec: VisionModelSpec, source: str) -> str:
    """Refuse a model that does not exist or is of another type, without reading its weights; return its type.

    Raises:
        UserError: there is no such model here or on the hub, or it is of another type.
    """
    import transformers

    location, local = _locate(source)
    with _explained(spec, source):
        model_type = str(transformers.AutoConfig.from_pretrained(location, **local).model_type)
        if model_type not in spec.types:
            raise UserError(f"{spec.flag} {source}: this is a {model_type} model; give {spec.description}")
    return model_type


def load_vision_model(spec: VisionModelSpec, source: str) -> tuple[Any, Any]:
    """Load a complete, frozen model of an accepted type, and its processor.

    Raises:
        UserError: there is no such model here or on the hub, it is damaged, or it is of another type.
    """
    import transformers

    model_type = check_vision_model(spec, source)
    location, local = _locate(source)
    extra = {"add_pooling_layer": False} if model_type == "vit" else {}  # DINO has no pooling layer
    with _explained(spec, source):
        model, info = getattr(transformers, spec.model).from_pretrained(
            location, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **extra, **local
        )
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{spec.flag} {source}: {missing[0]} is not in its weights, so its embeddings would be random; "
                f"give {spec.description}"
            )
        processor = getattr(transformers, spec.processor).from_pretrained(location, **local)
    return model.eval().requires_grad_(False), processor


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """Return a folder, or a name on the hub, with the keywords that keep transformers from running a model's code."""
    path, safely = Path(source).expanduser(), {"trust_remote_code": False}  # by default it asks on a terminal
    return (str(path), {**safely, "local_files_only": True}) if path.is_dir() else (source, safely)


@contextmanager
def _explained(spec: VisionModelSpec, source: str) -> Iterator[None]:
    """Say what was given and what is needed if a model cannot be loaded."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # each of the libraries involved has errors of its own
        raise UserError(
            f"{spec.flag} {source}: no model can be loaded from here ({first_line(error)}). Give the folder, or while "
            f"online the hub id, of {spec.description}; or leave {spec.flag} out"
        ) from error
