"""Open the vision models that users name, from a folder or the hub, never from pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unziplora.errors import UserError, first_line
from unziplora.utils.logging import quiet


@dataclass(frozen=True)
class Wanted:
    """What one flag asks for.

    Attributes:
        flag: such as `--clip`, for messages.
        model, processor: transformers' classes, by name.
        types: the `model_type`s that will do.
        needed: what to give, in words.
    """

    flag: str
    model: str
    processor: str
    types: tuple[str, ...]
    needed: str


CLIP = Wanted("--clip", "CLIPModel", "CLIPProcessor", ("clip",), "a CLIP model in .safetensors with its processor")


def open_vision(wanted: Wanted, source: str) -> tuple[Any, Any]:
    """A model of one of the wanted types, complete, frozen, and its processor.

    Raises:
        UserError: there is no such model here or on the hub, it is damaged, or it is of another kind.
    """
    import transformers

    path = Path(source).expanduser()
    place: dict[str, Any] = {"local_files_only": True} if path.is_dir() else {}
    where = str(path) if path.is_dir() else source
    told = f"{wanted.flag} {source}"
    try:
        with quiet():
            found = transformers.AutoConfig.from_pretrained(where, **place).model_type
            if found not in wanted.types:
                raise UserError(f"{told}: this is a {found} model; give {wanted.needed}")
            extra = {"add_pooling_layer": False} if found == "vit" else {}  # DINO has no pooling layer
            model, about = getattr(transformers, wanted.model).from_pretrained(
                where, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **extra, **place
            )
            if missing := sorted(about["missing_keys"]):
                raise UserError(
                    f"{told}: {missing[0]} is not in its weights, so its embeddings would be random; "
                    f"give {wanted.needed}"
                )
            processor = getattr(transformers, wanted.processor).from_pretrained(where, **place)
    except UserError:
        raise
    except Exception as error:  # each library on the way has errors of its own
        raise UserError(
            f"{told}: no model can be loaded from here ({first_line(error)}). Give the folder, or while online the "
            f"hub id, of {wanted.needed}; or leave {wanted.flag} out"
        ) from error
    return model.eval().requires_grad_(False), processor
