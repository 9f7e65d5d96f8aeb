"""The server: settings → engine, page, queue, limits, routes → launch.

The page answers first; the engine is built in the background, since importing torch and loading
a model take longer than a visitor waits. Until it is there, `BackgroundEngine` says so and lets
clicks wait. The defaults are safe for a public server: no way round the queue, bounded uploads
and bodies, a private temporary folder that is swept, nothing served but what the page shows.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from musicgen_ui import files, logs
from musicgen_ui.engine import faults
from musicgen_ui.engine.events import Engine
from musicgen_ui.request import RequestError
from musicgen_ui.ui.limits import SESSIONS, BodyLimit, share_heaps, sweep_while
from musicgen_ui.ui.settings import Settings, settings, variable
from musicgen_ui.ui.starting import BackgroundEngine

log = logging.getLogger(__name__)


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


def _set_environment(chosen: Settings, cache: Path) -> None:
    """What libraries read when they are imported."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(cache),
        "GRADIO_ANALYTICS_ENABLED": "False",
        # Else a table of the last 10,000 events is made after each, for a page that is off here.
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",
        variable("trusted_proxies"): chosen.trusted_proxies,  # uvicorn's
    }


def _middleware(chosen: Settings, cache: Path) -> list[Any]:
    """What a request passes before Gradio sees it, in order."""
    from starlette.middleware import Middleware

    from musicgen_ui.ui import doors, gate

    # The password first, before a byte of a body is read.
    passed = [Middleware(gate.Gate, *chosen.credentials)] if chosen.auth else []
    passed.append(Middleware(doors.Doors, cache))
    passed.append(Middleware(BodyLimit, upload_bytes=chosen.max_upload_bytes + 100_000))
    return passed


def launch(chosen: Settings, engine: Engine | None = None) -> tuple[Any, Path]:
    """Starts the server; returns Gradio's Blocks and its private folder, for `close`."""
    files.delete_leftovers(Path(chosen.output_folder) if chosen.output_folder else None)
    temporary = files.private_folder()
    cache = temporary / "shown"  # under names that nobody can guess, unlike the takes'
    cache.mkdir()
    _set_environment(chosen, cache)  # before gradio is imported
    background = managed_engine(chosen)
    engine = engine or background

    from musicgen_ui.ui import doors, gradio_patches, metrics, page, take_panel
    from musicgen_ui.ui.journal import Journal
    from musicgen_ui.ui.live_player import ASSETS

    takes = Path(chosen.output_folder or temporary / "takes").resolve()
    takes.mkdir(parents=True, exist_ok=True)
    shown = {takes, temporary / "takes", take_panel.EXAMPLE.with_suffix(".wav")}
    journal = Journal(chosen.log_prompts)
    demo: Any = page.build(engine, chosen, takes, temporary / "takes", journal)
    gradio_patches.apply(demo)
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
        state_session_capacity=SESSIONS,
        strict_cors=True,
        max_file_size=chosen.max_upload_bytes,
        # May be copied to the cache, which alone is served.
        allowed_paths=[str(path) for path in shown],
        footer_links=["api"],
        theme=page.theme(),
        css_paths=[ASSETS / "style.css"],
        app_kwargs={"middleware": _middleware(chosen, cache)},
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
    _work_beside(demo, engine, temporary, chosen.temporary_gb * 1e9)
    return demo, temporary


def _work_beside(demo: Any, engine: Engine, temporary: Path, kept_bytes: float) -> None:
    from musicgen_ui.ui import take_panel

    running = lambda: demo.is_running  # noqa: E731
    works = [lambda: sweep_while(running, temporary, kept_bytes), take_panel.warm_up]
    if isinstance(engine, BackgroundEngine):
        works.append(lambda: restart_when_lost(engine, running))
    for work in works:
        threading.Thread(target=work, daemon=True).start()


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


def restart_when_lost(
    engine: Engine, running: Callable[[], bool], every_s: float = 10.0, not_before_s: float = 60.0
) -> None:
    """Starts this process anew when its device is lost: nothing less brings a broken CUDA back."""
    began_s = time.monotonic()
    while running():
        time.sleep(every_s)
        lost = engine.health().trouble == faults.LOST
        if lost and time.monotonic() - began_s >= not_before_s:  # else it would turn for ever
            log.critical("The device is lost: the app starts again")
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def close(demo: Any, temporary: Path) -> None:
    """Ends a launched server and deletes what was temporary."""
    demo.close()
    if not files.delete(temporary):
        log.warning("Could not delete %s", temporary)


def serve(chosen: Settings, engine: Engine | None = None) -> None:
    """Serves the page until it is interrupted.

    Raises:
        RequestError: what was asked for is not installed, or a checkpoint cannot be had.
    """
    share_heaps()
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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `close`
    try:
        chosen = settings(sys.argv[1:] if arguments is None else arguments)
        serve(chosen)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # the port is taken, the address is not ours
        print(f"Cannot listen on {chosen.host}:{chosen.port}: {error}", file=sys.stderr)
        return 1
    return 0
