"""A UNet's training passes as CUDA graphs: recorded once, then replayed.

A step of a LoRA training at batch 1 is thousands of operations of a few microseconds each. A fast GPU does them sooner
than Python can ask for them, and waits most of the time. A recorded pass is asked for with one call. Its operations and
their order are the same; what changes from step to step, inputs and weights, is read from where it was.
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
from unziplora.lora.factors import JointFactors
from unziplora.lora.layer import Branch

Pass = Callable[..., Tensor]
"""A recorded pass: from the UNet's inputs and the trained parameters to its prediction, with a gradient for each."""

Predict = Callable[..., tuple[Tensor, ...]]
"""A UNet, or its recorded passes: from inputs by name (`Noised.unet_inputs`) to a tuple with the prediction."""

INPUTS = ("sample", "timestep", "encoder_hidden_states")
"""The inputs of a UNet that are tensors; then come the added conditions."""

FIRST = 2
"""Passes of a kind that are not recorded: cuDNN and cuBLAS choose their algorithms in them."""


@contextmanager
def recording(unet: nn.Module, parameters: Sequence[Tensor], config: TrainingConfig) -> Iterator[Predict]:
    """Yield a UNet's recorded passes if it is on an NVIDIA GPU and the recipe allows them, else the UNet itself.

    Args:
        parameters: the parameters inside the UNet that train.
        config: the recipe; recorded passes need the memory that gradient checkpointing is to save.
    """
    device = next(unet.parameters()).device
    if device.type != "cuda" or torch.version.cuda is None or not graphs_wanted(config):
        yield unet
        return
    recorder = Recorder(unet, parameters)
    try:
        with warnings.catch_warnings():
            # A recorded pass hands its gradients over from the stream that it was recorded on.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
            yield recorder
    finally:
        recorder.clear()


def graphs_wanted(config: TrainingConfig) -> bool:
    """Whether a recipe's steps are recorded where that can be done."""
    return config.cuda_graphs and not config.gradient_checkpointing


class Recorder:
    """The recorded passes of one UNet.

    A pass is recorded anew for other shapes, other LoRAs at work, other parameters that train, and for the second loss
    of a step: a recorded pass has one place for its gradients, which the next one would overwrite. Passes without
    a gradient are not recorded.

    Attributes:
        passes: what is recorded, by kind.
    """

    def __init__(self, unet: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.unet, self.parameters = unet, list(parameters)
        self.passes: dict[Any, Pass] = {}
        self.turns: dict[Any, int] = {}
        self.trained: tuple[bool, ...] = ()
        self.turn = 0  # passes before this one in the same step
        self.pool: Any = None
        self.failed = False

    def clear(self) -> None:
        """Forget all passes, and give their memory back."""
        self.passes, self.turns, self.pool = {}, {}, None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        """Return the UNet's prediction, [B, C, h, w], as the UNet does for the same inputs."""
        tensors = (*(inputs[name] for name in INPUTS), *inputs["added_cond_kwargs"].values())
        kind = self.kind(tensors)
        if kind is None:
            return self.unet(**inputs)
        if kind not in self.passes:
            self.turns[kind] = self.turns.get(kind, 0) + 1
            if self.turns[kind] <= FIRST or not self.record(kind, tensors):
                return self.unet(**inputs)
        return (self.passes[kind](*tensors, *self.parameters),)

    def kind(self, tensors: Sequence[Tensor]) -> Any:
        """What a recorded pass holds for, with these inputs; None: the pass is not to be recorded."""
        if self.failed or not torch.is_grad_enabled():
            return None
        branches = list(_branches(self.unet))
        if any(branch.observer is not None for branch in branches):
            return None
        trained = tuple(p.requires_grad for p in self.parameters)
        if trained != self.trained:  # what was recorded for others will not be asked for again
            self.clear()
            self.trained = trained
        self.turn = self.turn + 1 if any(p.grad is not None for p in self.parameters) else 0
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        strengths = tuple((id(branch), branch.strength) for branch in branches)
        return autocast, self.turn, strengths, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)

    def record(self, kind: Any, tensors: Sequence[Tensor]) -> bool:
        """Record a pass forward and backward; False, for good, where this cannot be done."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        examples = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
        enabled, dtype = kind[0]

        def run(sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
            added = {"text_embeds": pooled, "time_ids": ids}
            # A weight that autocast has cast would be read from the cache of another pass.
            with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                outputs = self.unet(sample, timestep, tokens, added_cond_kwargs=added, return_dict=False)
            prediction: Tensor = outputs[0]
            return prediction

        try:
            with torch.autocast("cuda", enabled=False):
                self.passes[kind] = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                    run, (*examples, *self.parameters), num_warmup_iters=1, allow_unused_input=True, pool=self.pool
                )
        except RuntimeError as error:  # also out of memory
            self.failed = True
            self.clear()
            warnings.warn(
                f"the steps are not recorded as CUDA graphs ({first_line(error)}); they run one operation at a time. "
                "--no-cuda-graphs says so from the start",
                stacklevel=2,
            )
        return not self.failed


def _branches(unet: nn.Module) -> Iterator[Branch]:
    """The branches of all adapted layers."""
    hooks = getattr(unet, "joint_factors", None)
    if isinstance(hooks, JointFactors):
        for layer in hooks.layers.values():
            yield from map(layer.branch, layer.branches)
