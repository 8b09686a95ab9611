"""`batch` as a command, with a training that only writes files."""

import json
from pathlib import Path

import pytest
from fake_jobs import FakeTrainer, train

from unziplora.jobs import rows, trainings


@pytest.fixture
def table(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "check", lambda config: None)
    monkeypatch.setattr(trainings, "Trainer", FakeTrainer)
    (tmp_path / "animals.csv").write_text("image,content\ncat.png,cat\nowl.png,owl\nfox.png,fox\n")
    return call


def test_batch_trains_all_rows_and_fails_if_one_failed(table, tmp_path: Path, monkeypatch) -> None:
    code, out, err = table("batch", "animals.csv", "--style", "ink", "--base", "bundled")
    assert code == 1
    assert [line.split(maxsplit=2) for line in out.splitlines()] == [
        ["finished", "runs/animals/cat"],
        ["failed", "runs/animals/owl", "owl.png: no such image"],
        ["finished", "runs/animals/fox"],
    ]
    assert err.endswith("Report: runs/animals/report.md\n")
    assert (tmp_path / "runs" / "animals" / "report.md").is_file()
    monkeypatch.setattr(trainings, "Trainer", lambda: train)
    code, out, _ = table("batch", "animals.csv", "--style", "ink", "--base", "bundled", "--json")
    assert code == 0
    assert [run["result"] for run in json.loads(out)["runs"]] == ["skipped", "finished", "skipped"]


def test_dry_run_lists_the_rows_and_starts_nothing(table, tmp_path: Path) -> None:
    code, out, _ = table("batch", "animals.csv", "--style", "ink", "--out", "there", "--dry-run")
    assert code == 0
    assert out.splitlines() == ["line 2: there/cat", "line 3: there/owl", "line 4: there/fox"]
    assert not (tmp_path / "there").exists()


def test_faults_are_the_users(table, tmp_path: Path) -> None:
    code, _, err = table("batch", "animals.csv")
    assert code == 2
    assert "line 2, line 3, line 4: style is missing" in err
    assert not (tmp_path / "runs").exists()


def test_settings_of_a_file_are_for_all_rows(table, tmp_path: Path) -> None:
    (tmp_path / "all.toml").write_text('style = "oil"\nrank = 4\n')
    code, out, _ = table("batch", "animals.csv", "--config", "all.toml", "--rank", "8", "--dry-run", "--json")
    assert code == 0
    assert {(row["style"], row["rank"]) for row in json.loads(out)["rows"]} == {("oil", 8)}
