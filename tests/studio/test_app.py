"""The application as Gradio serves it, asked without a browser."""

import json
import pickle
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from fake_jobs import recipe
from PIL import Image
from safetensors.torch import save

gradio = pytest.importorskip("gradio")

from starlette.testclient import TestClient  # noqa: E402 (comes with Gradio)

from unziplora.jobs.queue import Queue  # noqa: E402
from unziplora.studio import app  # noqa: E402
from unziplora.studio.workers import Workers  # noqa: E402

UPLOAD = "/gradio_api/upload"
SCRIPT = "<script>alert(1)</script>"


def client_of(runs: Path, password: str | None = None) -> TestClient:
    app.prepare(runs)
    served = app.application(runs, Workers(runs, allowed=False), 7860, password)
    return TestClient(served, base_url="http://127.0.0.1:7860")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio") / "runs"


@pytest.fixture(scope="module")
def client(runs: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        with client_of(runs) as client:
            yield client


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def stored(runs: Path) -> list[str]:
    return [path.name for path in (runs / ".studio" / "cache").rglob("*") if path.is_file()]


def test_page_loads_nothing_from_another_host(client: TestClient) -> None:
    page = client.get("/").text
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:)?//[^\"]+", page)
    assert loaded == []
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not re.search(r"@import|url\(['\"]?(https?:)?//", client.get("/theme.css").text)


def test_every_field_has_a_label(client: TestClient) -> None:
    fields = ("textbox", "dropdown", "number", "slider", "radio", "checkbox", "file", "gallery", "imageeditor")
    components = client.get("/config").json()["components"]
    assert [
        part["props"].get("elem_id") for part in components if part["type"] in fields and not part["props"]["label"]
    ] == []


def test_picture_and_lora_are_taken(client: TestClient) -> None:
    lora = save({"a": torch.zeros(1)})
    answer = client.post(UPLOAD, files=[("files", ("cat.png", png())), ("files", ("ink.safetensors", lora))])
    assert answer.status_code == 200
    assert [Path(path).name for path in answer.json()] == ["cat.png", "ink.safetensors"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ink.safetensors", pickle.dumps({"a": 1})),
        ("ink.ckpt", pickle.dumps({"a": 1})),
        ("cat.png", b"<html>" + SCRIPT.encode()),
        ("cat.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("cat.png", png()[:40]),
        ("empty.png", b""),
    ],
)
def test_other_files_are_refused_and_deleted(client: TestClient, runs: Path, name: str, data: bytes) -> None:
    before = stored(runs)
    answer = client.post(UPLOAD, files={"files": (name, data)})
    assert answer.status_code == 400
    assert str(runs) not in answer.text
    assert stored(runs) == before


@pytest.mark.parametrize(
    "name", ["../../../evil.png", "/tmp/evil.png", "..\\..\\evil.png", "a\0b.png", "x" * 300 + ".png"]
)
def test_names_that_lead_elsewhere_stay_in_the_cache(client: TestClient, runs: Path, name: str) -> None:
    answer = client.post(UPLOAD, files={"files": (name, png())})
    paths = [Path(path).resolve() for path in answer.json()] if answer.status_code == 200 else []
    assert all(path.is_relative_to((runs / ".studio" / "cache").resolve()) for path in paths)
    assert not list(runs.parent.rglob("evil.png")) or all(
        "cache" in path.parts for path in runs.parent.rglob("evil.png")
    )


