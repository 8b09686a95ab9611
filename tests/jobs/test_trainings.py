"""Real trainings on the tiny base: one that stays loaded gives the same LoRAs as one that is loaded for each run."""

import signal
from pathlib import Path

import pytest
import torch
from fake_jobs import recipe
from PIL import Image
from safetensors.torch import load_file
from splits import TINY

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import MachineError, UserError
from unziplora.jobs import trainings
from unziplora.jobs.queue import Queue
from unziplora.jobs.trainings import Trainer, check
from unziplora.jobs.worker import work
from unziplora.methods.unziplora.method import split
from unziplora.models import base as bases
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Progress
from unziplora.utils.signals import caught


def silent(event: Progress) -> None:
    return None


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name, file in run.loras.items() for key, value in load_file(file).items()}


@pytest.mark.slow
def test_jobs_of_one_base_load_it_once_and_give_what_a_single_run_gives(
    tmp_path: Path, image: Path, tiny_folder: Path, fresh_base, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"images": [image], "content": "cat", "style": "ink", "base": str(tiny_folder), "sample_seeds": []}
    tiny = {**words, **TINY, "column_periods": 1, "steps": 3, "phrase_steps": 0}
    small = {**words, "rank": 2, "steps": 1}
    loads = []
    monkeypatch.setattr(bases, "load_base", lambda *args: loads.append(args) or fresh_base())
    queue = Queue(tmp_path / "runs")
    queue.submit(DreamBoothConfig(out=queue.folder / "first", **small))
    queue.submit(SplitConfig(out=queue.folder / "second", **tiny))
    result = work(queue, Trainer(), silent, until_empty=True)
    assert not result.failed
    assert len(loads) == 1
    expected = tensors(split(SplitConfig(out=tmp_path / "single", **tiny), base=fresh_base()))
    actual = tensors(RunFolder(queue.folder / "second"))
    assert expected.keys() == actual.keys() != set()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_base_is_dropped_after_a_fault_of_the_machine(
    fresh_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fake_jobs

    trainer = Trainer()
    trainer.kept.base = fresh_base()
    monkeypatch.setattr(Trainer, "load", lambda *_: (_ for _ in ()).throw(MachineError("out of memory")))
    with pytest.raises(MachineError):
        trainer(fake_jobs.begin(tmp_path / "run"), silent)
    assert trainer.kept.base is None


def test_unusable_recipes_are_refused_before_a_folder_exists(tmp_path: Path, image: Path, tiny_folder: Path) -> None:
    words = {"content": "cat", "style": "ink", "base": str(tiny_folder), "out": tmp_path / "run"}
    check(SplitConfig(images=[image], **words))
    with pytest.raises(UserError, match=r"gone\.png"):
        check(SplitConfig(images=[tmp_path / "gone.png"], **words))
    assert not (tmp_path / "run").exists()


def test_stop_during_an_import_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []

    def slow_import(name: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        imported.append(name)

    monkeypatch.setattr(trainings, "import_module", slow_import)
    with caught(signal.default_int_handler, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        trainings.import_whole(recipe(tmp_path))
    assert imported == ["unziplora.models.base"]
