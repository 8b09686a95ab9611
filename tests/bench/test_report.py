import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Colors, Fake, make_cases

from unziplora.bench.cases import Case
from unziplora.bench.contenders import METHODS
from unziplora.bench.report import Report, contact_sheet, format_report, markdown_table, summarize
from unziplora.bench.run import run_benchmark
from unziplora.config.bench import BenchConfig
from unziplora.errors import UserError
from unziplora.models.base import Base

pytestmark = pytest.mark.usefixtures("quick_images")
Cases = dict[str, Case]
Finished = tuple[Report, Fake, Path]


def result(method: str, case: str, seed: int, content: float, style: float) -> dict[str, Any]:
    """What `evaluate` returns for pictures of these scores; the two of a task differ, their mean counts."""

    def row(task: str, score: float) -> dict[str, Any]:
        values = {"content": 0.5, "style": 0.5, "score": score} | (
            {"leak": 0.1} if task in ("content", "style") else {}
        )
        return {"task": task, "target": "x", "seed": 0, "file": "f", "values": {"m": values}}

    images = [row("content", content - 0.1), row("content", content + 0.1), row("style", style), row("both", 0.7)]
    seconds = {"training": 30.0, "sampling": 1.0}
    return {"method": method, "case": case, "seed": seed, "seconds": seconds, "pictures": images}


RESULTS = [
    *(result("base", case, 0, 0.2, 0.1) for case in ("cat", "dog")),
    *(result("oracle", case, 0, 0.6, 0.5) for case in ("cat", "dog")),
    result("fake", "cat", 0, 0.2, 0.2),
    result("fake", "dog", 0, 0.4, 0.6),
    result("fake", "cat", 1, 0.6, 0.5),
    result("fake", "dog", 1, 0.6, 0.5),
]


@pytest.fixture
def report(config: BenchConfig) -> Report:
    return summarize(config, RESULTS, ["m"])


class TestSummarize:
    def test_means_over_cases_come_before_the_scale(self, report: Report):
        base, oracle, fake = report.of("m")
        assert base.seeds[0]["headline"] == 0.0
        assert (oracle.seeds[0]["content.scaled"], oracle.seeds[0]["style.scaled"]) == pytest.approx((1.0, 1.0))
        assert oracle.seeds[0]["headline"] == pytest.approx(1.0)
        # means 0.3 and 0.4 on scales of 0.2…0.6 and 0.1…0.5
        assert fake.seeds[0]["content.scaled"] == pytest.approx(0.25)
        assert fake.seeds[0]["style.scaled"] == pytest.approx(0.75)
        assert fake.seeds[0]["headline"] == pytest.approx(0.375)
        assert fake.seeds[1]["headline"] == pytest.approx(1.0)
        assert fake.formatted("headline") == "0.688 ± 0.442"
        assert base.formatted("headline") == "0.000"

    def test_per_case_figures_are_means_over_seeds(self, report: Report):
        fake = report.of("m")[2]
        assert fake.cases["cat"]["content.score"] == pytest.approx(0.4)
        assert fake.cases["dog"]["style.score"] == pytest.approx(0.55)

    def test_the_oracle_is_the_mean_over_its_seeds(self, config: BenchConfig):
        more = [*RESULTS, *(result("oracle", case, 1, 1.0, 0.9) for case in ("cat", "dog"))]
        oracle = summarize(config, more, ["m"]).of("m")[1]
        assert [oracle.seeds[seed]["content.scaled"] for seed in (0, 1)] == pytest.approx([2 / 3, 4 / 3])

    @pytest.mark.parametrize("missing", ["base", "oracle"])
    def test_without_both_ends_there_is_no_scale(self, config: BenchConfig, missing: str):
        rows = summarize(config, [r for r in RESULTS if r["method"] != missing], ["m"]).of("m")
        assert rows[-1].formatted("headline") == "–"
        assert rows[-1].formatted("content.score") == "0.450 ± 0.212"


def test_markdown_has_headline_ablation_measures_and_cases(report: Report, config: BenchConfig):
    text = format_report(report)
    assert "| fake | 0.688 ± 0.442 | 0.625 ± 0.530 | 0.875 ± 0.177 | 0.700 ± 0.000 | – | 0.100 ± 0.000 |" in text
    assert "| dog | 0.20 / 0.10 | 0.60 / 0.50 | 0.50 / 0.55 |" in text
    assert "Ablation" not in text
    steps = [result(name, "cat", 0, 0.3, 0.3) for name in ("block", "joint")]
    text = format_report(summarize(config, [*RESULTS, *steps], ["m"]))
    part = text[text.index("## Ablation") : text.index("## Measured")]
    assert part.index("| joint |") < part.index("| block |")


@pytest.fixture(scope="module")
def finished(
    shared_base: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, quick_images: None
) -> Finished:
    """Run two methods with two seeds; return report, method and folder. Read only."""
    out = tmp_path_factory.mktemp("bench") / "out"
    settings = {"samples": 1, "sample_steps": 1, "guidance": 1.0, "device": "cpu", "precision": "fp32"}
    config = BenchConfig(out=out, base=str(tiny_folder), methods=["base", "unziplora"], seeds=[0, 1], **settings)
    fake = Fake(shared_base.unet, name="unziplora")
    methods = {"base": METHODS["base"], "unziplora": fake}
    measures = [Colors(), Colors("second")]
    return run_benchmark(config, base=shared_base, measures=measures, cases=make_cases(), methods=methods), fake, out


