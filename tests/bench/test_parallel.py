"""Several processes do the same work, and never the same training at once."""

import multiprocessing
import os
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import make_case

from unziplora.bench import parallel
from unziplora.bench.bench import bench
from unziplora.bench.parallel import _follow, fill, groups
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig
from unziplora.errors import Interrupted
from unziplora.utils.progress import Progress


def test_partners_stay_together_and_seeds_apart() -> None:
    pairs = (("cat", "dog"), ("dog", "cat"), ("hat", "key"), ("key", "hat"))
    cases = {slug: make_case(slug, partner, 100) for slug, partner in pairs}
    units = [(name, slug, seed) for name in ("dreambooth", "ziplora") for slug in cases for seed in (0, 1)]
    found = groups(units, cases)
    assert [({slug for _, slug, _ in part}, {seed for _, _, seed in part}) for part in found] == [
        ({"cat", "dog"}, {0}),
        ({"cat", "dog"}, {1}),
        ({"hat", "key"}, {0}),
        ({"hat", "key"}, {1}),
    ]
    assert found[0] == [unit for unit in units if unit[1] in ("cat", "dog") and unit[2] == 0]


def test_what_is_done_is_told_and_a_stop_is_passed_on() -> None:
    done, stopped = Future[str](), Future[str]()
    done.set_result("cat, seed 0: done")
    told: list[Progress] = []
    _follow([done], [3], told.append)
    assert [(event.step, event.steps, event.message) for event in told] == [(3, 3, "cat, seed 0: done")]
    stopped.set_exception(Interrupted("stopped"))
    with pytest.raises(Interrupted):
        _follow([stopped], [3], told.append)


def slow_bench(folder: Path, config: BenchConfig) -> Any:
    """In a worker: a benchmark in which the first case takes no time, and every other one very long."""

    def evaluate(place: object, base: object, measures: object, method: object, cases: object, case: str, seed: int):
        (folder / f"{case}-{seed}").write_text(str(os.getsid(0)))
        time.sleep(0 if seed == 0 else 600)

    parallel.evaluate = evaluate  # type: ignore[assignment]
    same = {"cat": "cat", "dog": "dog"}
    return SimpleNamespace(place=Workspace(config, folder), base=None, measures=[], methods={"base": None}, cases=same)


def test_a_stop_reaches_what_the_workers_have_been_given_already(tmp_path: Path, config: BenchConfig) -> None:
    cases = {slug: make_case(slug, "dog" if slug == "cat" else "cat", 100) for slug in ("cat", "dog")}
    ended: list[float] = []

    def stop(event: Progress) -> None:
        ended.append(time.monotonic())
        raise KeyboardInterrupt

    bench: Any = SimpleNamespace(cases=cases, place=Workspace(config, tmp_path), progress=stop)
    units = [("base", "cat", seed) for seed in range(6)]
    with pytest.raises(KeyboardInterrupt):
        fill(partial(slow_bench, tmp_path, config), bench, units, 2)
    assert time.monotonic() - ended[0] < 60  # a case takes 600 seconds
    assert {path.name for path in tmp_path.iterdir()} <= {f"cat-{seed}" for seed in range(4)}
    assert multiprocessing.active_children() == []
    sessions = {path.read_text() for path in tmp_path.iterdir()}
    assert str(os.getsid(0)) not in sessions  # so no worker gets the terminal's Ctrl-C


def test_workers_open_the_configured_benchmark_and_no_other(config: BenchConfig) -> None:
    with pytest.raises(ValueError, match="give no measures, cases or methods"):
        bench(config.model_copy(update={"workers": 2}), methods={})


def test_two_processes_find_what_one_finds(config: BenchConfig) -> None:
    settings = config.model_copy(update={"measures": ["plain"], "sample_steps": 1})
    cases = ["rocket-linocut", "house-watercolor", "sailboat-clay", "mushroom-pencil"]
    alone = bench(settings.model_copy(update={"out": config.out / "alone", "cases": cases}))
    told: list[Progress] = []
    many = settings.model_copy(update={"out": config.out / "many", "cases": cases, "workers": 2})
    together = bench(many, told.append)
    assert together.rows == alone.rows
    assert {event.message for event in told if "done" in (event.message or "")} == {
        "rocket-linocut, house-watercolor, seed 0: done",
        "sailboat-clay, mushroom-pencil, seed 0: done",
    }
