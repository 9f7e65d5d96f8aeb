"""What Gradio does otherwise than this app needs: each change with its reason.

They stand on names that Gradio does not promise to keep; a test of each fails when they move.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio import route_utils, routes
from gradio.exceptions import InvalidPathError

from musicgen_ui.server import middleware

TITLE = "MusicGen UI"
DESCRIPTION = "Music from words, played while it is being made."
HERE = "."  # the root of addresses that are relative to the page
HEAD = f"""
<meta charset="utf-8" />
<script>
  // Below a path that a proxy shows without its last slash, nothing relative would be found.
  if (!location.pathname.endsWith("/"))
    location.replace(location.pathname + "/" + location.search + location.hash);
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
_loader: Any = routes.templates.env.loader
_get_source = _loader.get_source


def apply(page: gr.Blocks) -> None:
    """Changes Gradio for this process, and the page."""
    middleware.guard_files()
    say_why(page)
    route_utils.get_root_url = root_url
    routes.templates.TemplateResponse = page_response  # type: ignore
    _loader.get_source = page_source
    leave_limits_to_the_request()


def leave_limits_to_the_request() -> None:
    """Has sliders hand over what they hold.

    Gradio's own check answers a value beyond the slider with a message that names no field, and
    every event that reads the slider fails.
    """
    gr.Slider.preprocess = lambda slider, payload: payload  # type: ignore


def page_source(environment: Any, name: str) -> tuple[str, str | None, Callable[[], bool] | None]:
    """Gradio's template of the page with this app's head: links are previewed as "Gradio" else."""
    source, *rest = _get_source(environment, name)
    source = _PREVIEW.sub("", source).replace("<head>", "<head>" + HEAD, 1)
    # Gradio asks for it at the server's root, which is another app's behind a proxy with a path.
    source = source.replace('href="/manifest.json"', 'href="manifest.json"')
    return source, *rest


def page_response(request: Any, name: str, context: dict[str, Any], **rest: Any) -> Any:
    """The page, with addresses relative to itself.

    Gradio makes them of what a proxy in front says of scheme, host and port. Where one is lost,
    the page is alive and its player, picture and downloads are dead.
    """
    config = route_utils.update_root_in_config(context["config"], HERE)
    return _respond(request=request, name=name, context={**context, "config": config}, **rest)


def root_url(request: Any, route_path: str, root_path: str | None) -> str:
    """What stands before a file's address in an answer: as in `page_response` for the page."""
    if request.method == "POST" and _is_from_the_page(request):
        return HERE
    return _get_root_url(request, route_path, root_path)


def _is_from_the_page(request: Any) -> bool:
    """Whether this server's own page asks, not another website or a program."""
    if request.headers.get("sec-fetch-site") == "same-origin":
        return True
    # Over plain http to another computer a browser sends the origin alone.
    origin = urlsplit(request.headers.get("origin", "")).hostname
    hosts = (request.headers.get(name, "") for name in ("host", "x-forwarded-host"))
    return bool(origin) and origin in {_hostname(host) for host in hosts}


def _hostname(host: str) -> str | None:
    return urlsplit(f"//{host.partition(',')[0].strip()}").hostname


def say_why(page: gr.Blocks) -> None:
    """Has calls that are refused before they reach a handler told why, which Gradio keeps secret.

    With `show_error` it would tell, and so it would of every other error.
    """
    take_in = page.preprocess_data

    async def told(block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> Any:
        wanted = len(block_fn.inputs)
        if len(inputs) != wanted:
            raise _refusal(f"{wanted} values are expected, and {len(inputs)} came")
        try:
            return await take_in(block_fn, inputs, *rest, **named)
        except gr.Error:
            raise
        except InvalidPathError as error:
            raise _refusal("A file is uploaded first, a path on the server is not taken") from error
        except ValueError as error:  # a value of another kind than the parameter's
            raise _refusal(_what_is_wrong(block_fn, inputs)) from error

    page.preprocess_data = told  # type: ignore[method-assign]


def _refusal(why: str) -> gr.Error:
    return gr.Error(f"{why}: see “Use via API” on the page.", print_exception=False)


def _what_is_wrong(block_fn: Any, inputs: list[Any]) -> str:
    for component, value in zip(block_fn.inputs, inputs, strict=True):
        if isinstance(component, gr.Audio) and value is not None and not _is_file(value):
            return (
                f"{component.label} must be a file, as gradio_client.handle_file gives it, or as "
                '{"path": …, "meta": {"_type": "gradio.FileData"}} of an upload'
            )
    return "A value could not be taken"


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.get("meta") == {"_type": "gradio.FileData"}
