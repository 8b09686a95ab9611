"""Several processes do the same work, and never the same training at once."""

from concurrent.futures import Future

import pytest
from fakes import make_case

from unziplora.bench.parallel import _follow, groups
from unziplora.bench.run import bench
from unziplora.config_bench import BenchConfig
from unziplora.errors import Interrupted
from unziplora.progress import Progress


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
