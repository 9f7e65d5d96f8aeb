"""How far a page has played a live piece: `POST /jobs/{id}/played` with samples and underruns.

As for the job's sound (`server.audio_stream`), the request carries the Gradio session of the page
in the header field `x-session`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from musicgen_ui.backends.admission import AdmittedJob

BODY_BYTES = 200
WRONG = "samples and underruns are whole numbers.\n"


def route(find: Callable[[str, str], AdmittedJob | None]) -> Route:
    """Where a page says what it has played; `find` gives a job to its owner alone."""

    async def played(request: Request) -> Response:
        job = find(request.path_params["id"], request.headers.get("x-session", ""))
        if job is None:
            return PlainTextResponse("Not found.\n", 404)
        try:
            body = json.loads((await request.body())[:BODY_BYTES])
            samples, underruns = int(body["samples"]), int(body["underruns"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return PlainTextResponse(WRONG, 400)
        if min(samples, underruns) < 0:
            return PlainTextResponse(WRONG, 400)
        job.played(samples, underruns)
        return Response(status_code=204)

    return Route("/jobs/{id}/played", played, methods=["POST"])
