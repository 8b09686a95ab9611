"""One kind of test repeated with many seeds: counts of what happened, and a command that replays each failure."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from reliability.processes import forked, limit, side_by_side, silent

FAILURES = ("lost", "silently wrong", "fault", "hang")
SIGPROF, SIGALRM = 27, 14


class Failure(Exception):
    """A case that went wrong, of one of the kinds in `FAILURES`."""

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(details)
        self.kind = kind


class Campaign(Protocol):
    """Cases of one kind, each determined by its number and the seed of the campaign.

    Attributes:
        name: name in tables and commands.
        seconds: CPU seconds that one case may take.
    """

    name: str
    seconds: float

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Run one case in an empty folder and return what happened, to be counted.

        Raises:
            Failure: something went wrong.
        """


@dataclass
class Tally:
    """Counts of what happened in a campaign, and its failures as (kind, case, details)."""

    name: str
    cases: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(kind for kind, _, _ in self.failures)
        lines = [f"{self.name}: {self.cases:,} cases in {self.seconds:.0f} s"]
        lines += [f"  {count:>7,}  {what}" for what, count in sorted(self.counts.items(), key=lambda x: -x[1])]
        return "\n".join([*lines, "  " + ", ".join(f"{kinds[kind]} × {kind}" for kind in FAILURES)])


def run_campaign(campaign: Campaign, numbers: range | list[int], seed: int, jobs: int, work: Path) -> Tally:
    """Run the cases of a campaign on several processes."""
    start = time.monotonic()
    folder = work / campaign.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def worker(job: int) -> None:
        with (folder / f"results-{job}.jsonl").open("w", encoding="utf-8") as file:
            for number in numbers[job::jobs]:
                result = run_case(campaign, number, seed, folder / f"case-{number}")
                file.write(json.dumps({"case": number, **result}) + "\n")

    side_by_side(worker, jobs)
    tally = Tally(campaign.name)
    for results in sorted(folder.glob("results-*.jsonl")):
        for line in results.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            tally.cases += 1
            tally.counts.update(result.get("counts", []))
            if "kind" in result:
                tally.failures.append((result["kind"], f"{campaign.name}:{result['case']}", result["details"]))
    tally.seconds = time.monotonic() - start
    return tally


def run_case(campaign: Campaign, number: int, seed: int, folder: Path, keep: bool = False) -> dict[str, object]:
    """Run one case in a process of its own; return its counts, or the kind and the details of its failure."""
    draw = random.Random(f"{campaign.name} {number} {seed}")

    def work() -> str:
        try:
            return json.dumps({"counts": campaign.run(number, draw, folder)})
        except Failure as failure:
            return json.dumps({"kind": failure.kind, "details": str(failure)})

    def guard() -> None:
        silent()
        limit(campaign.seconds)

    folder.mkdir(parents=True)
    ending = forked(work, guard)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    if ending.signal in (SIGPROF, SIGALRM):
        return {"kind": "hang", "details": f"not finished after {campaign.seconds:g} CPU seconds"}
    if ending.signal is not None or ending.error:
        return {"kind": "fault", "details": ending.error or f"ended by signal {ending.signal}"}
    result: dict[str, object] = json.loads(ending.text)
    return result
