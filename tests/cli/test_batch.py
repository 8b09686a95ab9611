"""`batch` as a command, with a training that only writes files."""

import json
import sys
from pathlib import Path

import pytest
from fake_jobs import FakeTrainer, train

from unziplora.jobs import remote, rows


@pytest.fixture
def table(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "check", lambda config: config)
    monkeypatch.setattr(remote, "Trainer", FakeTrainer)
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
    monkeypatch.setattr(remote, "Trainer", lambda: train)
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


def test_missing_ray_and_an_address_without_it_are_named(table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = table("batch", "animals.csv", "--engine", "ray")
    assert (code, err) == (2, "error: --engine ray needs Ray: pip install 'unziplora[ray]'\n")
    code, _, err = table("batch", "animals.csv", "--address", "auto")
    assert (code, err) == (2, "error: an address is that of a Ray cluster: choose the engine ray too\n")
