"""Several processes do the same work, and never the same training at once."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import make_case

from unziplora.bench import workers
from unziplora.bench.run import run_benchmark
from unziplora.bench.workers import evaluate_group, evaluate_on_workers, group_units
from unziplora.config.bench import BenchConfig
from unziplora.errors import UserError
from unziplora.jobs.cluster import import_ray
from unziplora.utils.progress import Progress


@pytest.fixture(scope="module")
def two_processes() -> Iterator[None]:
    """Let the benchmarks of a module use one Ray, on which two processes run at a time."""
    pytest.importorskip("ray")
    ray = import_ray("the tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, **options)
    yield
    ray.shutdown()


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


def test_interruption_stops_groups_that_have_begun(
    two_processes, tmp_path: Path, config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_groups

    reports: list[Progress] = []

    def stop(event: Progress) -> None:
        reports.append(event)
        while not (tmp_path / "cat-1").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "evaluate_group", ray_groups.slow)
    workspace = SimpleNamespace(config=config, folder=tmp_path, overrides={}, method_folders={})
    session: Any = SimpleNamespace(cases={"cat": make_case("cat", "cat", 100)}, workspace=workspace, progress=stop)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        evaluate_on_workers(session, [("base", "cat", seed) for seed in range(6)], 2)
    assert time.monotonic() - start < 120  # a case takes 600 seconds
    assert [(event.step, event.steps, event.message) for event in reports] == [(1, 6, "cat, seed 0: done")]
    states = {path.name: path.read_text() for path in tmp_path.glob("cat-*")}
    assert states.pop("cat-0") == "begun"
    assert set(states) <= {"cat-1", "cat-2", "cat-3"}
    assert set(states.values()) == {"stopped"}


def test_workers_refuse_measures_cases_and_methods_as_arguments(config: BenchConfig) -> None:
    with pytest.raises(ValueError, match="pass no measures, cases or methods"):
        run_benchmark(config.model_copy(update={"workers": 2}), methods={})


def test_workers_without_ray_are_refused(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--workers 2 needs Ray: pip install 'unziplora\[ray\]'"):
        run_benchmark(config.model_copy(update={"workers": 2, "measures": ["plain"]}))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["real", "quick"])
def test_two_processes_get_the_results_of_one(
    two_processes,
    config: BenchConfig,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    sampling: str,
) -> None:
    import ray_groups

    if sampling == "quick":
        request.getfixturevalue("quick_images")
    monkeypatch.setattr(workers, "evaluate_group", ray_groups.quick if sampling == "quick" else evaluate_group)
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
