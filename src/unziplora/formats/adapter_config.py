"""PEFT's configuration of an adapter: its alphas, and whether its two matrices are all that it changes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from unziplora.errors import UserError
from unziplora.utils.inputs import parse_json

ADAPTER_CONFIG = "adapter_config.json"
"""File in which PEFT stores the configuration, next to the weights."""

_PARTS = ("unet", "text_encoder", "text_encoder_2")

# The following are all of peft.LoraConfig (0.21) that leaves the base as it was and the change B A · alpha / rank.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_HARMLESS_CONFIGS = ("corda", "eva", "loftq", "lora_ga", "megatron", "monteclora", "runtime", "velora")
_HARMFUL = ("alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "lora_bias", "target_parameters")


@dataclass(frozen=True)
class AdapterConfig:
    """Alphas of the modules of one component."""

    alpha: float
    patterns: dict[str, float]
    rank_stabilized: bool

    def alpha_of(self, path: str) -> float:
        """Return a module's alpha by the first pattern that is its path or the end of it, as PEFT does."""
        return next((alpha for pattern, alpha in self.patterns.items() if _is_named(path, pattern)), self.alpha)

    def strength(self, path: str, rank: int) -> float:
        """Return the factor of a module's B A; with rsLoRA it is alpha / √rank (arXiv 2312.03732)."""
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank)


def _is_named(path: str, pattern: str) -> bool:
    """Return whether a pattern is a module's path or the end of it; one that begins with "^" is the whole path."""
    if not pattern.startswith("^"):
        return f".{path}".endswith(f".{pattern}")
    whole = pattern[1:]
    return path in (whole, f"text_model.{whole}")  # a level that transformers 5 leaves out


def read_adapter_config(text: str, source: str) -> dict[str, AdapterConfig]:
    """Return the configuration of each component of the pipeline.

    Args:
        text: JSON of one configuration for all components, or with a component's name in front of every key.
        source: where it is from, for messages.

    Raises:
        UserError: it is malformed, or the adapter is more than B A · alpha / rank; the message names the option.
    """
    try:
        values = parse_json(text)
        if any(key in values for key in ("lora_alpha", "peft_type")):
            parts = dict.fromkeys(_PARTS, values)
        else:
            keys = [key.partition(".") for key in values]
            parts = {part: {key: values[f"{part}.{key}"] for name, _, key in keys if name == part} for part in _PARTS}
        for config in parts.values():
            _refuse_other(config, source)
        if not any(parts.values()):
            raise ValueError("no configuration")
        return {part: _parse(config, source) for part, config in parts.items() if config}
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        raise UserError(f"{source} is not understood, so the alphas are not known") from None


def _parse(config: dict[str, Any], source: str) -> AdapterConfig:
    patterns = {}
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        path = pattern.replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"\^?[\w.-]+", path):  # diffusers begins paths with "^"
            raise UserError(f"{source}: alpha_pattern has a regular expression, {pattern[:80]!r}; name the modules")
        patterns[path] = _alpha(alpha)
    return AdapterConfig(_alpha(config["lora_alpha"]), patterns, bool(config.get("use_rslora")))


def _alpha(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(value)
    return float(value)


def _refuse_other(config: dict[str, Any], source: str) -> None:
    """Refuse an adapter that is not a plain LoRA on the unchanged base."""
    kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(f"{source}: the adapter is {kind!r} (peft_type); only plain LoRA is understood")
    if start not in _HARMLESS_STARTS:
        raise UserError(
            f"{source}: the adapter began with {start!r} (init_lora_weights), which changes the base's own weights, so "
            "on any other base it is wrong. Save it as a plain LoRA: in PEFT with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for key, value in config.items():
        name = key.removesuffix("_config")
        other = key in _HARMFUL or key.startswith("use_") or (name != key and name not in _HARMLESS_CONFIGS)
        if value and other and key != "use_rslora":
            raise UserError(
                f"{source}: the adapter uses {key!r}, so it is more than two matrices; only plain LoRA is understood"
            )
