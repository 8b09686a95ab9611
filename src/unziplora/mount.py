"""LoRAs in a base, each with a dial: branches of our own where they can be, PEFT's adapters for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unziplora.base import Base
from unziplora.errors import UserError, first_line
from unziplora.lora.files import Lora
from unziplora.lora.layer import STREAMS, Branch, BranchedLinear, add_lora
from unziplora.quiet import quiet


@dataclass(frozen=True)
class Part:
    """A LoRA to be mounted.

    Attributes:
        name: 'content' or 'style' (its prompt, where there are three), or any other name.
        lora: strength 1.
        blocks: strength of the modules whose path begins so; the longest beginning counts.
        source: where it came from, for messages.
    """

    name: str
    lora: Lora
    blocks: Mapping[str, float]
    source: str


class Mounted:
    """LoRAs in a base's UNet (and text encoders), all at strength 1 until a dial is turned."""

    def __init__(self, base: Base, parts: list[Part], separate: bool = False) -> None:
        """Put LoRAs into the base; call `remove` to have it back as it was.

        Args:
            separate: for three prompts: our own branches are needed.

        Raises:
            UserError: a LoRA does not fit the base, names no block, or cannot take a prompt of its own.
        """
        self.base = base
        self.names = [part.name for part in parts]
        self._branches: dict[str, list[tuple[str, Branch, float]]] = {}
        for part in parts:
            _check_blocks(part)
            _check_fit(base, part)
        foreign = [part for part in parts if part.lora.text or _convolutions(base, part)]
        if foreign and separate:
            raise UserError(
                f"{foreign[0].source}: it changes text encoders or convolutions, which cannot see a prompt of their "
                "own; use --mode direct"
            )
        self._peft = bool(foreign)
        self._weights = dict.fromkeys(self.names, 1.0)
        try:
            for part in parts:
                factors = {path: block_strength(path, part.blocks) for path in part.lora.modules}
                if self._peft:
                    _load_peft(base, part, factors)
                else:
                    self._add(part, factors)
        except UserError:
            self.remove()
            raise

    def _add(self, part: Part, factors: Mapping[str, float]) -> None:
        stream = part.name if part.name in STREAMS else "full"
        pairs = {path: (down.flatten(1), up.flatten(1)) for path, (down, up) in part.lora.modules.items()}
        branches = add_lora(self.base.unet, part.name, pairs, stream=stream)
        self._branches[part.name] = [(path, branch, factors[path]) for path, branch in branches.items()]
        self.turn(**{part.name: 1.0})

    def turn(self, **strengths: float) -> None:
        """Set the strength of LoRAs by name; block strengths stay as factors on top."""
        if self._peft:
            self._weights.update(strengths)
            self.base.pipe.set_adapters(list(self._weights), list(self._weights.values()))
            return
        for name, strength in strengths.items():
            for _, branch, factor in self._branches[name]:
                branch.strength = strength * factor

    def remove(self) -> None:
        """Take these LoRAs out again; others stay."""
        if self._peft:
            self.base.pipe.unload_lora_weights()
            return
        unet = self.base.unet
        for name, entries in self._branches.items():
            for path, _, _ in entries:
                layer = unet.get_submodule(path)
                del layer.branches[name]
                if not layer.branches:
                    parent, _, child = path.rpartition(".")
                    setattr(unet.get_submodule(parent), child, layer.base)
        self._branches = {}


def block_strength(path: str, blocks: Mapping[str, float]) -> float:
    """Strength of a module: that of the longest block name which its path begins with, else 1."""
    fitting = [name for name in blocks if path == name or path.startswith(name + ".")]
    return blocks[max(fitting, key=len)] if fitting else 1.0


def _check_blocks(part: Part) -> None:
    for name in part.blocks:
        if not any(path == name or path.startswith(name + ".") for path in part.lora.modules):
            known = sorted({".".join(path.split(".")[: _depth(path)]) for path in part.lora.modules})
            raise UserError(f"{part.source} has no modules in block {name!r}; it has {', '.join(known)}")


def _depth(path: str) -> int:
    """Parts of a path that name its block: up_blocks.0.attentions.1, mid_block.attentions.0."""
    return 3 if path.startswith("mid_block") else 4


def _check_fit(base: Base, part: Part) -> None:
    """Refuse a LoRA with modules or sizes that the base's UNet does not have, before anything is changed."""
    for path, (down, up) in part.lora.modules.items():
        try:
            module = base.unet.get_submodule(path)
        except AttributeError:
            raise _misfit(base, part, f"it has no {path}") from None
        weight = getattr(module.base if isinstance(module, BranchedLinear) else module, "weight", None)
        if not isinstance(module, (BranchedLinear, nn.Linear, nn.Conv2d)) or weight is None:
            raise _misfit(base, part, f"{path} is a {type(module).__name__} in the base")
        if (up.shape[0], down.shape[1]) != tuple(weight.shape[:2]):
            ours, its = f"{up.shape[0]}×{down.shape[1]}", "×".join(str(side) for side in weight.shape[:2])
            raise _misfit(base, part, f"{path} is {ours} in the LoRA, {its} in the base")


def _convolutions(base: Base, part: Part) -> bool:
    return any(isinstance(base.unet.get_submodule(path), nn.Conv2d) for path in part.lora.modules)


def _load_peft(base: Base, part: Part, factors: Mapping[str, float]) -> None:
    """Through diffusers' own loader; alpha is rank there, so the pairs count as they are."""
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in part.lora.text.items()}
    for path, (down, up) in part.lora.modules.items():
        state[f"unet.{path}.lora_A.weight"] = down.clone()
        state[f"unet.{path}.lora_B.weight"] = up * factors[path]
    try:
        with quiet(), torch.random.fork_rng():
            base.pipe.load_lora_weights(state, adapter_name=part.name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(base, part, first_line(error)) from error


def _misfit(base: Base, part: Part, why: str) -> UserError:
    trained = part.lora.metadata.get("ss_sd_model_name") or part.lora.metadata.get("ss_base_model_version")
    told = f"; it was trained on {trained}" if trained else ""
    return UserError(f"{part.source} does not fit base {base.name} ({why}){told}. Give its base with --base")
