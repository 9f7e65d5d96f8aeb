"""The server: settings → engine, page, queue, limits, routes → launch.

The page answers first; the engine is built in the background, since importing torch and loading
a model take longer than a visitor waits. Until it is there, `StartingBackend` says so and lets
clicks wait. The defaults are safe for a public server: no way round the queue, bounded uploads
and bodies, a private temporary folder that is swept, nothing served but what the page shows.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import psutil
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from musicgen_ui import environment, files, heap, library
from musicgen_ui.engine.protocol import Backend, Trouble
from musicgen_ui.errors import RequestError
from musicgen_ui.server import cleanup, gradio_import, logs
from musicgen_ui.server.backend import of_settings
from musicgen_ui.server.folders import (
    check_folder,
    finetune_folder,
    is_shown_to_others,
    is_users_alone,
    kept_folder,
    object_storage,
)
from musicgen_ui.server.middleware import (
    BodyLimit,
    ErrorResponses,
    IdentifierLimit,
    OriginCheck,
    RouteAllowList,
    ServerRoutes,
    is_loopback,
)
from musicgen_ui.server.settings import Settings, flag, label, variable
from musicgen_ui.server.sign_in import SignIn

if TYPE_CHECKING:  # gradio and torch
    from musicgen_ui.backends.admission import Admission
    from musicgen_ui.ui.page import Page

FAILED, WRONG = 1, 2  # exit codes
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
JOBS_END_S = 5.0  # that stopped jobs have to save what they made
DELIVERY_S = 2.0  # that their pages have to get the last updates
CHILDREN_S = 5.0  # for what the process started to end
DRAINED_DELIVERY_S = 10.0  # the same where the server may take its time
FLUSH_S = 0.3  # until what was written is sent, and a page has asked for what it shows in the end
SESSIONS = 800  # pages whose state Gradio remembers, 9 kB each
GRADIO_VARIABLES = ("GRADIO_SHARE_SERVER_ADDRESS",)  # that are left to Gradio

log = logging.getLogger(__name__)


def _set_environment(chosen: Settings, cache: Path) -> None:
    """What libraries read when they are imported."""
    for name in [n for n in os.environ if n.startswith("GRADIO_") and n not in GRADIO_VARIABLES]:
        # What they set is in `Settings`. Of the others one starts servers that no middleware
        # guards (GRADIO_NUM_WORKERS), and one keeps `launch` from coming back (GRADIO_DEBUG).
        del os.environ[name]
    os.environ |= {
        # Gradio tries here whether the port is free, and knows only addresses of version 4.
        "GRADIO_SERVER_NAME": "127.0.0.1" if ":" in chosen.host else chosen.host,
        "GRADIO_TEMP_DIR": str(cache),
        "GRADIO_ANALYTICS_ENABLED": "False",
        # Else a table of the last 10,000 events is made after each, for a page that is off here.
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    }


def middleware(
    chosen: Settings, cache: Path, names: set[str], routes: Sequence[BaseRoute]
) -> list[Middleware]:
    """What a request passes before Gradio sees it, in order.

    Args:
        chosen: how the server runs.
        cache: the folder whose files are served, and where uploads are written.
        names: of this server.
        routes: this server's own, beside Gradio's.
    """
    local = is_loopback(chosen.host)
    # Other websites call a public Space, too; what has a password is for its own page.
    public = bool(os.environ.get("SPACE_ID")) and not chosen.auth
    passed = [Middleware(OriginCheck, names, local, public)]
    if public:  # without credentials
        every = ["*"]
        passed.append(
            Middleware(
                CORSMiddleware, allow_origins=every, allow_methods=every, allow_headers=every
            )
        )
    if chosen.auth:  # the password before a byte of a body is read
        passed.append(Middleware(SignIn, *chosen.credentials))
    upload_bytes = chosen.max_upload_bytes + 100_000
    return [
        *passed,
        Middleware(RouteAllowList, cache),
        Middleware(ErrorResponses),
        Middleware(BodyLimit, upload_bytes=upload_bytes, folder=cache),
        Middleware(IdentifierLimit),
        Middleware(ServerRoutes, routes),
    ]


def launch(chosen: Settings, backend: Backend | None = None) -> tuple[Page, Path]:
    """Starts the server; returns Gradio's Blocks and its private folder, for `close`."""
    kept = kept_folder(chosen)
    files.delete_leftovers(kept)
    temporary = files.private_folder()
    cache = temporary / "shown"  # under names that nobody can guess, unlike the takes'
    cache.mkdir()
    _set_environment(chosen, cache)  # before gradio is imported
    gradio_import.skip_stubs()
    background = of_settings(chosen)
    backend = backend or background

    from musicgen_ui.backends.admission import Admission, HourlyQuota
    from musicgen_ui.backends.job_log import JobLog
    from musicgen_ui.server import gradio_patches
    from musicgen_ui.ui import page

    takes = (kept or temporary / "takes").resolve()
    takes.mkdir(parents=True, exist_ok=True)
    files.TAKES.add(takes)
    admission = Admission(
        backend,
        takes,
        temporary / "takes",
        queue_length=chosen.queue_length,
        client_jobs=chosen.visitor_jobs,
        quota=HourlyQuota(chosen.visitor_seconds),
        job_log=JobLog(chosen.log_prompts),
    )
    runs = finetune_folder(chosen)
    options = page.PageOptions(
        chosen.checkpoint,
        chosen.any_checkpoint,
        chosen.max_duration_s,
        runs,
        offers_download=is_users_alone(chosen) and chosen.backend == "local",
    )
    kept_takes = library.Library(takes) if kept and not is_shown_to_others(chosen) else None
    demo = page.build(admission, options, kept_takes)
    demo.storage = object_storage(chosen, takes)
    gradio_patches.apply(demo)
    # The engine has the real queue; this one only bounds what waits for a validator.
    demo.queue(api_open=False, max_size=chosen.queue_length + 16, default_concurrency_limit=None)
    routes = _routes(demo, admission, kept_takes, temporary, chosen)
    names = {*chosen.host_names, os.environ.get("SPACE_HOST", "").lower()} - {""}
    passed = middleware(chosen, cache, names, routes)
    _launch_page(demo, chosen, passed, [takes, temporary / "takes", *([runs] if runs else [])])
    if demo.share_url:
        names.add(urlsplit(demo.share_url).hostname or "")
    if chosen.mcp and chosen.auth:  # the tool asks the API, and must sign in like all others
        gradio_patches.sign_in_mcp(demo, *chosen.credentials)
    if backend is background:  # not before: importing torch beside it would delay the page
        background.start()
    if kept_takes:
        kept_takes.refresh_beside()
    work = (lambda: demo.is_running, temporary, chosen.temporary_gb * 1e9)
    threading.Thread(target=cleanup.clean_while, args=work, daemon=True).start()
    return demo, temporary


