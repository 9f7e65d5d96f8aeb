"""The server: settings → engine, page, queue, limits, routes → launch.

The page answers first; the engine is built in the background, since importing torch and loading
a model take longer than a visitor waits. Until it is there, `BackgroundEngine` says so and lets
clicks wait. The defaults are safe for a public server: no way round the queue, bounded uploads
and bodies, a private temporary folder that is swept, nothing served but what the page shows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from musicgen_ui.engine.events import Description, Engine, Event, Progress
from musicgen_ui.request import GenerationRequest, RequestError
from musicgen_ui.ui.settings import Settings, settings

log = logging.getLogger(__name__)

KEPT_S = 24 * 3600  # temporary takes and uploads older than this are deleted
SWEEP_EVERY_S = 600.0
BODY_BYTES = 4_000_000  # a form with two full prompts is some 10 kB; uploads are counted apart


class BackgroundEngine:
    """An engine that is still being built: what needs it waits, what need not says so."""

    def __init__(self, build: Callable[[], Engine], checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._build, args=(build,), daemon=True).start()

    def _build(self, build: Callable[[], Engine]) -> None:
        try:
            self._engine = build()
        except Exception as error:
            log.exception("The engine could not be started")
            self._error = error
        finally:
            self._ready.set()
        preload = getattr(self._engine, "preload", None)
        if preload:
            try:
                preload()
            except Exception:  # a click loads again and shows the reason
                log.exception("The first checkpoint could not be loaded ahead")

    def _get(self) -> Engine:
        self._ready.wait()
        if self._engine is None:
            raise RequestError(
                "The server could not start its engine: see its log."
            ) from self._error
        return self._engine

    async def stream(
        self, request: GenerationRequest, stop: threading.Event | None = None
    ) -> AsyncIterator[Event]:
        """See `Engine.stream`; waits for the engine first."""
        while not self._ready.is_set():
            yield Progress("loading", note="starting the engine")
            await asyncio.sleep(0.2)
            if stop is not None and stop.is_set():
                return
        async for event in self._get().stream(request, stop):
            yield event

    def checkpoints(self) -> list[str]:
        """The chosen checkpoint first, then the others."""
        names = self._get().checkpoints()
        return [self._checkpoint, *(n for n in names if n != self._checkpoint)]

    def describe(self, checkpoint: str) -> Description:
        """See `Engine.describe`."""
        return self._get().describe(checkpoint)

    def status(self) -> str:
        """See `Engine.status`."""
        if self._engine is not None:
            return self._engine.status()
        return "engine failed, see the log" if self._error else "starting …"

    def unload(self) -> None:
        """See `Engine.unload`."""
        if self._engine is not None:
            self._engine.unload()


def managed_engine(chosen: Settings) -> BackgroundEngine:
    """The real engine, built and warmed up in the background."""

    def build() -> Engine:
        from musicgen_ui.manager import ModelManager

        return ModelManager(
            device=chosen.device,
            precision=chosen.precision,
            budget_bytes=round(chosen.memory_gb * 1e9) or None,
            idle_s=chosen.idle_s,
            max_jobs=chosen.jobs,
            allow_any=chosen.any_checkpoint,
        )

    return BackgroundEngine(build, chosen.checkpoint)


class BodyLimit:
    """Refuses request bodies that are too large, counted as they come (ASGI middleware).

    Gradio limits uploaded files, but reads a form field or a JSON body of any size into memory.
    """

    def __init__(self, app: Any, upload_bytes: int, body_bytes: int = BODY_BYTES) -> None:
        self.app = app
        self.upload_bytes = upload_bytes
        self.body_bytes = body_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        limit = self.upload_bytes if upload else self.body_bytes
        headers = dict(scope["headers"])
        seen, started = 0, False

        async def counted() -> dict:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _TooLarge
            return message

        async def noted(message: dict) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            if int(headers.get(b"content-length", b"0") or 0) > limit:
                raise _TooLarge
            await self.app(scope, counted, noted)
        except (_TooLarge, ValueError):
            if started:
                raise
            await refuse(send, f"The request is larger than {limit // 1_000_000} MB.")


class _TooLarge(Exception):
    """A body passed its limit."""


async def refuse(send: Callable, text: str) -> None:
    """Answers 413 with a sentence."""
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def sweep(folder: Path, older_than_s: float) -> int:
    """Deletes files in `folder` that nobody touched for `older_than_s`; how many."""
    count, before = 0, time.time() - older_than_s
    for path in sorted(folder.rglob("*"), reverse=True):
        try:
            if path.is_dir():
                path.rmdir()  # only an empty one goes
            elif path.stat().st_mtime < before:
                path.unlink()
                count += 1
        except OSError:
            continue
    return count


def private_folder() -> Path:
    """A new folder that only this process's user can read, for uploads and takes."""
    return Path(tempfile.mkdtemp(prefix="musicgen-ui-"))


def launch(chosen: Settings, engine: Engine | None = None) -> Any:
    """Starts the server and returns Gradio's Blocks; the caller blocks or closes it."""
    temporary = private_folder()
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    engine = engine or managed_engine(chosen)

    import gradio as gr
    from starlette.middleware import Middleware

    from musicgen_ui.ui import page
    from musicgen_ui.ui.live_player import ASSETS

    takes = Path(chosen.output_folder or temporary / "takes").resolve()
    takes.mkdir(parents=True, exist_ok=True)
    upload_bytes = round(chosen.max_upload_mb * 1e6)
    demo = page.build(engine, chosen, takes)
    # The engine has the real queue; this one only bounds what waits for a validator.
    demo.queue(api_open=False, max_size=chosen.queue_length + 16, default_concurrency_limit=None)
    app, _, _ = demo.launch(
        server_name=chosen.host,
        server_port=chosen.port,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        strict_cors=True,
        max_file_size=upload_bytes,
        allowed_paths=[str(takes)],
        footer_links=["api"],
        theme=page.theme(),
        css_paths=[ASSETS / "style.css"],
        app_kwargs={"middleware": [Middleware(BodyLimit, upload_bytes=upload_bytes + 100_000)]},
    )
    app.add_api_route("/healthz", lambda: {"status": "ok", "engine": engine.status()})
    # Gradio's catch-all page route comes first in the list: ours must come before it.
    app.router.routes.insert(0, app.router.routes.pop())
    kept = gr.utils.get_upload_folder()
    threading.Thread(target=_sweep_forever, args=(Path(kept), demo), daemon=True).start()
    demo.temporary = temporary
    return demo


def _sweep_forever(folder: Path, demo: Any) -> None:
    while demo.is_running:
        time.sleep(SWEEP_EVERY_S)
        sweep(folder, KEPT_S)


def serve(chosen: Settings, engine: Engine | None = None) -> None:
    """Serves the page until it is interrupted."""
    demo = launch(chosen, engine)
    print(f"MusicGen UI is at {demo.local_url}", flush=True)
    try:
        demo.block_thread()
    finally:
        demo.close()
        shutil.rmtree(demo.temporary, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """`python app.py` and `python -m musicgen_ui serve`: 2 for a wrong setting."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        chosen = settings(sys.argv[1:] if arguments is None else arguments)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    serve(chosen)
    return 0
