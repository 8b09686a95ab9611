"""Several seeds, of which the best is kept: the same LoRAs as its own run, after any interruption."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from crashes import snapshots
from PIL import Image
from safetensors.torch import load_file
from trainings import SHORT

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, MachineError, NonFiniteLoss, UserError
from unziplora.jobs.state import RunSummary
from unziplora.methods.unziplora import method as unzip
from unziplora.methods.unziplora import seeds
from unziplora.methods.unziplora.method import split
from unziplora.runs.folder import RunFolder
from unziplora.training.method import Findings
from unziplora.utils.progress import Progress

SCORES = {3: 0.2, 4: 0.7, 5: 0.4}


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Make recipes of three seeds; seed 4 is the best, by a check that knows so beforehand."""
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")
    monkeypatch.setattr(unzip, "check_models", lambda config: None)

    def score(method: object, config: SplitConfig, base: object) -> Findings:
        return Findings({"score": SCORES[config.seed]}, [f"checked seed {config.seed}"])

    monkeypatch.setattr(unzip, "check_loras", score)

    def make(**changes: object) -> SplitConfig:
        own = {"images": [tmp_path / "cat.png"], "base": str(tiny_folder), "out": tmp_path / "runs" / "cat"}
        short = {**SHORT, "steps": 2, "checkpoint_every": 1, "rank": 2, "column_separation": False}
        words = {"content": "cat", "style": "ink", "dino": "d", "clip": "c"}
        return resolve(SplitConfig, {**short, **words, **own, "sample_seeds": [0], "seed": 3, "seeds": 3, **changes})

    return make


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name, file in run.loras.items() for key, value in load_file(file).items()}


def check(run: RunFolder, alone: RunFolder) -> None:
    """Compare a run with its best seed, trained alone."""
    expected, results = tensors(alone), tensors(run)
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert run.config(SplitConfig).seed == 4
    assert run.config(SplitConfig).seeds == 1
    found = json.loads(run.check_file.read_text())
    assert found["seeds"] == {"3": 0.2, "4": 0.7, "5": 0.4}
    assert found["findings"] == ["checked seed 4", "Best of 3 by this check: seed 4 0.70, seed 5 0.40, seed 3 0.20."]
    assert found["findings"][1] in run.card.read_text()
    assert "cat-content.safetensors" in run.card.read_text()
    assert run.steps() == [2]


@pytest.fixture
def alone(config, tmp_path: Path) -> RunFolder:
    """The best seed, trained alone."""
    return split(config(seed=4, seeds=1, out=tmp_path / "alone" / "cat"))


@pytest.mark.slow
def test_the_run_is_that_of_its_best_seed_and_can_be_extended(config, alone: RunFolder):
    events: list[Progress] = []
    run = split(config(), progress=events.append)
    check(run, alone)
    assert sorted(path.name for path in (run.path / "seeds").iterdir()) == ["3", "5"]
    assert RunFolder(run.path / "seeds" / "3" / "cat").loras.keys() == {"content", "style"}
    assert [line["step"] for line in run.read_log()] == [1, 2]  # the log is that of the best
    steps = [event.step for event in events if event.loss == event.loss]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {event.steps for event in events if event.loss == event.loss} == {6}
    settings = resolve(SplitConfig, run.settings_to_extend(SplitConfig, 1), {"out": run.path})
    split(settings, resume=True)
    assert run.steps() == [3]


@pytest.mark.slow
def test_a_seed_that_diverges_is_left_out(config, alone: RunFolder, monkeypatch: pytest.MonkeyPatch):
    real, messages = seeds.run_training, []

    def train(kind: object, one: SplitConfig, *rest: object) -> RunFolder:
        if one.seed in diverging:
            raise NonFiniteLoss("step 2: the loss is nan")
        return real(kind, one, *rest)

    monkeypatch.setattr(seeds, "run_training", train)
    diverging = {3, 4, 5}
    with pytest.raises(NonFiniteLoss):
        split(config())
    diverging = {3}
    run = split(config(), progress=lambda event: messages.append(event.message))
    assert "seed 3 is left out: step 2: the loss is nan" in messages
    assert json.loads(run.check_file.read_text())["seeds"] == {"4": 0.7, "5": 0.4}
    assert all(torch.equal(value, tensors(alone)[name]) for name, value in tensors(run).items())


@pytest.mark.slow
def test_stopped_seed_goes_on_where_it_was(config, alone: RunFolder):
    def stop(event: Progress) -> None:
        if event.step == 3 and event.loss == event.loss:  # the first step of the second seed
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped in seed 4, .*\n  unziplora split --resume --out .*runs/cat$"):
        split(config(), progress=stop)
    run = RunFolder(config().out)
    assert run.unfinished
    assert [line["step"] for line in run.read_log()] == [1, 2, 3]
    assert (RunSummary(run).as_dict()["steps_done"], RunSummary(run).steps) == (3, 6)
    first = run.path / "seeds" / "3" / "cat" / "README.md"
    written = first.stat().st_mtime_ns
    split(run.config(SplitConfig), resume=True)
    check(run, alone)
    assert first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_kill_while_the_best_is_chosen_loses_nothing(config, alone: RunFolder, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(seeds, "_adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            split(config())
    run = RunFolder(config().out)
    states = snapshots(run.path.parent, lambda: split(config(), resume=True), tmp_path / "killed")
    check(run, alone)
    assert len(states) > 20
    for state in states[::4]:
        killed = RunFolder(state / "cat")
        shutil.rmtree(run.path)
        shutil.copytree(killed.path, run.path)  # where its settings say that it is
        if not run.card.exists():
            split(run.config(SplitConfig), resume=True)
        check(run, alone)


def test_renamed_run_knows_the_seeds_that_it_has(config, tmp_path: Path):
    whole = config()
    one = RunFolder(seeds.seed_configs(whole)[0].out)
    one.path.mkdir(parents=True)
    whole.out.rename(tmp_path / "renamed")
    first, second, _ = seeds.seed_configs(whole.model_copy(update={"out": tmp_path / "renamed"}))
    assert first.out == tmp_path / "renamed" / one.path.relative_to(whole.out)
    assert second.out.name == "renamed"


def test_seeds_need_a_check(config, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="a check of the samples finds the best of 3 seeds"):
        config(dino=None, clip=None)
    with pytest.raises(UserError, match="a check of the samples finds the best of 3 seeds"):
        config(sample_seeds=[])


@pytest.mark.slow
def test_runs_that_could_not_be_checked_are_left_to_choose_from(config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unzip, "check_loras", lambda *_: (_ for _ in ()).throw(UserError("no model")))
    with pytest.warns(UserWarning, match="no check"), pytest.raises(MachineError, match="no seed could be checked"):
        split(config(seeds=2))
    assert RunFolder(config().out / "seeds" / "4" / "cat").card.is_file()