def _routes(
    demo: Page,
    admission: Admission,
    kept: library.Library | None,
    temporary: Path,
    chosen: Settings,
) -> list[BaseRoute]:
    """What the page and others ask beside Gradio: sound, scripts, the library's files, metrics."""
    from musicgen_ui.server import audio_stream, library_files, played
    from musicgen_ui.server.metrics import Metrics, metrics_routes
    from musicgen_ui.ui import player

    proxied = bool(chosen.trusted_proxies) or chosen.share
    return [
        *(demo.sessions.route(), audio_stream.route(demo.sessions.job), player.scripts()),
        *(library_files.routes(kept, temporary) if kept else ()),
        played.route(demo.sessions.job),
        *metrics_routes(Metrics(admission, admission.job_log), chosen.metrics_token, proxied),
    ]


def _launch_page(
    demo: Page, chosen: Settings, passed: list[Middleware], folders: list[Path]
) -> None:
    """Gradio's own launch; files of `folders` may be copied to the cache, which alone is served."""
    from musicgen_ui.ui import page, take_panel

    with _environment(variable("trusted_proxies"), chosen.trusted_proxies):  # for uvicorn
        demo.launch(
            server_name=f"[{chosen.host}]" if ":" in chosen.host else chosen.host,  # IPv6
            server_port=chosen.port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            share=chosen.share,
            root_path=chosen.root_path,
            mcp_server=chosen.mcp,
            ssr_mode=False,
            enable_monitoring=False,
            state_session_capacity=SESSIONS,
            strict_cors=True,
            max_file_size=chosen.max_upload_bytes,
            allowed_paths=[str(path) for path in (*folders, *take_panel.EXAMPLE_SHOWN)],
            footer_links=["api"],
            theme=page.theme(),
            css_paths=[files.ASSETS / "style.css"],
            app_kwargs={"middleware": passed},
        )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def close(demo: Page, temporary: Path) -> None:
    """Ends a launched server with its jobs, connections and engine; deletes what was temporary.

    What the jobs made so far is kept as takes.
    """
    from musicgen_ui.server import gradio_patches

    if demo.finetuning:
        demo.finetuning.pause()
    jobs = len(demo.backend)
    demo.backend.stop_all()
    end_s = time.monotonic() + JOBS_END_S
    while len(demo.backend) and time.monotonic() < end_s:
        time.sleep(0.02)
    if jobs:
        deliver(demo, DELIVERY_S)

    gradio_patches.hang_up(demo.server)
    demo.close(verbose=False)
    demo.backend.close()
    if demo.storage:
        demo.storage.close()
    if demo.finetuning:
        demo.finetuning.close()
    if not files.delete(temporary):
        log.warning("Could not delete %s", temporary)


