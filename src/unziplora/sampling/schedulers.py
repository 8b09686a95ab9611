"""Schedulers by their usual names, configured from the base's own noise schedule."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from unziplora.config.sample import SCHEDULERS
from unziplora.errors import UserError
from unziplora.models.base import Base

_NOISE_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "timestep_spacing", "steps_offset"),
)
"""Keys of a scheduler's configuration that belong to the base. The others, such as Karras sigmas, are the sampler's."""


def make_scheduler(base: Base, name: str = "base") -> Any:
    """Create a scheduler of `SCHEDULERS`; 'base' is the one that the base comes with.

    Prediction type and noise schedule are the base's. With zero-terminal SNR, sampling starts at the last
    timestep (arXiv 2305.08891, section 3.3).

    Raises:
        UserError: it lacks zero-terminal SNR, which the base needs.
    """
    config = base.scheduler.config
    if name == "base":
        kind, changes = type(base.scheduler), {}
    else:
        kind, changes = getattr(diffusers, SCHEDULERS[name][0]), dict(SCHEDULERS[name][1])
        config = {key: config[key] for key in _NOISE_SCHEDULE if key in config}
    if base.zero_terminal_snr:
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            raise UserError(
                f"scheduler {name!r} lacks zero-terminal SNR, which {base.name} was trained with; use euler, "
                "ddim or dpm++_2m"
            )
        changes["timestep_spacing"] = "trailing"
    return kind.from_config(config, **changes)
