"""Several processes do the same work, and never the same training at once."""

import multiprocessing
import os
import pickle
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import make_case
from slow_session import SlowWorkspace, open_slow_session

from unziplora.bench.parallel import _follow, evaluate_in_parallel, group_units
from unziplora.bench.run import run_benchmark
from unziplora.bench.session import open_session
from unziplora.config.bench import BenchConfig
from unziplora.errors import Interrupted
from unziplora.utils.progress import Progress


def test_partners_stay_together_and_seeds_apart() -> None:
    pairs = (("cat", "dog"), ("dog", "cat"), ("hat", "key"), ("key", "hat"))
    cases = {slug: make_case(slug, partner, 100) for slug, partner in pairs}
    units = [(name, slug, seed) for name in ("dreambooth", "ziplora") for slug in cases for seed in (0, 1)]
    groups = group_units(units, cases)
    assert [({slug for _, slug, _ in group}, {seed for _, _, seed in group}) for group in groups] == [
        ({"cat", "dog"}, {0}),
        ({"cat", "dog"}, {1}),
        ({"hat", "key"}, {0}),
        ({"hat", "key"}, {1}),
    ]
    assert groups[0] == [unit for unit in units if unit[1] in ("cat", "dog") and unit[2] == 0]


def test_finished_groups_are_reported_and_a_failure_is_raised() -> None:
    done, stopped = Future[str](), Future[str]()
    done.set_result("cat, seed 0: done")
    reports: list[Progress] = []
    _follow([done], [3], reports.append)
    assert [(event.step, event.steps, event.message) for event in reports] == [(3, 3, "cat, seed 0: done")]
    stopped.set_exception(Interrupted("stopped"))
    with pytest.raises(Interrupted):
        _follow([stopped], [3], reports.append)


def test_interruption_stops_groups_that_workers_have_already_received(tmp_path: Path, config: BenchConfig) -> None:
    cases = {slug: make_case(slug, "dog" if slug == "cat" else "cat", 100) for slug in ("cat", "dog")}
    stopped: list[float] = []

    def stop(event: Progress) -> None:
        stopped.append(time.monotonic())
        raise KeyboardInterrupt

    session: Any = SimpleNamespace(cases=cases, workspace=SlowWorkspace(tmp_path, config), progress=stop)
    units = [("base", "cat", seed) for seed in range(6)]
    with pytest.raises(KeyboardInterrupt):
        evaluate_in_parallel(partial(open_slow_session, tmp_path), session, units, 2)
    assert time.monotonic() - stopped[0] < 60  # a case takes 600 seconds
    assert {path.name for path in tmp_path.iterdir()} <= {f"cat-{seed}" for seed in range(4)}
    assert multiprocessing.active_children() == []
    terminals = {path.read_text() for path in tmp_path.iterdir()}
    assert str(os.getsid(0)) not in terminals  # so no worker gets the terminal's Ctrl-C


def test_workers_refuse_measures_cases_and_methods_as_arguments(config: BenchConfig) -> None:
    with pytest.raises(ValueError, match="pass no measures, cases or methods"):
        run_benchmark(config.model_copy(update={"workers": 2}), methods={})


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_get_the_results_of_one(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, start: str
) -> None:
    if start == "fork":
        request.getfixturevalue("quick_images")
    context = multiprocessing.get_context(start)  # a forked process has imported everything
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    pickle.dumps(partial(open_session, config))  # as a spawned process receives it
    cases = ["rocket-linocut", "house-watercolor", "sailboat-clay"]
    settings = config.model_copy(update={"measures": ["plain"], "cases": cases})
    alone = run_benchmark(settings.model_copy(update={"out": config.out / "alone"}))
    reports: list[Progress] = []
    together = run_benchmark(settings.model_copy(update={"out": config.out / "many", "workers": 2}), reports.append)
    assert together.rows == alone.rows
    assert {event.message for event in reports if "done" in (event.message or "")} == {
        "rocket-linocut, house-watercolor, seed 0: done",
        "sailboat-clay, seed 0: done",
    }
