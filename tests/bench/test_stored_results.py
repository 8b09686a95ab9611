"""Measured results in the repository, which are valid as long as nothing about their trainings changes."""

import json
from pathlib import Path

import pytest

from unziplora.bench.cases import load_cases
from unziplora.bench.contenders import METHODS, read_settings
from unziplora.bench.evaluate import settings_hash
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("folder", "split", "settings"),
    [
        ("dev", "dev", "dev"),
        ("gentle", "dev", "gentle"),
        ("oracle-convolutions", "dev", "oracle-convolutions"),
        ("ablation", "dev", "ablation"),
        ("test", "test", "dev"),
        ("test-300", "test", "ablation"),
    ],
)
def test_stored_results_match_the_settings_of_their_methods(
    tmp_path: Path, folder: str, split: str, settings: str
) -> None:
    cases = load_cases(split)
    config = BenchConfig(out=tmp_path, split=split)
    workspace = Workspace(config, tmp_path, read_settings(RESULTS / settings / "settings.toml"))
    methods = sorted((RESULTS / folder / "runs").iterdir())
    assert methods
    for method in methods:
        stored = json.loads(sorted(method.rglob("scores.json"))[-1].read_text(encoding="utf-8"))
        case, seed = cases[stored["case"]], stored["seed"]
        assert stored["settings"] == settings_hash(workspace, METHODS[method.name], cases, case, seed), method.name
