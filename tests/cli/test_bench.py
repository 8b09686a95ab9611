"""`unziplora bench` in this process, on the tiny base."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unziplora.bench import search
from unziplora.config.bench import BenchConfig

Call = Callable[..., tuple[int, str, str]]
QUICK = [
    "--measures",
    "plain",
    "--methods",
    "base",
    "--cases",
    "rocket-linocut",
    "--samples",
    "1",
    "--sample-steps",
    "1",
]
QUICK += ["--device", "cpu", "--precision", "fp32"]


@pytest.mark.slow
def test_prints_the_headline_and_writes_the_report(call: Call, tiny_folder: Path):
    code, out, err = call("bench", "--base", tiny_folder, *QUICK, "--out", "found")
    assert code == 0, err
    assert "| base | – |" in out
    assert "report   found/report.md" in out
    assert "base, rocket-linocut, seed 0" in err
    assert Path("found/sheets/rocket-linocut.png").is_file()


@pytest.mark.slow
def test_json_is_one_document(call: Call, tiny_folder: Path):
    code, out, _ = call("bench", "--base", tiny_folder, *QUICK, "--json", "--quiet")
    assert code == 0
    told = json.loads(out)
    assert [row["method"] for row in told["rows"]] == ["base"]
    assert told["config"]["split"] == "dev"


def test_search_prints_the_best_score_of_each_method_and_its_settings_file(call: Call, monkeypatch: pytest.MonkeyPatch):
    asked: list[BenchConfig] = []

    def found(config: BenchConfig, view: object) -> search.SearchResult:
        asked.append(config)
        scores = {"paper": [0.1, 0.25], "blora": [0.5, 0.0]}
        best = {"paper": {"rank": 8}, "blora": {"rank": 32}}
        return search.SearchResult(tried=[], scores=scores, means=scores, best=best, file=config.out / "settings.toml")

    monkeypatch.setattr(search, "search_settings", found)
    code, out, err = call("bench", "--search", "2", "--out", "tuned", "--methods", "paper", "--methods", "blora")
    assert (code, err) == (0, "")
    assert out == (
        "paper: 0.250 with the best of 2 settings\nblora: 0.500 with the best of 2 settings\n"
        "written to tuned/settings.toml\n"
    )
    assert (asked[0].search, asked[0].methods) == (2, ["paper", "blora"])
    assert json.loads(call("bench", "--search", "2", "--out", "tuned", "--json")[1])["best"]["blora"] == {"rank": 32}


def test_dry_run_shows_settings_and_cases_and_makes_nothing(call: Call, tmp_path: Path):
    code, out, _ = call("bench", "--quick", "--dry-run")
    assert code == 0
    assert "quick = true" in out
    assert "# rocket-linocut: a rocket in linocut style, mixed with house-watercolor" in out
    assert "# Training seeds: 0\n" in out
    assert len(json.loads(call("bench", "--split", "test", "--dry-run", "--json")[1])["cases"]) == 16
    assert not list(tmp_path.iterdir())


def test_every_key_is_a_flag_and_the_help_shows_an_example(call: Call):
    code, out, _ = call("bench", "--help-all")
    assert code == 0
    assert all(name.replace("_", "-") in out for name in BenchConfig.model_fields)
    assert "unziplora bench --split test --settings tuned/settings.toml" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "magic"], "'magic' is not one of"),
        (["--cases", "nothing", "--measures", "plain"], "unknown case 'nothing'; the cases are rocket-linocut"),
        (["--search", "3", "--split", "test"], "settings are searched on the cases of split dev"),
        (["--search", "3", "--settings", "x.toml"], "x.toml: no such configuration file"),
        (["--seeds", "-1"], "seeds are whole numbers from 0 on"),
        (["--settings", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["--search", "2", "--methods", "base", "--methods", "oracle"], "nothing to search settings for: name some of"),
    ],
)
def test_wrong_requests_are_reported_in_one_message(call: Call, tmp_path: Path, args: list[str], message: str):
    code, out, err = call("bench", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("unziplora = 5", "unziplora is 5; make it a table of settings, [unziplora]"),
        ("[dreambooth]\nsteps = 7", "[dreambooth] has two trainings: put its settings into [dreambooth.content]"),
        ("[oracle.contents]\nsteps = 7", "[oracle] has two trainings"),
        ("[base]\nsteps = 7", "[base] is the base without LoRA and has no settings"),
        ("[magic]", "unknown method 'magic'"),
        ("[unziplora]\nseeds = 3", "measures each seed: remove them"),
    ],
)
def test_settings_that_nothing_reads_are_refused_by_a_dry_run_too(call: Call, tmp_path: Path, settings, message):
    (tmp_path / "tuned.toml").write_text(settings)
    for more in ([], ["--dry-run"]):
        code, out, err = call("bench", "--settings", "tuned.toml", *more)
        assert (code, out) == (2, "")
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.toml"]


def test_setting_that_is_not_a_key_is_reported_before_anything_is_measured(
    call: Call, tmp_path: Path, tiny_folder: Path
):
    (tmp_path / "tuned.toml").write_text("[unziplora]\nstep = 5")
    args = ["--methods", "base", "--methods", "unziplora", "--cases", "rocket-linocut", "--measures", "plain"]
    code, _, err = call("bench", "--base", tiny_folder, "--settings", "tuned.toml", *args, "--out", "found")
    assert code == 2
    assert "tuned.toml, [unziplora]: unknown key 'step': did you mean 'steps'?" in err
    assert not Path("found/runs").exists()
