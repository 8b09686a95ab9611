"""Downloads of base models from the Hugging Face hub, safetensors only."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from unziplora.config.bases import HUB_ID, SDXL
from unziplora.errors import MachineError, UserError, first_line
from unziplora.models import folder as base_files


def names_a_model(source: str) -> bool:
    """Check whether a source that is not on this machine may be a model of the hub rather than a missing file."""
    return HUB_ID.fullmatch(source) is not None and Path(source).suffix not in base_files.WEIGHT_SUFFIXES


def no_such_base(source: str) -> UserError:
    """Return the message for a base that is neither on this machine nor a model of the hub."""
    return UserError(
        f"base {source!r}: no such file or folder. Give 'bundled', a diffusers folder, a .safetensors "
        f"checkpoint or a hub id such as {SDXL!r}"
    )


def download(source: str, dtype: torch.dtype) -> Path:
    """Download a hub model's safetensors (fp16 files, if it has them and they suffice); return its folder."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    offline = False
    names: set[str] = set()
    try:
        names = {file.rfilename for file in model_info(source).siblings or []}
    except GatedRepoError:
        raise UserError(
            f"base {source}: its license must be accepted first: open https://huggingface.co/{source}, accept, "
            "then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"base {source}: no such folder here, and no such public model on the hub") from None
    except Exception:  # no network, proxy, timeout, hub out of order: an earlier download may suffice
        offline = True
    if not offline and "model_index.json" not in names:
        raise UserError(
            f"base {source}: this hub model is not a diffusers pipeline (it has no model_index.json); download its "
            ".safetensors checkpoint and give the file's path"
        )
    half = any(name.startswith("unet/") and ".fp16." in name for name in names)
    plain = any(name.startswith("unet/") and name.endswith(".safetensors") and ".fp16." not in name for name in names)
    variant = "fp16" if half and (dtype != torch.float32 or not plain) else None
    try:
        index = hf_hub_download(source, "model_index.json", local_files_only=offline)
        base_files.check_class(base_files.read_config(Path(index)), source)
        if offline:
            return Path(index).parent
        for name in ("unet/config.json", "scheduler/scheduler_config.json"):
            hf_hub_download(source, name)
        base_files.check_unet_config(Path(index).parent, source)  # before gigabytes are downloaded
        return Path(StableDiffusionXLPipeline.download(source, use_safetensors=True, variant=variant))
    except (OSError, ValueError) as error:
        if offline:
            raise MachineError(
                f"base {source}: there is no such folder here, no earlier download, and the hub cannot be reached. "
                "Give a folder or .safetensors file that is on this machine"
            ) from error
        raise MachineError(
            f"base {source}: the download failed ({first_line(error)}). Check network and disk space, or give a folder "
            "or .safetensors file that is on this machine"
        ) from error
