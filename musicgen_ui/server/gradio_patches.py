"""Every use of Gradio's private interfaces: what it does otherwise than this app needs, and why.

Each stands on a name that Gradio does not promise to keep; tests/server/test_gradio_patches.py has
a test for each that fails when an upgrade moves it. `gradio==6.31.*` in requirements.txt is pinned
for them.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Required, TypedDict, Unpack
from urllib.parse import unquote, urlsplit

import gradio as gr
from gradio import route_utils, routes
from gradio.block_function import BlockFunction
from gradio.blocks import Block
from gradio.data_classes import BlocksConfigDict
from gradio.exceptions import InvalidPathError
from gradio.http_server import Server
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from musicgen_ui.ui.sessions import HOLD

MAX_FILES = 8  # in one upload
NOT_FETCHED = "Upload the file instead of a URL."
TITLE = "MusicGen UI"
DESCRIPTION = "Music from words, played while it is being made."
HERE = "."  # the root of addresses that are relative to the page
HEAD = f"""
<meta charset="utf-8" />
<script>
  // Below a path that a proxy shows without its last slash, nothing relative would be found.
  if (!location.pathname.endsWith("/"))
    location.replace(location.pathname + "/" + location.search + location.hash);
  {HOLD}
</script>
<title>{TITLE}</title>
<link rel="icon" href="favicon.ico" />
<meta property="og:type" content="website" />
<meta property="og:title" content="{TITLE}" />
<meta property="og:description" content="{DESCRIPTION}" />
<meta name="description" content="{DESCRIPTION}" />
<meta name="twitter:card" content="summary" />
"""
_PREVIEW = re.compile(r'\s*<meta\s+(?:property|name)="(?:og|twitter):[^>]*>')

_get_root_url = route_utils.get_root_url
_respond = routes.templates.TemplateResponse
_loader = routes.templates.env.loader
assert _loader
_get_source = _loader.get_source
_move_to_cache = Block.async_move_resource_to_block_cache
_parser = route_utils.GradioMultiPartParser


def apply(page: gr.Blocks) -> None:
    """Changes Gradio for this process, and the page. Call it before the page is launched."""
    routes.CustomCORSMiddleware = PassThrough  # type: ignore
    route_utils.GradioMultiPartParser = upload_parser  # type: ignore
    Block.async_move_resource_to_block_cache = refuse_urls  # type: ignore
    keep_no_values()
    explain_refusals(page)
    route_utils.get_root_url = root_url
    routes.templates.TemplateResponse = page_response  # type: ignore
    vars(_loader)["get_source"] = page_source
    leave_limits_to_the_request()


class PassThrough:
    """Takes the place of Gradio's CORS middleware, which gives nearly every website credentials.

    It is the outermost one, so that `middleware.OriginCheck` cannot take its headers away.
    """

    def __init__(self, app: ASGIApp, **_: object) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        await self.app(scope, receive, send)


class _Upload(TypedDict, total=False):
    max_files: float
    max_fields: float
    max_file_size: Required[float]  # bytes
    upload_dir: str | Path | None
    upload_id: str | None
    upload_progress: route_utils.FileUploadProgress | None


def upload_parser(
    headers: Headers, stream: AsyncGenerator[bytes, None], **options: Unpack[_Upload]
) -> route_utils.GradioMultiPartParser:
    """Gradio's parser of uploads, for files alone: it holds a form's other fields in memory."""
    options |= {"max_files": MAX_FILES, "max_fields": 0}
    return _parser(headers, stream, **options)


async def refuse_urls(component: Block, file: str | Path | None) -> str | None:
    """Makes components refuse a URL instead of a file, but for that of a file that is served here.

    Gradio fetches public ones: a body of any size, and into memory. The URL of an upload is what
    MCP clients have; it is not fetched either. On the class, since Gradio makes a page's components
    anew, and what was set on an instance is lost.
    """
    if re.match(r"\s*[a-z][a-z0-9+.-]+:", str(file or ""), re.IGNORECASE):
        file = _served_file(str(file))
        if file is None:
            raise gr.Error(NOT_FETCHED, print_exception=False)
    path: str | None = await _move_to_cache(component, file)
    return path


def _served_file(address: str) -> Path | None:
    """The file of such an address, whatever it says of scheme and host; only from the cache.

    The cache names files by their content's hash, as in `middleware.RouteAllowList`.
    """
    try:
        path = Path(unquote(urlsplit(address).path.partition("/gradio_api/file=")[2])).resolve()
        is_served = path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()
    except (OSError, ValueError):  # too long, a null byte
        return None
    return path if is_served else None


def keep_no_values() -> None:
    """Has Gradio keep no copy of the components for each page: 9 kB instead of 245 kB.

    The copies are for links to a page's state, which this app does not have; each also keeps what
    a page sent last, of any size.
    """
    nothing = property(lambda session: {}, lambda session, values: None)
    SessionState.config_values = nothing  # type: ignore[assignment]
    SessionState._update_value_in_config = lambda *_: None  # type: ignore[method-assign]


def sign_in_mcp(demo: gr.Blocks, user: str, password: str) -> None:
    """Has Gradio's MCP server call the API with the password; its own client brings none."""
    from gradio_client import Client

    client = Client(
        demo.local_url,
        auth=(user, password),
        headers={"x-gradio-user": "mcp"},
        download_files=False,
        verbose=False,
        analytics_enabled=False,
        _skip_components=False,
    )
    vars(demo.mcp_server_obj)["_get_or_create_client"] = lambda: client