def test_two_gigabytes_are_refused_before_they_are_sent(client: TestClient) -> None:
    answer = client.post(UPLOAD, content=b"x", headers={"content-length": str(2 << 30)})
    assert answer.status_code == 413
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ"]
)
def test_files_of_the_system_are_not_served(client: TestClient, path: str) -> None:
    assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_uploaded_picture_reaches_the_page_and_a_file_of_the_system_does_not(
    client: TestClient, tmp_path: Path
) -> None:
    config = client.get("/config").json()
    drop = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "drop")
    number = next(one["id"] for one in config["dependencies"] if one["inputs"] == [drop] and not one["js"])
    (uploaded,) = client.post(UPLOAD, files={"files": ("cat.png", png())}).json()
    (tmp_path / "cat.png").write_bytes(png())

    def join(path: str) -> int:
        event = {"data": [{"path": path}], "fn_index": number, "session_hash": "drop"}
        return client.post("/gradio_api/queue/join", json=event).status_code

    assert join(uploaded) == 200
    assert '"success":true' in client.get("/gradio_api/queue/data?session_hash=drop").text
    assert join(str(tmp_path / "cat.png")) == 403
    assert join("https://another.example/cat.png") == 403


def test_queue_file_and_settings_are_not_served(client: TestClient, runs: Path) -> None:
    Queue(runs).submit(recipe(runs / "cat"))
    for file in (runs / "queue.sqlite", runs / "cat" / "config.toml"):
        assert client.get(f"/gradio_api/file={file}").status_code == 403


def test_script_in_words_is_escaped_in_every_view(client: TestClient, runs: Path) -> None:
    Queue(runs).submit(recipe(runs / "script", content=SCRIPT), first=True)
    blocks = app.page(runs, runs / ".studio" / "cache", Workers(runs, allowed=False))
    follow = next(one for one in blocks.fns.values() if getattr(one.fn, "__qualname__", "") == "Follower.refresh")
    views = follow.fn(*[None] * len(follow.inputs))
    html = [view for view in views if isinstance(view, str) and "<" in view]
    assert not any(SCRIPT in view for view in html)
    assert any("&lt;script&gt;" in view for view in html)


def test_posts_of_other_pages_are_refused(client: TestClient) -> None:
    body = {"data": [], "fn_index": 0, "session_hash": "a"}
    answer = client.post("/gradio_api/queue/join", json=body, headers={"origin": "https://evil.example"})
    assert answer.status_code == 403


def test_page_of_before_a_restart_causes_no_traceback(client: TestClient) -> None:
    answer = client.get("/gradio_api/queue/data?session_hash=unknown")  # the client raises what the server does
    assert '"session_not_found":true' in answer.text.replace(" ", "")


def test_page_of_before_an_upgrade_is_asked_to_load_again(client: TestClient) -> None:
    event = {"data": [], "fn_index": 10**6, "session_hash": "old"}
    answer = client.post("/gradio_api/queue/join", json=event)
    assert (answer.status_code, "load it again" in answer.json()["detail"]) == (409, True)


def test_password_opens_the_page_and_nothing_else_does(tmp_path: Path) -> None:
    with client_of(tmp_path / "runs", "open sesame") as client:
        assert client.get("/config").status_code == 401
        assert client.post(UPLOAD, files={"files": ("a.png", png())}).status_code == 401
        wrong = client.post("/login", data={"username": "studio", "password": "guess"})
        assert wrong.status_code == 400
        right = client.post("/login", data={"username": "studio", "password": "open sesame"})
        assert json.loads(right.text) == {"success": True}
        assert client.get("/config").status_code == 200


def test_stamp_changes_with_what_the_views_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.poll.time, "time", lambda: 0.0)
    workers = Workers(tmp_path, allowed=False)
    stamps = [app.stamp(tmp_path, workers)]
    job = Queue(tmp_path).submit(recipe(tmp_path / "cat"))
    stamps.append(app.stamp(tmp_path, workers))
    Queue(tmp_path).pause(job.number)
    stamps.append(app.stamp(tmp_path, workers))
    job.run.log(step=1, loss=0.5)
    stamps.append(app.stamp(tmp_path, workers))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "picture.png")
    stamps.append(app.stamp(tmp_path, workers))
    assert len(set(stamps)) == len(stamps)
    assert app.stamp(tmp_path, workers) == stamps[-1]
