"""A UNet's training passes as CUDA graphs: recorded once, then replayed.

A step of a LoRA training at batch 1 consists of thousands of operations of a few microseconds each. A fast GPU executes
them faster than Python launches them, and idles most of the time. A recorded pass is launched with one call. Its
operations and their order are the same. Inputs and weights, which change from step to step, are read from fixed places.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unziplora.config.training import TrainingConfig
from unziplora.errors import first_line
from unziplora.lora.inject import adapted_layers

Pass = Callable[..., Tensor]
"""A recorded pass: the UNet's prediction from its inputs and the trained parameters, differentiable in all of them."""

Predict = Callable[..., tuple[Tensor, ...]]
"""A UNet, or its recorded passes: takes inputs by name (`Noised.unet_inputs`), returns a tuple with the prediction."""

INPUTS = ("sample", "timestep", "encoder_hidden_states")
"""Inputs of a UNet that are tensors; the added conditions follow them."""

FIRST = 2
"""Number of passes before one is recorded: cuDNN and cuBLAS choose their algorithms in them."""


@contextmanager
def recording(unet: nn.Module, parameters: Sequence[Tensor], config: TrainingConfig) -> Iterator[Predict]:
    """Yield a UNet's recorded passes if it is on an NVIDIA GPU and the recipe uses them, else the UNet itself.

    Args:
        parameters: the trained parameters inside the UNet.
    """
    device = next(unet.parameters()).device
    if device.type != "cuda" or torch.version.cuda is None or not uses_cuda_graphs(config):
        yield unet
        return
    recorder = Recorder(unet, parameters)
    try:
        with warnings.catch_warnings():
            # A recorded pass returns its gradients on the stream that it was recorded on.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
            yield recorder
    finally:
        recorder.clear()


def uses_cuda_graphs(config: TrainingConfig) -> bool:
    """Return True if a recipe records its steps on a GPU.

    Gradient checkpointing excludes it, because recording needs the memory that checkpointing saves.
    """
    return config.cuda_graphs and not config.gradient_checkpointing


class Recorder:
    """The recorded passes of one UNet.

    A change of shapes, active LoRAs or trained parameters needs another recording. So does each further loss of a step,
    because a recorded pass has one place for its gradients, which the next loss would overwrite. Passes without a
    gradient are not recorded.
    """

    def __init__(self, unet: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.unet, self.parameters = unet, list(parameters)
        self.layers = list(adapted_layers(unet).values())
        self.passes: dict[Any, Pass] = {}  # by `key`
        self.counts: dict[Any, int] = {}
        self.trained: tuple[bool, ...] = ()
        self.losses = 0  # of this step, before the present one
        self.pool: Any = None
        self.failed = False

    def clear(self) -> None:
        """Delete all passes and free their memory."""
        self.passes, self.counts, self.pool = {}, {}, None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        """Return the UNet's prediction, [B, C, h, w], as the UNet does for the same inputs."""
        tensors = (*(inputs[name] for name in INPUTS), *inputs["added_cond_kwargs"].values())
        key = self.key(tensors)
        if key is None:
            return self.unet(**inputs)
        if key not in self.passes:
            self.counts[key] = self.counts.get(key, 0) + 1
            if self.counts[key] <= FIRST or not self.record(key, tensors):
                return self.unet(**inputs)
        return (self.passes[key](*tensors, *self.parameters),)

    def key(self, tensors: Sequence[Tensor]) -> Any:
        """Return everything that a recorded pass of these inputs depends on; None if it cannot be recorded."""
        if self.failed or not torch.is_grad_enabled():
            return None
        branches = [layer.branch(name) for layer in self.layers for name in layer.branches]
        if any(branch.observer is not None for branch in branches):
            return None
        trained = tuple(p.requires_grad for p in self.parameters)
        if trained != self.trained:  # passes recorded for other parameters are not needed again
            self.clear()
            self.trained = trained
        self.losses = self.losses + 1 if any(p.grad is not None for p in self.parameters) else 0
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        strengths = tuple((id(branch), branch.strength) for branch in branches)
        return autocast, self.losses, strengths, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)

    def record(self, key: Any, tensors: Sequence[Tensor]) -> bool:
        """Record a pass forward and backward; return False if that fails, after which nothing more is recorded."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        examples = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
        enabled, dtype = key[0]

        def run(sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
            added = {"text_embeds": pooled, "time_ids": ids}
            # With its cache, autocast would reuse weights that it cast in another pass.
            with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                outputs = self.unet(sample, timestep, tokens, added_cond_kwargs=added, return_dict=False)
            prediction: Tensor = outputs[0]
            return prediction

        try:
            with torch.autocast("cuda", enabled=False):
                self.passes[key] = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                    run, (*examples, *self.parameters), num_warmup_iters=1, allow_unused_input=True, pool=self.pool
                )
        except RuntimeError as error:  # also out of memory
            self.failed = True
            self.clear()
            warnings.warn(
                f"the steps are not recorded as CUDA graphs ({first_line(error)}); they run one operation at a time. "
                "--no-cuda-graphs skips the attempt",
                stacklevel=2,
            )
        return not self.failed
