"""The whole campaign, or one case of it: `python -m reliability`, `python -m reliability --case kills:17`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from reliability.campaign import Campaign, Tally, run_campaign, run_case
from reliability.disk import Fills
from reliability.flips import Flips
from reliability.fuzz import Fuzz
from reliability.kills import Kills
from reliability.queues import Queues
from reliability.workshop import Workshop

SHOWN = 20
"""Failures whose details are printed; all are written into the report."""


def main() -> int:
    """Run the campaign; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="other cases of the same sorts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--case", help="one case by its name, such as kills:17, with everything that it prints")
    parser.add_argument("--report", type=Path, help="file for the counts and all failures")
    for name, count in {"kills": 500, "fuzz": 12_000, "flips": 240, "fills": 40, "queues": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"number of cases ({count:,})")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    work = Path(tempfile.mkdtemp(prefix="reliability-"))
    try:
        shop = Workshop.open(work)
        if options.case:
            name, _, number = options.case.partition(":")
            result = run_case(make(shop)[name](), int(number), options.seed, work / "case")
            print("\n".join(f"{key}: {value}" for key, value in result.items()))
            return int("kind" in result)
        tallies = []
        for name, factory in make(shop).items():
            if count := getattr(options, name):
                tallies.append(run_campaign(factory(), range(count), options.seed, options.jobs, work))
                print(tallies[-1], flush=True)
        report(tallies, options.seed, options.report)
        return int(any(tally.failures for tally in tallies))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make(shop: Workshop) -> dict[str, Callable[[], Campaign]]:
    """Return what opens each campaign; flips and fills need what the kills are compared with."""
    opened: list[Kills] = []

    def kills() -> Kills:
        if not opened:
            opened.append(Kills(shop))
        return opened[0]

    return {
        "kills": kills,
        "flips": lambda: Flips(shop, kills()),
        "fills": lambda: Fills(shop, kills()),
        "fuzz": lambda: Fuzz(shop),
        "queues": Queues,
    }


def report(tallies: list[Tally], seed: int, file: Path | None) -> None:
    """Print the first failures with the command that replays each; write counts and all failures into a file."""
    failures = [
        f"{kind}: python -m reliability --seed {seed} --case {case}\n{details}"
        for tally in tallies
        for kind, case, details in tally.failures
    ]
    print("\n\n".join(failures[:SHOWN]), file=sys.stderr)
    if file is not None:
        file.write_text("\n\n".join([*map(str, tallies), *failures]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
