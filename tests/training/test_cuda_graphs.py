"""Recorded passes, with a stand-in for CUDA graphs that also has fixed places for inputs, output and gradients."""

import pytest
import torch
from splits import build, examples, scheduler

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import resolve
from unziplora.methods.adapters import TrainingData
from unziplora.methods.dreambooth import DreamBooth
from unziplora.training.cuda_graphs import FIRST, Recorder, recording
from unziplora.training.trainer import Trainer


class Replays:
    """Stand-in for `torch.cuda.make_graphed_callables` that computes again, but between fixed places."""

    def __init__(self):
        self.recorded, self.replayed, self.fails = 0, 0, False

    def __call__(self, run, places, num_warmup_iters, allow_unused_input, pool):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        trained = [place for place in places if place.requires_grad]
        results = {}

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                self.replayed += 1
                with torch.no_grad():
                    for place, tensor in zip(places, inputs, strict=True):
                        if place.data_ptr() != tensor.data_ptr():
                            place.copy_(tensor)
                with torch.enable_grad():
                    results["graph"] = run(*places)
                return results.setdefault("output", torch.empty_like(results["graph"])).copy_(results["graph"]).detach()

            @staticmethod
            def backward(ctx, grad):
                gradients = torch.autograd.grad(results["graph"], trained, grad, allow_unused=True)
                for place, value in zip(trained, gradients, strict=True):
                    if value is not None:
                        results.setdefault(id(place), torch.empty_like(place)).copy_(value)
                return tuple(results[id(place)].detach() if id(place) in results else None for place in places)

        return Graphed.apply


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    stand_in = Replays()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return stand_in


def trained(method, steps, recorded):
    """Return the losses and the state of a method after some steps, with or without recorded passes."""
    trainer = Trainer(method, method.config)
    if recorded:
        method.predict = Recorder(method.unet, trainer.parameters())
    losses = [trainer.step(step).loss for step in range(steps)]
    return losses, method.state_dict()


def assert_same(one, other):
    """Check that two trainings agree to the last digit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


RECIPES = {
    "split": {"steps": 15, "column_periods": 2, "column_warmup": 3},
    "one LoRA alone in some steps": {"steps": 12, "content_alone": 0.4, "style_alone": 0.3, "column_separation": False},
    "strengths other than one": {"steps": 9, "alpha": 1.0, "column_separation": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recorded_steps_give_the_same_results(fresh_base, replays, recipe):
    eager, recorded = (trained(build(fresh_base(), **recipe), recipe["steps"], flag) for flag in (False, True))
    assert_same(eager, recorded)
    assert replays.replayed > replays.recorded


def test_unchanged_pass_is_recorded_once(fresh_base, replays):
    trained(build(fresh_base(), steps=8, column_separation=False), 8, recorded=True)
    assert (replays.recorded, replays.replayed) == (1, 8 - FIRST)


@pytest.mark.slow
def test_change_of_trained_parameters_needs_a_new_recording(fresh_base, replays):
    method = build(fresh_base(), steps=16, column_periods=2, column_warmup=4)
    trained(method, 16, recorded=True)
    # In each period the scales are frozen during the warm-up and train after it.
    assert replays.recorded == 4
    assert len(method.predict.passes) == 1  # the others are not needed again


@pytest.mark.slow
def test_second_loss_of_a_step_has_its_own_gradients(fresh_base, replays):
    def method(base):
        recipe = resolve(
            DreamBoothConfig,
            {"images": ["a.png"], "content": "cat", "out": "run", "base": "tiny", "rank": 2, "steps": 6, "prior": 0.5},
        )
        prior = examples(base, joined=False, seed=1)
        data = TrainingData(examples(base, joined=False), priors={"content": prior})
        return DreamBooth(base.unet, scheduler(base), data, recipe)

    eager, recorded = (trained(method(fresh_base()), 6, flag) for flag in (False, True))
    assert_same(eager, recorded)
    assert (replays.recorded, replays.replayed) == (2, 2 * (6 - FIRST))


def test_passes_without_gradient_are_not_recorded(fresh_base, replays):
    method = build(fresh_base(), column_separation=False)
    recorder = method.predict = Recorder(method.unet, [])
    with torch.no_grad():
        for step in range(FIRST + 3):
            list(method.losses(step))
    assert not recorder.passes
    assert not replays.recorded


def test_training_continues_without_recording_if_it_fails(fresh_base, replays):
    replays.fails = True
    eager = trained(build(fresh_base(), steps=6, column_separation=False), 6, recorded=False)
    with pytest.warns(UserWarning, match=r"not recorded as CUDA graphs \(operation not permitted .*--no-cuda-graphs"):
        recorded = trained(build(fresh_base(), steps=6, column_separation=False), 6, recorded=True)
    assert_same(eager, recorded)


def test_nothing_is_recorded_on_a_cpu(fresh_base, replays):
    method = build(fresh_base())
    with recording(method.unet, [], method.config) as predict:
        assert predict is method.unet
