"""Batches on a real Ray cluster of two nodes: kills, nodes without the disk or the base, and stops."""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_jobs import recipe, steps_done
from PIL import Image
from safetensors.torch import load_file
from splits import TINY

from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, MachineError
from unziplora.jobs import cluster as clusters
from unziplora.jobs import remote
from unziplora.jobs.batch import run_batch
from unziplora.jobs.parcel import unpack_results
from unziplora.jobs.remote import pick_engine
from unziplora.jobs.rows import Row
from unziplora.jobs.state import state_of
from unziplora.runs.folder import LOCK, RunFolder
from unziplora.utils.progress import Progress

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def kill_node() -> Iterator[Callable[[], str]]:
    """Connect to a cluster of two nodes with one core each; yield a function that kills one and returns its id."""
    clusters.import_ray("the tests")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        second = cluster.add_node(**node)

    def kill() -> str:
        cluster.remove_node(second, allow_graceful=False)
        return str(second.node_id)

    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    yield kill
    ray.shutdown()
    cluster.shutdown()


def silent(event: Progress) -> None:
    return None


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name, file in run.loras.items() for key, value in load_file(file).items()}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_workers_run_ends_with_the_tensors_of_an_uninterrupted_one_with_and_without_a_shared_disk(
    kill_node, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_jobs

    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "cat.png")
    words = {"images": [tmp_path / "cat.png"], "content": "cat", "style": "ink", "base": str(tiny_folder)}
    settings = {**words, **TINY, "phrase_steps": 0, "sample_seeds": [], "checkpoint_every": 3, "device": "cpu"}
    monkeypatch.setattr(remote, "train_run", ray_jobs.killed_once)
    rows = [Row(name, SplitConfig(out=tmp_path / name, **settings)) for name in ("here", "there", "unharmed")]
    events: list[Progress] = []
    results = run_batch(rows, tmp_path, pick_engine("ray"), events.append)
    assert [(result.outcome, result.reason) for result in results] == [("finished", "")] * 3
    expected = tensors(results[2].run)
    for run in (results[0].run, results[1].run):
        assert run.path.with_name(f"{run.path.name}.killed").exists()
        assert "resuming after step 6" in (run.path / "worker.log").read_text()
        actual = tensors(run)
        assert expected.keys() == actual.keys() != set()
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
        assert len(run.read_log()) == TINY["steps"]
        assert run.config(SplitConfig).out == run.path
        assert run.config(SplitConfig).images == [tmp_path / "cat.png"]
        assert run.steps() == [TINY["steps"]]
        assert not (run.path / remote.MARK).exists()
    died = [event.message for event in events if event.job == "there" and "goes on" in (event.message or "")]
    assert died == ["its process died. It goes on from its last checkpoint"]


def test_stopped_batch_saves_on_every_node_and_continues(
    kill_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_jobs

    run = RunFolder(tmp_path / "cat")
    events: list[Progress] = []

    def stop(event: Progress) -> None:
        events.append(event)
        if event.steps and event.step < ray_jobs.STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "cat.jpg").touch()
    monkeypatch.setattr(remote, "train_run", ray_jobs.slow)
    row = Row("line 2", recipe(run.path, images=[tmp_path / "cat.jpg"]))
    with pytest.raises(Interrupted, match="stopped after 0 of 1 runs; the same command continues"):
        run_batch([row], tmp_path, pick_engine("ray"), stop)
    assert state_of(run) == "interrupted"
    assert run.steps()[-1] == steps_done(run) > next(event.step for event in events if event.steps)
    (result,) = run_batch([row], tmp_path, pick_engine("ray"), silent)
    assert result.outcome == "finished"
    assert [line["step"] for line in run.read_log()] == list(range(1, steps_done(run) + 1))


def test_base_that_is_on_no_node_is_named_with_the_nodes(kill_node, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()
    row = Row("line 2", recipe(tmp_path / "cat", images=[tmp_path / "cat.jpg"], base="/models/gone", steps=400))
    events: list[Progress] = []
    (result,) = run_batch([row], tmp_path, pick_engine("ray"), events.append)
    assert result.outcome == state_of(RunFolder(tmp_path / "cat")) == "failed"
    assert result.reason.startswith("/models/gone is missing on the node")
    assert "put the base at this path on every node" in result.reason
    assert [event.job for event in events if "goes to another node" in (event.message or "")] == ["cat"]


def test_address_that_does_not_answer_is_named(kill_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ANSWER", 4.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(MachineError, match=r"Ray cluster 127\.0\.0\.1:1 does not answer: compare the address"):
        run_batch([], tmp_path, pick_engine("ray", "127.0.0.1:1"), silent)


@pytest.mark.slow
def test_run_of_a_killed_node_goes_on_elsewhere_from_its_last_checkpoint(
    kill_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_jobs

    rows = [Row(name, recipe(tmp_path / name, images=[tmp_path / "cat.jpg"])) for name in ("one", "two")]
    runs = [RunFolder(tmp_path / row.place) for row in rows]
    killed: list[str] = []

    def kill() -> None:
        wait_for(lambda: all(run.steps() for run in runs))
        killed.append(kill_node())

    (tmp_path / "cat.jpg").touch()
    monkeypatch.setattr(remote, "train_run", ray_jobs.slow)
    thread = threading.Thread(target=kill)
    thread.start()
    results = run_batch(rows, tmp_path, pick_engine("ray"), silent)
    thread.join()
    assert [(result.outcome, result.reason) for result in results] == [("finished", "")] * 2
    nodes = [line.split() for line in (tmp_path / "attempts").read_text().splitlines()]
    (victim,) = [run for run, node in nodes if [node] == killed]
    assert [node for run, node in nodes if run == victim][1:] == [node for run, node in nodes if run != victim]
    for run in runs:
        assert [line["step"] for line in run.read_log()] == list(range(1, steps_done(run) + 1))
        begun = [line for line in (run.path / "worker.log").read_text().splitlines() if line.startswith("begun")]
        assert (begun[-1] == "begun at step 0") == (run.path.name != victim)


def test_folders_of_killed_processes_are_removed_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, foreign = tmp_path / "unziplora-killed", tmp_path / "unziplora-foreign"
    for folder in (killed, foreign):
        (folder / "run").mkdir(parents=True)
    (killed / LOCK).touch()
    with remote.scratch_folder("first") as first, remote.scratch_folder("second") as second:
        assert first.is_dir()
        assert second.is_dir()
        assert not killed.exists()
        assert foreign.is_dir()  # without a lock, it may be somebody else's
    assert not first.exists()
    assert not second.exists()


def test_every_new_file_of_a_run_of_several_seeds_comes_back_with_its_next_checkpoint(tmp_path: Path) -> None:
    there, here = RunFolder(tmp_path / "there"), RunFolder(tmp_path / "here")
    for run in (there, here):
        run.checkpoints.mkdir(parents=True)
    new_files = remote.NewCheckpoint(there)
    seed = RunFolder(there.path / "seeds" / "3" / "cat")
    seed.checkpoints.mkdir(parents=True)
    seed.log_file.write_text('{"step": 1}\n')
    assert new_files() is None  # no checkpoint yet
    seed.checkpoint_file(1).write_bytes(b"state")
    files = new_files()
    assert files is not None
    unpack_results(files, here)
    assert RunFolder(here.path / "seeds" / "3" / "cat").steps() == [1]
    assert RunFolder(here.path / "seeds" / "3" / "cat").read_log() == [{"step": 1}]
    assert new_files() is None
