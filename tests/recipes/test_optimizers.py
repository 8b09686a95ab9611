"""Muon where it applies, AdamW elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from recipes.base.optimizers import MuonAdamW


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv_in": nn.Conv2d(2, 4, 1), "hidden": nn.Conv2d(4, 6, 3), "norm": nn.LayerNorm(6)})


def test_hidden_kernels_move_along_orthogonal_rows_and_the_rest_as_with_adamw() -> None:
    module, plain = network(), network()
    mine, adamw = MuonAdamW(module, 1e-2), torch.optim.AdamW(plain.parameters(), 1e-2, betas=(0.9, 0.99))
    for net in (module, plain):
        torch.manual_seed(1)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    before = module["hidden"].weight.detach().clone()
    mine.step()
    adamw.step()
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q) == (name != "hidden.weight")
    moved = (module["hidden"].weight.detach() - (1 - 1e-2 * 0.01) * before).flatten(1)
    singular = torch.linalg.svdvals(moved) / (1e-2 * 0.2 * 36**0.5)  # a matrix of [6, 36], scaled as AdamW's steps are
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3
    mine.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_resumed_steps_equal_uninterrupted_ones() -> None:
    def steps(module: nn.Module, optimizer: MuonAdamW, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            for p in module.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    straight, first, second = network(), network(), network()
    steps(straight, MuonAdamW(straight, 1e-2), range(4))
    optimizer = MuonAdamW(first, 1e-2)
    steps(first, optimizer, range(2))
    resumed = MuonAdamW(second, 1e-2)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, range(2, 4))
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
