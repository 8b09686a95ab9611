"""Samplers by the names that users know, set up from the base's own noise schedule."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from unziplora.errors import UserError

if TYPE_CHECKING:
    from unziplora.models.base import Base

# name → diffusers class and what to change in its configuration. Latents are never clipped to −1…1.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
SCHEDULER_NAMES = ("base", *SCHEDULERS)


def find_name(name: str) -> str:
    """The key of `SCHEDULERS` (or 'base') that a user means by a name such as 'DPM++ 2M Karras'.

    Raises:
        ValueError: there is none.
    """
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    if key not in SCHEDULER_NAMES:
        near = get_close_matches(key, SCHEDULER_NAMES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown; {hint}Known are {', '.join(SCHEDULER_NAMES)}")
    return key


def make_scheduler(base: Base, name: str = "base") -> Any:
    """A fresh scheduler; 'base' is the one that the base comes with.

    Prediction type and noise schedule are the base's. With zero-terminal SNR, sampling starts at the last
    timestep (arXiv 2305.08891, section 3.3).

    Raises:
        UserError: there is no scheduler of that name, or it knows no zero-terminal SNR and the base needs it.
    """
    import diffusers  # here, so that the names alone are had without it

    try:
        key = find_name(name)
    except ValueError as error:
        raise UserError(f"scheduler {name!r}: {error}") from None

    if key == "base":
        kind, changes = type(base.scheduler), {}
    else:
        kind, changes = getattr(diffusers, SCHEDULERS[key][0]), dict(SCHEDULERS[key][1])
    if base.zero_terminal_snr:
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            raise UserError(
                f"scheduler {name!r} knows no zero-terminal SNR, which {base.name} was trained with; use euler, "
                "ddim or dpm++_2m"
            )
        changes["timestep_spacing"] = "trailing"
    return kind.from_config(base.scheduler.config, **changes)
