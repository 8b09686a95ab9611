"""The campaign's own machinery: outcomes are told apart, and a seed gives the same case again."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from reliability import mutations
from reliability.campaign import Failure, run_campaign, run_case
from reliability.disk import small_disk
from reliability.kills import die_after, watch_operations
from reliability.processes import forked


class Cases:
    """Cases that do what their number stands for."""

    name, seconds = "cases", 0.3

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        if number == 1:
            raise Failure("lost", "a run")
        if number == 2:
            raise ValueError("broken")
        if number == 3:
            while True:
                pass
        if number == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        return [f"drew {draw.randrange(10**9)}", "fine"]


def test_outcomes_are_told_apart(tmp_path: Path) -> None:
    tally = run_campaign(Cases(), range(7), 0, 2, tmp_path)
    assert tally.cases == 7
    assert tally.counts["fine"] == 3
    assert sorted((kind, case) for kind, case, _ in tally.failures) == [
        ("fault", "cases:2"),
        ("fault", "cases:4"),
        ("hang", "cases:3"),
        ("lost", "cases:1"),
    ]
    assert "ValueError: broken" in next(details for _, case, details in tally.failures if case == "cases:2")
    assert "1 × lost, 0 × silently wrong, 2 × fault, 1 × hang" in str(tally)


def test_seed_and_number_determine_a_case(tmp_path: Path) -> None:
    draws = [run_case(Cases(), number, seed, tmp_path / name)["counts"] for name, number, seed in
             (("a", 0, 0), ("b", 0, 0), ("c", 0, 1), ("d", 5, 0))]  # fmt: skip
    assert draws[0] == draws[1]
    assert len({str(draw) for draw in draws}) == 3


def test_death_at_a_moment_ends_the_process_without_a_trace() -> None:
    def work() -> str:
        die_after(0.05)
        try:
            while True:
                pass
        finally:
            time.sleep(60)

    assert forked(work).signal == signal.SIGPROF


def test_file_operations_in_a_folder_are_counted(tmp_path: Path) -> None:
    def work() -> str:
        count = watch_operations(tmp_path / "here", lambda number: None)
        (tmp_path / "here").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "here" / "a").write_text("a")
        (tmp_path / "here" / "a").rename(tmp_path / "here" / "b")
        return str(count())

    assert forked(work).text == "3"


def test_small_disk_is_full_until_it_is_enlarged(tmp_path: Path) -> None:
    def work() -> str:
        enlarge, _ = small_disk(tmp_path, 48 << 10)
        try:
            (tmp_path / "file").write_bytes(bytes(64 << 10))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EFBIG)
        enlarge()
        (tmp_path / "file").write_bytes(bytes(64 << 10))
        return str(full)

    assert forked(work).text == "True"


@pytest.mark.parametrize("suffix", ["json", "toml", "safetensors"])
def test_damage_changes_a_file_and_depends_on_the_seed_alone(tmp_path: Path, suffix: str) -> None:
    header = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    sound = {
        "json": b'{"r": 2, "alpha_pattern": {"to_q": 8}}',
        "toml": b"rank = 4\nformats = ['kohya']\n",
        "safetensors": len(header).to_bytes(8, "little") + header + b"1234",
    }[suffix]
    file = tmp_path / f"file.{suffix}"
    results = []
    for seed in [*range(30), *range(30)]:
        file.write_bytes(sound)
        getattr(mutations, f"damage_{suffix}")(random.Random(seed), file)
        results.append(file.read_bytes())
    assert results[:30] == results[30:]
    assert len(set(results)) > 20
