"""The gallery of runs, and the order of the queue."""

from pathlib import Path

import pytest
from fake_jobs import begin, recipe
from PIL import Image

pytest.importorskip("gradio")

from unziplora.jobs.queue import Queue
from unziplora.jobs.state import RunSummary
from unziplora.studio import runs as tab


def test_caption_begins_with_the_name_and_has_state_and_words(tmp_path: Path) -> None:
    parts = tab.caption(tmp_path, RunSummary(begin(tmp_path / "demo" / "cat")), None).split(" · ")
    assert parts == ["demo/cat", "interrupted", "cat", "ink", "just now"]


def test_thumbnail_shows_the_picture_of_the_run(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), "red").save(tmp_path / "cat.png")
    Queue(tmp_path).submit(recipe(tmp_path / "cat", images=[tmp_path / "cat.png"]))
    summary = RunSummary(Queue(tmp_path).job("cat").run)
    file = tab.thumbnail(tmp_path / "cache", summary)
    with Image.open(file) as image:
        assert (image.size, image.getpixel((9, 9))) == ((256, 171), (255, 0, 0))
    assert tab.thumbnail(tmp_path / "cache", summary) == file


def test_thumbnail_of_deep_gray_is_as_it_is_learned(tmp_path: Path) -> None:
    Image.new("I;16", (300, 300), 30000).save(tmp_path / "cat.png")
    Queue(tmp_path).submit(recipe(tmp_path / "cat", images=[tmp_path / "cat.png"]))
    with Image.open(tab.thumbnail(tmp_path / "cache", RunSummary(Queue(tmp_path).job("cat").run))) as image:
        assert image.getpixel((9, 9)) == (117, 117, 117)  # 30000 / 65535 · 255


@pytest.mark.parametrize("data", [b"", b"no image", None])
def test_missing_and_damaged_pictures_leave_an_empty_tile(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "cat.png").write_bytes(data)
    Queue(tmp_path).submit(recipe(tmp_path / "cat", images=[tmp_path / "cat.png"]))
    with Image.open(tab.thumbnail(tmp_path / "cache", RunSummary(Queue(tmp_path).job("cat").run))) as image:
        assert image.getcolors(1) is not None


def test_comparison_lists_the_settings_that_differ(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    first, second = (queue.submit(recipe(tmp_path / name, rank=rank)) for name, rank in (("a", 4), ("b", 8)))
    html = tab.differences(RunSummary(first.run), RunSummary(second.run))
    assert "<td>rank</td><td>4</td><td>8</td>" in html
    assert html.count("<tr>") == 2
    assert "same settings" in tab.differences(RunSummary(first.run), RunSummary(first.run))


def test_jobs_move_by_one_place(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    one, two, three = (queue.submit(recipe(tmp_path / name)).number for name in "abc")

    def order() -> list[int]:
        return [job.number for job in queue.jobs()]

    tab._earlier(queue, three)
    assert order() == [one, three, two]
    tab._later(queue, one)
    assert order() == [three, one, two]
    tab._earlier(queue, three)
    tab._later(queue, two)
    assert order() == [three, one, two]
