"""How many bytes a training step keeps for its backward pass, read off the graph without computing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.config.recipe import KINDS
from unziplora.lora.inject import add_lora, attention_linears
from unziplora.lora.layer import STREAMS
from unziplora.utils.logging import quiet

TOKENS = 77


class _Flash(torch.autograd.Function):
    """Attention as fused kernels save it: q, k, v, the output and one number per query, never the matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def kept_bytes(
    config: dict[str, Any],
    *,
    rank: int,
    latent: int,
    batch: int,
    half: bool,
    checkpointing: bool,
    streams: int = len(STREAMS),
) -> int:
    """Bytes of activations that one forward pass with both LoRAs keeps for the backward pass.

    The UNet is built on the meta device: shapes without numbers. What autograd saves is counted, once per
    tensor. With gradient checkpointing that is each checkpointed block's input, and all of the largest block.

    Args:
        config: the UNet's configuration.
        rank: of both LoRAs.
        latent: side of the latents.
        batch: latents per step.
        half: the base computes in bf16 or fp16.
        checkpointing: whether diffusers' blocks are computed twice.
        streams: prompts in the conditioning: three with prompt separation, else one.
    """
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta"), quiet():
        unet: Any = UNet2DConditionModel.from_config(config).requires_grad_(False)
        for name in KINDS:
            add_lora(unet, name, _pairs(unet, rank), stream=name)
        if checkpointing:  # as in a pass with it, which here is not made
            unet.joint_factors.detach()
        unet.train().to(dtype)  # autocast, which the LoRAs are trained under, knows no meta device
        counter = _Counter(unet)
        inputs = _inputs(unet, batch, latent, streams, dtype)
        with counter.counting(), _as_on_a_gpu():
            unet(**inputs)
    if not checkpointing:
        return counter.total
    blocks = counter.blocks
    return counter.total - sum(blocks) + counter.block_inputs + max(blocks, default=0)


def _pairs(unet: nn.Module, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    linears: dict[str, Any] = {}
    for path in attention_linears(unet):
        module = unet.get_submodule(path)
        linears[path] = getattr(module, "base", module)
    return {
        path: (torch.empty(rank, linear.in_features), torch.empty(linear.out_features, rank))
        for path, linear in linears.items()
    }


def _inputs(unet: Any, batch: int, latent: int, streams: int, dtype: torch.dtype) -> dict[str, Any]:
    config = unet.config
    time_ids = 6
    pooled = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
    return {
        "sample": torch.empty(batch, config.in_channels, latent, latent, dtype=dtype),
        "timestep": torch.zeros(batch),
        "encoder_hidden_states": torch.empty(batch, TOKENS, streams * config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, time_ids, dtype=dtype),
        },
    }


class _Counter:
    """Counts saved tensors, in all and inside each block that diffusers can checkpoint."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.total = self.block_inputs = 0
        self.blocks: list[int] = []
        # weights are counted elsewhere; storages are told apart by identity, so they must stay alive
        self._alive = [tensor.untyped_storage() for tensor in (*unet.parameters(), *unet.buffers())]
        self._seen = {storage._cdata for storage in self._alive}

    @contextmanager
    def counting(self) -> Iterator[None]:
        handles = []
        for module in self.unet.modules():
            if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.total += storage.nbytes()
        return tensor

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before = self.total
        self.block_inputs += sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.blocks.append(self.total - self._before)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let attention on the meta device save what fused kernels save, and norms compute in fp32 as autocast does."""
    originals = {name: getattr(F, name) for name in ("scaled_dot_product_attention", "layer_norm", "group_norm")}

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    def norm(name: str) -> Any:
        def call(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
            scale = [None if w is None else w.float() for w in (weight, bias)]
            return originals[name](x.float(), shape, *scale, eps).to(x.dtype)

        return call

    F.scaled_dot_product_attention = attention
    F.layer_norm, F.group_norm = norm("layer_norm"), norm("group_norm")
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)