def deliver(demo: Page, within_s: float) -> None:
    """Waits until the pages have the last updates of their jobs: so long, as some may be gone."""
    from musicgen_ui.server import gradio_patches

    end_s, flushed = time.monotonic() + within_s, False
    while not flushed and time.monotonic() < end_s:
        while gradio_patches.undelivered(demo) and time.monotonic() < end_s:
            time.sleep(0.02)
        time.sleep(FLUSH_S)
        flushed = not gradio_patches.undelivered(demo)


def check_checkpoints(chosen: Settings) -> None:
    """Sees whether the checkpoints that the host names can be any; asks no network.

    Raises:
        RequestError: one is neither a known name, nor a folder with a checkpoint, nor a Hub id.
    """
    from musicgen_ui.checkpoints import registry

    named = [(name, "checkpoints") for name in chosen.listed_checkpoints[1:]]
    for name, setting in [(chosen.checkpoint, "checkpoint"), *named]:
        try:
            source = registry.resolve(name)
            if source.folder and not registry.holds_checkpoint(source.folder):
                registry.describe(source)  # says what it is instead
        except RequestError as error:
            raise RequestError(f"{label(setting)}: {error}") from error


def check_address(chosen: Settings) -> None:
    """Sees whether the address can be listened on.

    Raises:
        RequestError: it is no address of this computer, or not for this user.
        OSError: another program listens there.
    """
    host = label("host")
    try:
        found = socket.getaddrinfo(chosen.host, chosen.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"{host} cannot be {chosen.host!r}: there is no such address."
        ) from error
    refused: list[OSError] = []
    for family, _, _, _, address in found:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as tried:
                if os.name == "posix":  # as the server will do
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(address)
                tried.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            refused.append(error)
    if len(refused) < len(found):  # a name may have addresses of both versions
        return
    if refused[0].errno == errno.EACCES:
        raise RequestError(
            f"This user may not listen on port {chosen.port}: choose one from 1024 on with "
            f"{flag('port')}."
        ) from refused[0]
    raise RequestError(
        f"{host} cannot be {chosen.host}, which is no address of this computer: name one that is, "
        "or 0.0.0.0 for every one."
    ) from refused[0]


