"""The guard of the studio's server: an application that answers everything stands behind it."""

import asyncio
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unziplora.errors import UserError
from unziplora.studio.safety import UPLOAD_LIMIT, Guard, check_file

HERE = {"host": "127.0.0.1:7860"}


def ask(
    guard: Guard,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    again: Sequence[tuple[str, str]] = (),
) -> tuple[int, dict[str, str], str]:
    """Send a request: status, headers and text of the answer."""
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in [*{**HERE, **(headers or {})}.items(), *again]]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(guard(scope, receive, send))
    start, *rest = messages
    named = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], named, b"".join(part["body"] for part in rest).decode()


def answering(text: str = "inside") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


async def echoing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": (await receive())["body"]})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs" / ".studio" / "cache").mkdir(parents=True)
    return tmp_path / "runs"


@pytest.fixture
def guard(runs: Path) -> Guard:
    return Guard(answering(), runs, runs / ".studio" / "cache", 7860, events=[3])


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860"])
def test_page_is_served_under_names_of_this_machine(guard: Guard, host: str) -> None:
    assert ask(guard, "/", headers={"host": host})[0] == 200


def test_browsers_leave_out_the_number_80(runs: Path) -> None:
    for port, status in ((80, 200), (7860, 403)):
        guard = Guard(answering(), runs, runs / ".studio" / "cache", port, events=[])
        assert ask(guard, "/", headers={"host": "127.0.0.1"})[0] == status


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1:1", "127.0.0.1.evil.example:7860", ""])
def test_other_host_names_are_refused(guard: Guard, host: str) -> None:
    status, _, text = ask(guard, "/", headers={"host": host})
    assert (status, "address" in text) == (403, True)


def test_any_host_name_is_served_behind_a_password(runs: Path) -> None:
    guard = Guard(answering(), runs, runs, 7860, events=[3], any_host=True)
    assert ask(guard, "/", headers={"host": "workstation.local:7860"})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "file://"])
def test_requests_of_other_origins_are_refused(guard: Guard, origin: str) -> None:
    headers = {"origin": origin, "content-length": "2"}
    assert ask(guard, "/gradio_api/queue/join", "POST", headers)[0] == 403


def test_own_page_may_post(guard: Guard) -> None:
    headers = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin", "content-length": "2"}
    assert ask(guard, "/gradio_api/queue/join", "POST", headers)[0] == 200


def test_other_sites_may_link_to_the_page_but_not_embed_its_files(guard: Guard) -> None:
    opened = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask(guard, "/", headers=opened)[0] == 200
    assert ask(guard, "/config", headers=opened)[0] == 403
    assert ask(guard, "/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"})[0] == 403


def test_bodies_need_a_length_below_the_limit(guard: Guard) -> None:
    assert ask(guard, "/gradio_api/upload", "POST")[0] == 411
    assert ask(guard, "/gradio_api/upload", "POST", {"content-length": str(UPLOAD_LIMIT + 1)})[0] == 413
    assert ask(guard, "/x", "POST", {"content-length": "-1"})[0] == 411


@pytest.mark.parametrize(
    "again",
    [("content-type", "multipart/form-data; boundary=x"), ("content-length", "2"), ("host", "127.0.0.1:7860")],
)
def test_headers_that_decide_may_not_be_repeated(guard: Guard, again: tuple[str, str]) -> None:
    own = {"content-length": "2", "content-type": "application/json"}
    assert ask(guard, "/gradio_api/queue/join", "POST", own, b"{}")[0] == 200
    status, _, text = ask(guard, "/gradio_api/queue/join", "POST", own, b"{}", [again])
    assert (status, text) == (400, f"{again[0]} is sent twice")


