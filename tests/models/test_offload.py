"""Temporary placement of modules; fake modules record their device, so no GPU is needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unziplora.models.offload import base_on_cpu, moved_to, on_cpu, text_encoders_ready

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeModule(torch.nn.Linear):
    """Module that records its device and every move."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(2, 2)
        self.place, self.moves = device, []

    def to(self, device: torch.device) -> "FakeModule":  # type: ignore[override]
        self.place = device
        self.moves.append(device.type)
        return self


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unziplora.models.offload._device", lambda module: module.place)


def base(unet: torch.device, encoders: torch.device) -> Any:
    return SimpleNamespace(
        device=GPU,
        unet=FakeModule(unet),
        vae=FakeModule(CPU),
        text_encoders=[FakeModule(encoders), FakeModule(encoders)],
    )


def test_moved_modules_return_after_a_failure() -> None:
    module = FakeModule(CPU)

    def fail() -> None:
        with moved_to([module], GPU):
            assert module.place == GPU
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert module.moves == ["cuda", "cpu"]


def test_on_cpu_moves_only_modules_on_a_gpu() -> None:
    on, off = FakeModule(GPU), FakeModule(CPU)
    with on_cpu([on, off]):
        assert (on.place, off.place) == (CPU, CPU)
    assert (on.moves, off.moves) == (["cpu", "cuda"], [])


def test_unet_makes_room_for_absent_text_encoders() -> None:
    there = base(GPU, CPU)
    with text_encoders_ready(there):
        assert there.unet.place == CPU
        assert all(encoder.place == GPU for encoder in there.text_encoders)
        with text_encoders_ready(there):  # as `embed` does inside of `generate`
            assert there.unet.place == CPU
            assert all(encoder.place == GPU for encoder in there.text_encoders)
    assert there.unet.place == GPU
    assert all(encoder.moves[-1] == "cpu" for encoder in there.text_encoders)


def test_unet_stays_if_the_text_encoders_are_present() -> None:
    there = base(GPU, GPU)
    with text_encoders_ready(there):
        assert there.unet.moves == []
        assert all(encoder.place == GPU for encoder in there.text_encoders)


def test_base_on_cpu_moves_all_parts() -> None:
    there = base(GPU, GPU)
    with base_on_cpu(there):
        assert {part.place for part in (there.unet, there.vae, *there.text_encoders)} == {CPU}
    assert there.unet.place == GPU
    assert there.vae.moves == []