@contextlib.contextmanager
def stop_signals(act: Callable[[int], object]) -> Iterator[None]:
    """Calls `act` with the number of each signal that asks this process to end.

    Nothing is raised where a signal happens to arrive: in a destructor it would be lost. What the
    process was started to ignore, as by nohup, is ignored.
    """
    before = {number: signal.getsignal(number) for number in STOPS}
    handled = [number for number in STOPS if before[number] != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, lambda number, _: act(number))
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def _set_handlers_again() -> None:
    """Sets the handlers that Python has: Ray takes SIGTERM away when its cluster is joined, which
    happens in another thread and ends the process without a word to its jobs.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOPS:
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)


def leave_at_once(number: int) -> NoReturn:
    """Ends a process that has not served anything yet, by a signal."""
    files.delete_private()
    leave(128 + number)


def serve(chosen: Settings, backend: Backend | None = None) -> int:
    """Serves the page until a signal asks to stop; returns the exit code.

    Raises:
        RequestError: what was asked for is not installed or wrong here.
        OSError: another program listens on the port.
    """
    heap.share()
    if chosen.mcp and find_spec("mcp") is None:
        raise RequestError("--mcp needs more: pip install -r requirements-mcp.txt")
    if chosen.backend == "ray" and find_spec("ray") is None:
        raise RequestError("--backend ray needs more: pip install -r requirements-ray.txt")
    if chosen.front_only and not chosen.ray_address:
        raise RequestError("--front-only needs --ray-address: the cluster of the other front.")
    check_folder(chosen)
    check_checkpoints(chosen)
    check_address(chosen)
    environment.prepare_proxies(chosen.host)
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()  # a signal's handler may call its `put`
    try:
        with stop_signals(leave_at_once):
            if backend is None and os.environ.get("SPACES_ZERO_GPU"):
                from musicgen_ui.backends.ranking import Ranking
                from musicgen_ui.backends.zerogpu import ZeroBackend

                backend = Ranking(ZeroBackend(chosen.checkpoint))
            demo, temporary = launch(chosen, backend)
            with stop_signals(asked.put):
                try:
                    address = str(demo.local_url).replace("[::]", "[::1]")
                    print(f"MusicGen UI is at {address}", flush=True)
                    if chosen.share:
                        link = demo.share_url or "no link, Gradio's servers were not reached"
                        print(f"For others: {link}", flush=True)
                    code = wait_for_end(demo, asked)
                    if code == 128 + signal.SIGTERM:
                        drain(demo, asked, chosen.drain_s)
                    return code
                finally:
                    close(demo, temporary)
    finally:
        files.delete_private()


def wait_for_end(demo: Page, asked: queue.SimpleQueue[int], check_every_s: float = 0.5) -> int:
    """Until a signal comes, or the server cannot go on; the exit code."""
    while demo.server.thread.is_alive():
        _set_handlers_again()
        with contextlib.suppress(queue.Empty):
            return 128 + asked.get(timeout=check_every_s)
        if refusal := getattr(demo.backend.backend, "refusal", None):
            print(refusal, file=sys.stderr)
            return WRONG
        # Only a new process has CUDA again.
        if demo.backend.health().trouble is Trouble.DEVICE_LOST:
            log.critical("The device is lost: the server ends, to be started again")
            return FAILED
    log.critical("The server has ended by itself")
    return FAILED


def drain(demo: Page, asked: queue.SimpleQueue[int], seconds: float) -> None:
    """Refuses new jobs and waits until those under way have ended: so long, or until a signal."""
    demo.backend.refuse_all()
    end_s, jobs = time.monotonic() + seconds, len(demo.backend)
    while len(demo.backend) and time.monotonic() < end_s:
        with contextlib.suppress(queue.Empty):
            asked.get(timeout=0.1)
            return
    if jobs and not len(demo.backend):
        deliver(demo, DRAINED_DELIVERY_S)


def run(chosen: Settings) -> int:
    """Serves the page, which ends the process; returns the exit code where nothing was served.

    Raises:
        RequestError: what was asked for is not installed or wrong here.
    """
    logs.set_up()
    try:
        leave(serve(chosen))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, None):  # Gradio's own has no number
            raise
        print(
            f"Cannot listen on {chosen.host}, port {chosen.port}: another program does. End it, or "
            f"choose another port with {flag('port')}.",
            file=sys.stderr,
        )
        return FAILED


def leave(code: int) -> NoReturn:
    """Ends the process now, and those that it started, such as the tunnel of a public link.

    Some threads cannot be ended, such as one that imports a library or asks a silent Hub. An
    interpreter that shuts down beside them waits for them, or is aborted by one in native code.
    """
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    # Until they have ended, those of a cluster write to folders that were deleted before.
    psutil.wait_procs(children, timeout=CHILDREN_S)
    files.delete_private()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # a signal came in a write
            stream.flush()
    os._exit(code)