def hang_up(server: Server, within_s: float = 5.0) -> None:
    """Ends a running uvicorn server and breaks its connections off.

    A page takes that for a lost connection, and loads itself anew when the server is back. Gradio's
    own end would tell it that its job failed, or wait for pages that stay open; uvicorn's own
    forced end logs a traceback for each of them.
    """
    server.should_exit = True
    end_s = time.monotonic() + within_s
    while server.thread.is_alive() and time.monotonic() < end_s:
        for connection in tuple(server.server_state.connections):
            with contextlib.suppress(RuntimeError):  # its loop has ended by now
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        server.thread.join(0.05)


def undelivered(demo: gr.Blocks) -> int:
    """Calls of pages whose end was not written to their connections yet."""
    return sum(map(len, demo._queue.pending_event_ids_session.values()))


def leave_limits_to_the_request() -> None:
    """Has sliders hand over what they hold.

    Gradio's own check answers a value beyond the slider with a message that names no field, and
    every event that reads the slider fails.
    """
    gr.Slider.preprocess = lambda slider, payload: payload  # type: ignore


def page_source(_: object, name: str) -> tuple[str, str | None, Callable[[], bool] | None]:
    """Gradio's template of the page with this app's head: links are previewed as "Gradio" else."""
    source, file, is_current = _get_source(routes.templates.env, name)
    source = _PREVIEW.sub("", source).replace("<head>", "<head>" + HEAD, 1)
    # Gradio asks for it at the server's root, which is another app's behind a proxy with a path.
    source = source.replace('href="/manifest.json"', 'href="manifest.json"')
    return source, file, is_current


class _PageContext(TypedDict):
    base_url: str
    config: BlocksConfigDict
    gradio_api_info: object


def page_response(request: Request, name: str, context: _PageContext) -> Response:
    """The page, with addresses relative to itself.

    Gradio makes them of what a proxy in front says of scheme, host and port. Where one is lost,
    the page is alive and its player, picture and downloads are dead.
    """
    config = route_utils.update_root_in_config(context["config"], HERE)
    return _respond(request=request, name=name, context={**context, "config": config})


def root_url(request: Request, route_path: str, root_path: str | None) -> str:
    """What stands before a file's address in an answer: as in `page_response` for the page."""
    if request.method == "POST" and _is_from_the_page(request):
        return HERE
    return _get_root_url(request, route_path, root_path)


def _is_from_the_page(request: Request) -> bool:
    """Whether this server's own page asks, not another website or a program."""
    if request.headers.get("sec-fetch-site") == "same-origin":
        return True
    # Over plain http to another computer a browser sends the origin alone.
    origin = urlsplit(request.headers.get("origin", "")).hostname
    hosts = (request.headers.get(name, "") for name in ("host", "x-forwarded-host"))
    return bool(origin) and origin in {_hostname(host) for host in hosts}


def _hostname(host: str) -> str | None:
    return urlsplit(f"//{host.partition(',')[0].strip()}").hostname


def explain_refusals(page: gr.Blocks) -> None:
    """Gives the reason where a call is refused before it reaches a handler.

    Gradio says it only with `show_error`, and then it shows every other error as well.
    """
    preprocess = page.preprocess_data

    async def explained(
        block_fn: BlockFunction,
        inputs: list[object],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[object]:
        expected = len(block_fn.inputs)
        if len(inputs) != expected:
            raise _refusal(f"{expected} values are expected, and {len(inputs)} came")
        try:
            values: list[object] = await preprocess(block_fn, inputs, state, explicit_call)
            return values
        except gr.Error:
            raise
        except InvalidPathError as error:
            raise _refusal("A file is uploaded first, a path on the server is not taken") from error
        except ValueError as error:  # a value of another kind than the parameter's
            raise _refusal(_what_is_wrong(block_fn, inputs)) from error

    page.preprocess_data = explained  # type: ignore[method-assign]


def _refusal(why: str) -> gr.Error:
    return gr.Error(f"{why}: see “Use via API” on the page.", print_exception=False)


def _what_is_wrong(block_fn: BlockFunction, inputs: list[object]) -> str:
    for component, value in zip(block_fn.inputs, inputs, strict=True):
        if isinstance(component, gr.Audio) and value is not None and not _is_file(value):
            return (
                f"{component.label} must be a file, as gradio_client.handle_file gives it, or as "
                '{"path": …, "meta": {"_type": "gradio.FileData"}} of an upload'
            )
    return "A value could not be taken"


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and value.get("meta") == {"_type": "gradio.FileData"}