def test_only_images_and_loras_of_the_runs_folder_are_served(guard: Guard, runs: Path, tmp_path: Path) -> None:
    served = [runs / "cat" / "samples" / "cat.png", runs / "cat" / "cat-style.safetensors", runs / ".studio/cache/a.py"]
    closed = [
        runs / "queue.sqlite",
        runs / "cat" / "config.toml",
        runs / ".trash" / "cat" / "cat.png",
        tmp_path / "secret.png",
        tmp_path / "runs-of-another" / "cat.png",
    ]
    for file in (*served, *closed):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (runs / "link.png").symlink_to(tmp_path / "secret.png")
    refused = [
        *closed,
        runs / "link.png",
        runs / "cat" / ".." / ".." / "secret.png",
        runs / "missing.png",
        "/etc/passwd",
    ]
    assert [ask(guard, f"/gradio_api/file={file}")[0] for file in served] == [200] * 3
    assert [ask(guard, f"/gradio_api/file={file}")[0] for file in refused] == [403] * 9
    assert ask(guard, "/gradio_api/file=cat\0.png")[0] == 403
    assert ask(guard, f"/gradio_api/file/{tmp_path}/secret.png")[0] == 403


@pytest.mark.parametrize(
    "data",
    ['[{"path": "%s"}]', '{"background": {"path": "%s", "meta": {}}, "layers": []}', '[[[{"a": {"path": "%s"}}]]]'],
)
def test_actions_may_name_only_files_that_are_served(runs: Path, tmp_path: Path, data: str) -> None:
    echo = Guard(echoing, runs, runs / ".studio" / "cache", 7860, events=[3])
    (tmp_path / "secret.png").touch()
    (runs / ".studio" / "cache" / "cat.png").touch()

    def post(path: Path) -> tuple[int, str]:
        body = b'{"data": %s}' % (data % path).encode()
        status, _, text = ask(echo, "/gradio_api/queue/join", "POST", {"content-length": str(len(body))}, body)
        return status, text

    assert post(tmp_path / "secret.png") == (403, "this file is not an upload")
    cached = runs / ".studio" / "cache" / "cat.png"
    assert post(cached) == (200, '{"data": %s}' % (data % cached))


def test_proxy_of_the_framework_is_closed(guard: Guard) -> None:
    assert ask(guard, "/gradio_api/proxy=https://evil.example")[0] == 404


def test_every_answer_forbids_other_hosts(guard: Guard) -> None:
    for path in ("/", "/gradio_api/file=/etc/passwd"):
        _, headers, _ = ask(guard, path)
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_refused_upload_is_deleted_and_explained_by_its_name(runs: Path) -> None:
    cache = runs / ".studio" / "cache"
    good, bad = cache / "a.png", cache / "b.safetensors"
    Image.new("RGB", (16, 16)).save(good)
    bad.write_bytes(pickle.dumps({"weights": 1}))
    guard = Guard(answering(json.dumps([str(good), str(bad)])), runs, cache, 7860, events=[3])
    status, _, text = ask(guard, "/gradio_api/upload", "POST", {"content-length": "2"})
    assert status == 400
    assert text.startswith("b.safetensors")
    assert str(runs) not in text
    assert list(cache.iterdir()) == []


def test_sound_upload_passes(runs: Path) -> None:
    cache = runs / ".studio" / "cache"
    save_file({"a": torch.zeros(1)}, cache / "a.safetensors")
    answer = json.dumps([str(cache / "a.safetensors")])
    guard = Guard(answering(answer), runs, cache, 7860, events=[3])
    assert ask(guard, "/gradio_api/upload", "POST", {"content-length": "2"})[::2] == (200, answer)


def test_upload_outside_the_cache_is_refused_and_stays(runs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "mine.png")
    guard = Guard(
        answering(json.dumps([str(tmp_path / "mine.png")])), runs, runs / ".studio" / "cache", 7860, events=[3]
    )
    assert ask(guard, "/gradio_api/upload", "POST", {"content-length": "2"})[0] == 400


def bomb(path: Path) -> None:
    """Write a PNG of 10 kB that claims 900 megapixels."""
    Image.new("1", (30_000, 30_000)).save(path)


def html(path: Path) -> None:
    path.write_text("<script>alert(1)</script>")


def no_image(path: Path) -> None:
    path.write_bytes(pickle.dumps([1]))


@pytest.mark.parametrize("write", [bomb, html, no_image])
def test_files_that_are_no_images_are_refused(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png"):
        check_file(tmp_path / "x.png")
