"""The server: settings → engine, page, queue, limits, routes → launch.

The page answers first; the engine is built in the background, since importing torch and loading
a model take longer than a visitor waits. Until it is there, `BackgroundEngine` says so and lets
clicks wait. The defaults are safe for a public server: no way round the queue, bounded uploads
and bodies, a private temporary folder that is swept, nothing served but what the page shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from musicgen_ui import files, logs
from musicgen_ui.engine.events import Description, Engine, Event, Health, Progress
from musicgen_ui.request import GenerationRequest, RequestError
from musicgen_ui.ui.limits import BodyLimit, sweep_while
from musicgen_ui.ui.settings import Settings, settings, variable

log = logging.getLogger(__name__)


class BackgroundEngine:
    """An engine that is still being built: what needs it waits, what need not says so."""

    def __init__(self, build: Callable[[], Engine], checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._build = build

    def start(self) -> None:
        """Begins to build the engine and to load the first checkpoint, in a thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._engine = self._build()
        except Exception as error:
            log.exception("The engine could not be started")
            self._error = error
        finally:
            self._ready.set()
        preload = getattr(self._engine, "preload", None)
        if preload:
            try:
                preload(self._checkpoint)
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
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """See `Engine.stream`; waits for the engine first."""
        while not self._ready.is_set():
            yield Progress("loading", note="starting the engine")
            await asyncio.sleep(0.2)
            if stop is not None and stop.is_set():
                return
        events: Any = self._get().stream(request, stop, visitor)
        async with contextlib.aclosing(events):  # a click that is closed early frees its rows now
            async for event in events:
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

    def health(self) -> Health:
        """See `Engine.health`; an engine that could not be built is trouble, one on its way not."""
        if self._engine is not None:
            return self._engine.health()
        return Health("the engine could not be started" if self._error else "")

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
            also=[chosen.checkpoint],
        )

    return BackgroundEngine(build, chosen.checkpoint)


def launch(chosen: Settings, engine: Engine | None = None) -> tuple[Any, Path]:
    """Starts the server; returns Gradio's Blocks and its private folder, for `close`."""
    files.delete_leftovers(Path(chosen.output_folder) if chosen.output_folder else None)
    temporary = files.private_folder()
    cache = temporary / "shown"  # under names that nobody can guess, unlike the takes'
    cache.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Else a table of the last 10,000 events is made anew after each, for a page that is off here.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ[variable("trusted_proxies")] = chosen.trusted_proxies  # uvicorn reads it
    background = managed_engine(chosen)
    engine = engine or background

    from starlette.middleware import Middleware

    from musicgen_ui.ui import doors, gate, metrics, page, take_panel
    from musicgen_ui.ui.journal import Journal
    from musicgen_ui.ui.live_player import ASSETS

    takes = Path(chosen.output_folder or temporary / "takes").resolve()
    takes.mkdir(parents=True, exist_ok=True)
    shown = {takes, temporary / "takes", take_panel.EXAMPLE.with_suffix(".wav")}
    upload_bytes = round(chosen.max_upload_mb * 1e6)
    middleware = [
        Middleware(doors.Doors, cache),
        Middleware(BodyLimit, upload_bytes=upload_bytes + 100_000),
    ]
    if chosen.auth:  # before a byte of a body is read
        middleware.insert(0, Middleware(gate.Gate, *chosen.credentials))
    journal = Journal(chosen.log_prompts)
    demo: Any = page.build(engine, chosen, takes, temporary / "takes", journal)
    doors.guard_files(demo.blocks.values())
    # The engine has the real queue; this one only bounds what waits for a validator.
    demo.queue(api_open=False, max_size=chosen.queue_length + 16, default_concurrency_limit=None)
    app, _, _ = demo.launch(
        server_name=chosen.host,
        server_port=chosen.port,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        share=chosen.share,
        auth=chosen.credentials if chosen.auth else None,
        root_path=chosen.root_path,
        mcp_server=chosen.mcp,
        ssr_mode=False,
        enable_monitoring=False,
        strict_cors=True,
        max_file_size=upload_bytes,
        # May be copied to the cache, which alone is served.
        allowed_paths=[str(path) for path in shown],
        footer_links=["api"],
        theme=page.theme(),
        css_paths=[ASSETS / "style.css"],
        app_kwargs={"middleware": middleware},
    )
    doors.bound_connections(demo.server)
    watched = metrics.Metrics(engine, journal)
    # Gradio's catch-all page route comes first in the list: ours must come before it.
    app.router.routes[:0] = [
        demo.recall.route(),
        *metrics.routes(
            watched, chosen.metrics_token, proxied=bool(chosen.trusted_proxies) or chosen.share
        ),
    ]
    if chosen.mcp and chosen.auth:  # the tool asks the API, and must sign in like all others
        demo.mcp_server_obj._client_instance = signed_in(demo.local_url, chosen)
    if engine is background:  # not before: importing torch beside it would delay the page
        background.start()
    running = lambda: demo.is_running  # noqa: E731
    for work in (lambda: sweep_while(running, temporary), take_panel.warm_up):
        threading.Thread(target=work, daemon=True).start()
    return demo, temporary


def signed_in(url: str, chosen: Settings) -> Any:
    """The client through which Gradio's MCP server calls the API of a server with a password."""
    from gradio_client import Client

    return Client(
        url,
        auth=chosen.credentials,
        headers={"x-gradio-user": "mcp"},
        download_files=False,
        verbose=False,
        analytics_enabled=False,
        _skip_components=False,
    )


def close(demo: Any, temporary: Path) -> None:
    """Ends a launched server and deletes what was temporary."""
    demo.close()
    shutil.rmtree(temporary, ignore_errors=True)


def serve(chosen: Settings, engine: Engine | None = None) -> None:
    """Serves the page until it is interrupted.

    Raises:
        RequestError: what was asked for is not installed, or a checkpoint cannot be had.
    """
    if chosen.mcp and find_spec("mcp") is None:
        raise RequestError("--mcp needs more: pip install -r requirements-mcp.txt")
    if engine is None and os.environ.get("SPACES_ZERO_GPU"):
        from musicgen_ui.zero import ZeroEngine

        engine = ZeroEngine(chosen.checkpoint)
    demo, temporary = launch(chosen, engine)
    print(f"MusicGen UI is at {demo.local_url}", flush=True)
    if chosen.share:
        print(f"For others: {demo.share_url or 'no link, Gradio has no way out'}", flush=True)
    try:
        demo.block_thread()
    finally:
        close(demo, temporary)


def main(arguments: list[str] | None = None) -> int:
    """`python app.py` and `python -m musicgen_ui serve`: 2 for a wrong setting."""
    logs.set_up()
    files.give_caches_a_home()
    try:
        chosen = settings(sys.argv[1:] if arguments is None else arguments)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        serve(chosen)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # the port is taken, the address is not ours
        print(f"Cannot listen on {chosen.host}:{chosen.port}: {error}", file=sys.stderr)
        return 1
    return 0
