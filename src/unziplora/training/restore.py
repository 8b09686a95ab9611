"""Restoration of a base that outlives a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unziplora.errors import UserError
from unziplora.lora.inject import adapted_layers, remove
from unziplora.models.base import Base


@contextmanager
def restored(base: Base) -> Iterator[None]:
    """Restore a base at the end: no LoRAs, every part on its device and in its mode, checkpointing as before.

    Raises:
        UserError: the base contains LoRAs already, which would be removed with the run's own.
    """
    parts = [base.unet, base.vae, *base.text_encoders]
    if adapted_layers(base.unet) or any(getattr(part, "peft_config", None) for part in parts):
        raise UserError(f"base {base.name}: it contains LoRAs already; remove them before a run")
    before = [(part, part.training, part.device) for part in parts]
    checkpointing = base.unet.is_gradient_checkpointing
    try:
        yield
    finally:
        remove(base.unet)
        with base.forked_rng():  # diffusers creates linear layers that replace PEFT's, which draws random numbers
            base.pipe.unload_lora_weights()
        if base.unet.is_gradient_checkpointing and not checkpointing:
            base.unet.disable_gradient_checkpointing()
        for part, training, device in before:
            part.train(training).to(device)