class TestBench:
    def test_every_method_case_and_seed_is_measured(self, finished: Finished):
        report, fake, _ = finished
        rows = {(row.method, row.measure): sorted(row.seeds) for row in report.rows}
        assert rows == {
            ("base", "colors"): [0],  # no seed changes it
            ("unziplora", "colors"): [0, 1],
            ("base", "second"): [0],
            ("unziplora", "second"): [0, 1],
        }
        assert {case for case, _ in fake.trained} == {"cat", "dog"}

    def test_the_oracle_may_train_with_fewer_seeds(
        self, config: BenchConfig, tiny_base: Base, fake: Fake, cases: Cases
    ):
        other = replace(fake, name="unziplora", trained=[])
        fake.name = "oracle"
        settings = {"methods": ["base", "unziplora", "oracle"], "seeds": [4, 2], "oracle_seeds": 1}
        methods = {"base": METHODS["base"], "unziplora": other, "oracle": fake}
        config = config.model_copy(update=settings)
        report = run_benchmark(config, base=tiny_base, measures=[Colors()], cases=cases, methods=methods)
        assert {row.method: sorted(row.seeds) for row in report.rows} == {
            "base": [4],
            "unziplora": [2, 4],
            "oracle": [4],
        }
        assert {seed for _, seed in fake.trained} == {4}

    def test_folder_contains_report_and_contact_sheets(self, finished: Finished):
        report, _, out = finished
        names = {path.name for path in out.iterdir()}
        assert names == {"bench.toml", "weights.txt", "runs", "sheets", "report.json", "report.md"}
        assert json.loads((out / "report.json").read_text())["measures"] == ["colors", "second"]
        assert "![dog](sheets/dog.png)" in (out / "report.md").read_text()
        assert "| unziplora |" in str(report)

    def test_contact_sheet_has_a_row_per_method_and_a_column_per_prompt(self, finished: Finished, cases: Cases):
        out = finished[2]
        files = [out / "runs" / name / "cat" / "seed-0" / "scores.json" for name in ("base", "unziplora")]
        results = [json.loads(file.read_text()) for file in files]
        one, two = (contact_sheet(cases["cat"], results[:count], out) for count in (1, 2))
        cell = 128 + 4
        assert two.height - one.height == cell
        assert two.width >= 6 * cell  # input, two targets, one other concept, both, mixed
        assert two.width < 6 * cell + 3 * 128
        right = [sheet.crop((sheet.width - 6 * cell, 0, sheet.width, one.height - 4)) for sheet in (one, two)]
        assert right[0].tobytes() == right[1].tobytes()

    def test_scores_count_without_their_images(self, config: BenchConfig, tiny_base: Base, cases: Cases):
        config = config.model_copy(update={"methods": ["base"]})

        def run() -> Report:
            return run_benchmark(config, base=tiny_base, measures=[Colors()], cases=cases)

        first = run()
        for image in config.out.rglob("samples/*.png"):
            image.unlink()
        assert run().rows == first.rows
        assert not list(config.out.rglob("samples/*.png"))
        results = [json.loads((config.out / "runs/base/cat/seed-0/scores.json").read_text())]
        bare = contact_sheet(cases["cat"], [], config.out)
        assert contact_sheet(cases["cat"], results, config.out).size == bare.size

    def test_other_weights_under_the_same_name_are_refused(
        self,
        finished: Finished,
        config: BenchConfig,
        fresh_base: Callable[[], Base],
        cases: Cases,
    ):
        shutil.copytree(finished[2], config.out)
        other = fresh_base()
        assert run_benchmark(config, base=other, measures=[Colors()], cases=cases).rows
        with torch.no_grad():
            other.unet.conv_in.weight += 1
        with pytest.raises(UserError, match=f"these are {other.fingerprint()}.*: choose another --out"):
            run_benchmark(config, base=other, measures=[Colors()], cases=cases)

    def test_progress_counts_every_unit(self, config: BenchConfig, tiny_base: Base, cases: Cases):
        reports: list[tuple[int, int]] = []
        run_benchmark(
            config,
            lambda event: reports.append((event.step, event.steps)),
            base=tiny_base,
            measures=[Colors()],
            cases=cases,
        )
        assert reports == [(0, 2), (1, 2), (2, 2)]

    def test_unknown_method_and_file_as_folder_are_refused(self, config: BenchConfig, tmp_path: Path):
        (tmp_path / "settings.toml").write_text("[unzip]\nsteps = 2\n")
        with pytest.raises(UserError, match="unknown method 'unzip'; the methods are base, unziplora"):
            run_benchmark(config.model_copy(update={"settings": tmp_path / "settings.toml"}))
        with pytest.raises(UserError, match="is a file; name a folder"):
            run_benchmark(config.model_copy(update={"out": tmp_path / "settings.toml"}))


def test_missing_figures_are_dashes(report: Report):
    assert markdown_table(report.of("m")[:1], {"mix.score": "mixed"}).splitlines()[-1] == "| base | – |"
