"""LoRAs in a base, each with a dial: branches of our own where they can be, PEFT's adapters for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from unziplora.errors import UserError, first_line
from unziplora.lora.inject import add_lora, unwrap
from unziplora.lora.layer import STREAMS, Branch
from unziplora.lora.weights import Lora, check_fits, check_shape, misfit, scale_blocks
from unziplora.models.base import Base
from unziplora.models.text import ENCODERS
from unziplora.utils.logging import quiet


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


class AttachedLoras:
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
        self._branches: dict[str, dict[str, Branch]] = {}
        parts = [replace(part, lora=scale_blocks(part.lora, part.blocks, part.source)) for part in parts]
        for part in parts:
            check_fits(part.lora, base.unet, part.source, f"base {base.name}")
        foreign = [part for part in parts if _convolutions(base, part)]
        if foreign and separate:
            raise UserError(
                f"{foreign[0].source}: it changes convolutions, which cannot see a prompt of their own; use "
                "--mode direct"
            )
        self._peft = bool(foreign)
        self._told = [part.name for part in parts if part.lora.text]  # whose text encoders' part PEFT has
        self._weights = dict.fromkeys(self.names, 1.0)
        try:
            for part in parts:
                if self._peft:
                    _load_peft(base, part)
                else:
                    self._add(part)
            self.turn()  # PEFT leaves only the adapter that was loaded last at work
        except UserError:
            self.remove()
            raise

    def _add(self, part: Part) -> None:
        stream = part.name if part.name in STREAMS else "full"
        pairs = {path: (down.flatten(1), up.flatten(1)) for path, (down, up) in part.lora.modules.items()}
        self._branches[part.name] = add_lora(self.base.unet, part.name, pairs, stream=stream)
        if part.lora.text:
            _load_peft(self.base, replace(part, lora=replace(part.lora, modules={})))

    def turn(self, **strengths: float) -> None:
        """Set the strength of LoRAs by name; block strengths are in their weights already."""
        self._weights.update(strengths)
        if self._peft:
            self.base.pipe.set_adapters(list(self._weights), list(self._weights.values()))
            return
        if self._told:
            self.base.pipe.set_adapters(self._told, [self._weights[name] for name in self._told])
        for name, strength in strengths.items():
            for branch in self._branches[name].values():
                branch.strength = strength

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Have LoRAs at strength 0 for a while; names that are not mounted count for nothing."""
        before = {name: self._weights[name] for name in names if name in self._weights}
        self.turn(**dict.fromkeys(before, 0.0))
        try:
            yield
        finally:
            self.turn(**before)

    def remove(self) -> None:
        """Take these LoRAs out again; other branches stay, but what PEFT has put into the base goes with them."""
        if self._peft or self._told:
            self.base.pipe.unload_lora_weights()
        unet = self.base.unet
        for name, branches in self._branches.items():
            for path in branches:
                layer = unet.get_submodule(path)
                del layer.branches[name]
                if not layer.branches:
                    unwrap(unet, path)
        self._branches = {}


def _convolutions(base: Base, part: Part) -> bool:
    return any(isinstance(base.unet.get_submodule(path), nn.Conv2d) for path in part.lora.modules)


def _load_peft(base: Base, part: Part) -> None:
    """The UNet's part through diffusers' own loader, where alpha is rank, so that the pairs count as they are."""
    state: dict[str, Tensor] = {}
    for path, (down, up) in part.lora.modules.items():
        state[f"unet.{path}.lora_A.weight"] = down.clone()
        state[f"unet.{path}.lora_B.weight"] = up.clone()
    try:
        with quiet(), base.forked_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two LoRAs in one encoder are meant
            if state:
                base.pipe.load_lora_weights(state, adapter_name=part.name)
            for name, encoder in zip(ENCODERS, base.text_encoders, strict=True):
                _load_text(base, name, encoder, part)
    except (ValueError, RuntimeError, KeyError) as error:
        raise misfit(part.lora, part.source, f"base {base.name}", first_line(error)) from error


def _load_text(base: Base, name: str, encoder: PreTrainedModel, part: Part) -> None:
    """A text encoder's part as an adapter of PEFT, told module by module.

    diffusers' own loader guesses ranks from attention alone: it fails where there is none, or another rank beside it.
    """
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in encoder.named_modules()
        if hasattr(module, "in_features")
    }
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for full, pair in part.lora.text_modules.items():
        component, _, path = full.partition(".")
        if component != name:
            continue
        path = path if path in shapes else path.removeprefix("text_model.")  # a level that transformers 5 leaves out
        check_shape(part.lora, full, pair, shapes.get(path), part.source, f"base {base.name}")
        down, up = pair
        ranks[path] = down.shape[0]
        state |= {f"{path}.lora_A.weight": down.clone(), f"{path}.lora_B.weight": up.clone()}
    if state:
        told = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)  # strength 1
        encoder.load_adapter(adapter_name=part.name, adapter_state_dict=state, peft_config=told)
        encoder.to(dtype=encoder.dtype)  # PEFT makes adapters in fp32
