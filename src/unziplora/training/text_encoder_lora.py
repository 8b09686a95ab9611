"""A LoRA on the text encoders, by PEFT, trained together with the UNet's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from unziplora.config.training import ImageConfig
from unziplora.formats.sdxl import text_module
from unziplora.lora.algebra import Pair
from unziplora.models.base import Base
from unziplora.models.text import ENCODERS, TARGETS, Conditioning, encode_each
from unziplora.training.loss import Examples, generator


@dataclass(frozen=True)
class LazyConditioning:
    """Conditioning of N images that is encoded on access, so that a step encodes only the prompts that it draws."""

    base: Base  # its text encoders are on the device
    prompts: Sequence[str]  # one per image
    encoded: Conditioning  # of the same images; only its size conditioning is used

    def take(self, index: Tensor) -> Conditioning:
        rows = encode_each(self.base, [self.prompts[number] for number in index.tolist()])
        return rows.with_time_ids(self.encoded.take(index).time_ids)


class TextLora:
    """PEFT's LoRA on q, k, v, out of both text encoders. While it trains, every step embeds the prompts again."""

    def __init__(self, base: Base, config: ImageConfig, prompts: Sequence[str] = (), prior: Sequence[str] = ()) -> None:
        """Add adapters to the base's frozen text encoders, in place; prompts are one per image and class image."""
        self.base, self.prompts, self.prior_prompts = base, list(prompts), list(prior)
        self.strength = (config.alpha or config.rank) / config.rank
        adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=TARGETS)
        with base.forked_rng():
            torch.manual_seed(generator(config.seed, "init", "text").initial_seed())
            for encoder in base.text_encoders:
                encoder.add_adapter(adapter)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()  # the encoders themselves may be in half precision

    @contextmanager
    def off(self) -> Iterator[None]:
        """Temporarily disable the adapters of the text encoders."""
        for encoder in self.base.text_encoders:
            encoder.disable_adapters()
        try:
            yield
        finally:
            for encoder in self.base.text_encoders:
                encoder.enable_adapters()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained matrices by encoder and name."""
        return {
            f"{name}.{path}": parameter
            for name, encoder in zip(ENCODERS, self.base.text_encoders, strict=True)
            for path, parameter in encoder.named_parameters()
            if parameter.requires_grad
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained matrices."""
        return list(self.named_parameters().values())

    def read(self, examples: Examples, prior: bool = False) -> LazyConditioning:
        """Return the examples' conditioning with embeddings through which gradients reach the adapters."""
        return LazyConditioning(self.base, self.prior_prompts if prior else self.prompts, examples.conditioning)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named_parameters().items():
            parameter.copy_(state[name])

    def export(self) -> dict[str, Pair]:
        """Return the adapters as `Lora.text`: fp32, alpha folded into B."""
        pairs = {}
        for name, encoder in zip(ENCODERS, self.base.text_encoders, strict=True):
            state = get_peft_model_state_dict(encoder, adapter_name="default")
            for path in (key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")):
                down, up = (state[f"{path}.{factor}.weight"].detach().float().cpu() for factor in ("lora_A", "lora_B"))
                pairs[f"{name}.{text_module(path)}"] = down, up * self.strength
        return pairs
