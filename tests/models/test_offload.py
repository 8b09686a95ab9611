"""What is on the device while other parts work; the GPU is played by a note of where modules are sent."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unziplora.models.offload import base_on_cpu, moved_to, on_cpu, text_encoders_ready

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Traveller(torch.nn.Linear):
    """Says where it is, and notes where it was sent."""

    def __init__(self, home: torch.device) -> None:
        super().__init__(2, 2)
        self.place, self.trips = home, []

    def to(self, device: torch.device) -> "Traveller":  # type: ignore[override]
        self.place = device
        self.trips.append(device.type)
        return self


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unziplora.models.offload._device", lambda module: module.place)


def base(unet: torch.device, encoders: torch.device) -> Any:
    return SimpleNamespace(
        device=GPU, unet=Traveller(unet), vae=Traveller(CPU), text_encoders=[Traveller(encoders), Traveller(encoders)]
    )


def test_visitors_go_home_also_after_a_failure() -> None:
    module = Traveller(CPU)

    def fail() -> None:
        with moved_to([module], GPU):
            assert module.place == GPU
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert module.trips == ["cuda", "cpu"]


def test_only_what_is_on_a_gpu_goes_away() -> None:
    on, off = Traveller(GPU), Traveller(CPU)
    with on_cpu([on, off]):
        assert (on.place, off.place) == (CPU, CPU)
    assert (on.trips, off.trips) == (["cpu", "cuda"], [])


def test_the_unet_makes_room_for_text_encoders_that_come() -> None:
    there = base(GPU, CPU)
    with text_encoders_ready(there):
        assert there.unet.place == CPU
        assert all(encoder.place == GPU for encoder in there.text_encoders)
        with text_encoders_ready(there):  # as `embed` does inside of `generate`
            assert there.unet.place == CPU
            assert all(encoder.place == GPU for encoder in there.text_encoders)
    assert there.unet.place == GPU
    assert all(encoder.trips[-1] == "cpu" for encoder in there.text_encoders)


def test_the_unet_stays_where_the_text_encoders_are_there_already() -> None:
    there = base(GPU, GPU)
    with text_encoders_ready(there):
        assert there.unet.trips == []
        assert all(encoder.place == GPU for encoder in there.text_encoders)


def test_a_whole_base_leaves_its_gpu() -> None:
    there = base(GPU, GPU)
    with base_on_cpu(there):
        assert {part.place for part in (there.unet, there.vae, *there.text_encoders)} == {CPU}
    assert there.unet.place == GPU
    assert there.vae.trips == []
