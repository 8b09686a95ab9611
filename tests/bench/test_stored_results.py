"""Measured results in the repository, which are valid as long as nothing about their trainings changes."""

import json
from pathlib import Path

from unziplora.bench.cases import load_cases
from unziplora.bench.contenders import METHODS
from unziplora.bench.evaluate import settings_hash
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_stored_results_match_the_settings_of_their_methods(tmp_path: Path) -> None:
    """Those of the base that ships; the others were measured with the base before."""
    cases = load_cases("dev")
    workspace = Workspace(BenchConfig(out=tmp_path), tmp_path)
    methods = sorted((RESULTS / "now" / "runs").iterdir())
    assert methods
    for method in methods:
        for file in method.rglob("scores.json"):
            stored = json.loads(file.read_text(encoding="utf-8"))
            case, seed = cases[stored["case"]], stored["seed"]
            assert stored["settings"] == settings_hash(workspace, METHODS[method.name], cases, case, seed), file
