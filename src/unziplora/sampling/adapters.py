"""LoRAs attached to a base with adjustable strengths: our own branches in the UNet, PEFT's in the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from unziplora.errors import first_line
from unziplora.lora.inject import add_lora, unwrap
from unziplora.lora.layer import STREAMS, Branch
from unziplora.lora.weights import Lora, check_fits, check_shape, scale_blocks, wrong_base_error
from unziplora.models.base import Base
from unziplora.models.text import ENCODERS
from unziplora.utils.logging import quiet


@dataclass(frozen=True)
class NamedLora:
    """A LoRA to attach, from a file or other source.

    Attributes:
        name: 'content' or 'style' (the LoRA then sees its own of three prompts), or any other name.
        blocks: strength of the modules whose path begins with a name; the longest name counts.
    """

    name: str
    lora: Lora
    blocks: Mapping[str, float]
    source: str


class AttachedLoras:
    """LoRAs in a base's UNet and text encoders, all at strength 1 at first; a context that removes them at its end."""

    def __init__(self, base: Base, loras: list[NamedLora]) -> None:
        """Attach LoRAs to a base; `remove` restores it.

        Raises:
            UserError: a LoRA does not fit the base, or has no block of a name.
        """
        self.base = base
        self.names = [named.name for named in loras]
        self._branches: dict[str, dict[str, Branch]] = {}
        self._active = {encoder: _active_adapters(encoder) for encoder in base.text_encoders}
        loras = [replace(named, lora=scale_blocks(named.lora, named.blocks, named.source)) for named in loras]
        for named in loras:
            check_fits(named.lora, base.unet, named.source, f"base {base.name}")
        self._strengths = dict.fromkeys(self.names, 1.0)
        try:
            for named in loras:
                self._add(named)
            self.set_strengths()  # transformers activates only the adapter that was loaded last
        except BaseException:  # memory may run out in the middle
            self.remove()
            raise

    def __enter__(self) -> AttachedLoras:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _add(self, named: NamedLora) -> None:
        stream = named.name if named.name in STREAMS else "full"
        self._branches[named.name] = add_lora(self.base.unet, named.name, named.lora.modules, stream=stream)
        if named.lora.text:
            _load_text_encoders(self.base, named)

    def set_strengths(self, **strengths: float) -> None:
        """Set the strength of LoRAs by name; block strengths are part of their weights."""
        self._strengths.update(strengths)
        for encoder, others in self._active.items():
            _set_adapters(encoder, others, {_peft_name(name): value for name, value in self._strengths.items()})
        for name, branches in self._branches.items():
            for branch in branches.values():
                branch.strength = self._strengths[name]

    @contextmanager
    def muted(self, *names: str) -> Iterator[None]:
        """Temporarily set LoRAs to strength 0; names that are not attached are ignored."""
        before = {name: self._strengths[name] for name in names if name in self._strengths}
        self.set_strengths(**dict.fromkeys(before, 0.0))
        try:
            yield
        finally:
            self.set_strengths(**before)

    def remove(self) -> None:
        """Detach these LoRAs; branches and adapters that others attached stay, and are active as before."""
        for encoder, others in self._active.items():
            _delete_adapters(encoder, others, list(map(_peft_name, self.names)))
        unet = self.base.unet
        for name, branches in self._branches.items():
            for path in branches:
                layer = unet.get_submodule(path)
                del layer.branches[name]
                if not layer.branches:
                    unwrap(unet, path)
        self._branches = {}


def _adapters(encoder: PreTrainedModel) -> set[str]:
    return set(getattr(encoder, "peft_config", {}))


def _active_adapters(encoder: PreTrainedModel) -> list[str]:
    return list(encoder.active_adapters()) if _adapters(encoder) else []


def _peft_name(name: str) -> str:
    """Return the name of our adapter in a text encoder; `Run.load_into` and others may have taken the LoRA's own."""
    return f"unziplora_{name}"


def _set_adapters(encoder: PreTrainedModel, others: list[str], strengths: Mapping[str, float]) -> None:
    """Set the strengths of our adapters by name, as far as the encoder has them; those of others stay active."""
    own = {name: strength for name, strength in strengths.items() if name in _adapters(encoder)}
    if not own:
        return
    encoder.set_adapter([*others, *own])
    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            for name, strength in own.items():
                module.set_scale(name, strength)


def _delete_adapters(encoder: PreTrainedModel, others: list[str], names: list[str]) -> None:
    """Delete our own adapters and activate those of others again; PEFT's layers go with the last adapter."""
    present = _adapters(encoder)
    own = [name for name in names if name in present]
    if not own:
        return
    if present - set(own):
        encoder.set_adapter(others)
    encoder.delete_adapter(own)
    if present == set(own):
        recurse_remove_peft_layers(encoder)


def _load_text_encoders(base: Base, named: NamedLora) -> None:
    where = f"base {base.name}"
    try:
        with quiet(), base.forked_rng():
            for name, encoder in zip(ENCODERS, base.text_encoders, strict=True):
                load_text(encoder, name, named.lora, _peft_name(named.name), named.source, where)
    except (ValueError, RuntimeError, KeyError) as error:
        raise wrong_base_error(named.lora, named.source, where, first_line(error)) from error


def load_text(encoder: PreTrainedModel, component: str, lora: Lora, adapter: str, source: str, base: str) -> None:
    """Load a LoRA's modules of a text encoder as an adapter of PEFT, with the rank of each module.

    diffusers' own loader infers ranks from attention layers alone: it fails if there are none, or if others differ.

    Args:
        component: the encoder's name in a pipeline, with which the LoRA's paths begin.
        source, base: names for messages.

    Raises:
        UserError: as `text_paths`.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for full, path in text_paths(encoder, component, lora, source, base).items():
        down, up = lora.text[full]
        ranks[path] = down.shape[0]
        state |= {f"{path}.lora_A.weight": down.clone(), f"{path}.lora_B.weight": up.clone()}
    if state:
        config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)  # strength 1
        encoder.load_adapter(adapter_name=adapter, adapter_state_dict=state, peft_config=config)
        encoder.to(dtype=encoder.dtype)  # PEFT creates adapters in fp32


def text_paths(encoder: PreTrainedModel | None, component: str, lora: Lora, source: str, base: str) -> dict[str, str]:
    """Return the path in a text encoder of each of a LoRA's modules for it, by the path in the LoRA.

    Raises:
        UserError: the encoder has no such module, or another shape of it.
    """
    shapes = {
        path.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for path, module in (encoder.named_modules() if encoder else ())
        if hasattr(module, "in_features")
    }
    paths = {}
    for full, pair in lora.text.items():
        name, _, path = full.partition(".")
        if name == component:
            # transformers 5 leaves out this level
            paths[full] = path if path in shapes else path.removeprefix("text_model.")
            check_shape(lora, full, pair, shapes.get(paths[full]), source, base)
    return paths
