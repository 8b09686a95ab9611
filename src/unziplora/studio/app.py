"""The page of the studio, and the server behind it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from hmac import compare_digest
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from unziplora.errors import UserError
from unziplora.jobs.state import RunSummary
from unziplora.studio import files, libraries, look, play, poll, split, train
from unziplora.studio import runs as all_runs
from unziplora.studio.events import Follower, quietly
from unziplora.studio.safety import UPLOAD_LIMIT, Guard, is_local
from unziplora.studio.workers import Workers
from unziplora.utils.files import explained

USER = "studio"
"""User name on the page that asks for the password."""

LATENCY = 0.05
"""Seconds between two looks of Gradio's event loop at its events; its own millisecond costs 4 % of a processor."""

TITLE = """<div class="title"><h1>unziplora studio</h1>
<p>One picture in: its content and its style come out, as two small files that you can mix.</p></div>"""


def page(runs: Path, cache: Path, workers: Workers) -> gr.Blocks:
    """Make the page. It keeps nothing: all that it shows comes from the run folders and the queue."""
    with gr.Blocks(
        title="unziplora studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as blocks:
        title = gr.HTML(TITLE)
        follower = Follower()
        mark = gr.HTML(visible="hidden", elem_id=poll.MARK)
        follower.add(lambda: (stamp(runs, workers),), [], [mark])  # first: what changes meanwhile is noticed again
        with gr.Tabs() as tabs:
            with gr.Tab("Split", id="split"):
                first = split.tab(runs, cache, workers)
            with gr.Tab("Runs", id="runs"):
                chosen = all_runs.tab(runs, cache, workers, follower, _reusing(first, tabs))
            with gr.Tab("Play", id="play"):
                play.tab(runs, follower)
            with gr.Tab("Merge and train", id="train"):
                train.tab(runs, workers, follower, tabs, chosen)
            with gr.Tab("Files", id="files"):
                files.tab(runs, follower)
        blocks.load(_warm_up, None, None, show_progress="hidden")
        for view in (first.now, chosen):
            follower.add(view.refresh, [view.choice, view.seen], view.outputs)
        follow = gr.Button("Refresh", visible="hidden", elem_id=poll.BUTTON)
        follow.click(follower.refresh, follower.inputs, follower.outputs, trigger_mode="multiple", **quietly(title))
    return blocks


def stamp(runs: Path, workers: Workers) -> str:
    """Return a text that changes whenever a view of the page does."""
    return poll.stamp(runs, workers, (play.LORAS, play.PICTURES))


def _reusing(first: split.Split, tabs: Any) -> Callable[..., tuple[Any, list[Any]]]:
    """Return what the tab Runs calls to fill the form of the tab Split and to open it."""

    def reuse(find: Callable[[Any], RunSummary], change: bool = False) -> tuple[Any, list[Any]]:
        def fill(name: Any) -> tuple[Any, ...]:
            return (gr.Tabs(selected="split"), *first.reuse(find(name), change))

        return fill, [tabs, *first.fields]

    return reuse


def _warm_up() -> None:
    """Import torch while the artist looks for a picture; the first forecast needs it."""
    threading.Thread(target=libraries.load, daemon=True).start()


def application(runs: Path, workers: Workers, port: int, password: str | None = None) -> Guard:
    """Make the server's application around the page.

    Args:
        password: asked for; the page then answers under any host name.
    """
    cache = runs / ".studio" / "cache"
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get(poll.ADDRESS, response_class=PlainTextResponse)(lambda: stamp(runs, workers))
    blocks = page(runs, cache, workers)
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth=_asking_for(password) if password else None,
        auth_message=f"User name: {USER}" if password else None,
        allowed_paths=[str(runs)],
        max_file_size=UPLOAD_LIMIT,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=look.theme(),
        css=look.CSS,
        head=poll.SCRIPT,
    )
    blocks._queue.sleep_when_free = LATENCY
    return Guard(mounted, runs, cache, port, blocks.fns, any_host=password is not None)


def _asking_for(password: str) -> Callable[[str, str], bool]:
    def right(user: str, word: str) -> bool:
        return bool(user) and compare_digest(word.encode(), password.encode())

    return right


def prepare(runs: Path) -> Path:
    """Create the runs folder and the studio's own folder in it; return that of Gradio's files.

    Raises:
        MachineError: it cannot be written.
    """
    cache = runs / ".studio" / "cache"
    with explained(runs):
        cache.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    return cache


def serve(runs: Path, host: str, port: int, password: str | None, worker: bool, ready: Callable[[str], Any]) -> None:
    """Serve the page until the process is asked to stop.

    Args:
        runs: absolute path of the runs folder.
        worker: start a worker when there is work.
        ready: called with the address when the page can be opened.

    Raises:
        UserError: the host is not this machine alone and there is no password, or the port is taken.
        MachineError: the runs folder cannot be written.
    """
    if not is_local(host) and not password:
        raise UserError(f"--host {host} opens the studio to other machines: give it a password by --password-file")
    prepare(runs)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    workers = Workers(runs, allowed=worker)
    config = uvicorn.Config(
        application(runs, workers, port, password), log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    name = "127.0.0.1" if host == "localhost" else host
    name = f"[{name}]" if ":" in name and not name.startswith("[") else name
    server = _Server(config, lambda: ready(f"http://{name}:{port}"))
    with closing(listener):
        try:
            server.run(sockets=[listener])
        finally:
            workers.stop()


class _Server(uvicorn.Server):
    """A server that reports when it can be reached."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        fault = f"{host}:{port}: cannot listen here ({error.strerror or error})"
        raise UserError(f"{fault}; choose another --port, or 0 for any free one") from None
    except OverflowError:
        listener.close()
        raise UserError(f"port {port}: ports are numbers up to 65535") from None
    return listener
