"""The sound of a job over HTTP, from any sample on, while it is being made and afterwards.

`GET /jobs/{id}/audio?after=SAMPLES` answers with the job's new music from that sample (of each
channel) on: 16-bit little-endian PCM, channels interleaved, rounded as in the take's files. The
request carries the Gradio session of the page in the header field `x-session`; the password, where
one is set, has been checked before. The answer's header fields say `x-sample-rate`, `x-channels`
and `x-start`.

A response ends after `RESPONSE_S` at the latest, and the client asks again from where it stands
until it gets 204. So a proxy that holds whole responses back delays the sound by no more than that,
a stream never takes one of a browser's six connections for long, and a connection that breaks is
nothing special.

With `format=opus` the answer is one Ogg Opus stream instead, from the sample on to the end of the
music, for players other than the page's: 160 instead of 1,024 kbit/s in stereo at 32 kHz.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from enum import StrEnum
from typing import Protocol

import numpy as np
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from musicgen_ui.audio import opus_stream
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import Chunk, Event, Failed, Finished

RESPONSE_S = 2.0
# 202: nothing yet, ask again. 204: nothing follows.
NOT_YET, COMPLETE = 202, 204
HEADERS = {
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",  # nginx and its relatives pass each piece on as it comes
    "x-content-type-options": "nosniff",
}
WRONG = "after and variation are whole numbers, format is pcm or opus.\n"


class Encoding(StrEnum):
    """What the sound is sent as."""

    PCM = "pcm"
    OPUS = "opus"


class HasEvents(Protocol):
    """What a job is here."""

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """See `engine.protocol.Job`."""
        ...


Find = Callable[[str, str], HasEvents | None]  # job id, session → the job, if it is the session's


def route(find: Find) -> Route:
    """The route; `find` gives a job to its owner alone."""

    async def audio(request: Request) -> Response:
        job = find(request.path_params["id"], request.headers.get("x-session", ""))
        if job is None:
            return PlainTextResponse("Not found.\n", 404, HEADERS)
        try:
            after = _number(request.query_params.get("after", "0"))
            variation = _number(request.query_params.get("variation", "0"))
            encoding = Encoding(request.query_params.get("format", Encoding.PCM))
        except ValueError:
            return PlainTextResponse(WRONG, 400, HEADERS)
        clips = _clips_after(job, variation, after)
        if encoding is Encoding.OPUS:
            fields = HEADERS | {"x-start": str(after)}
            return StreamingResponse(_opus(clips), 200, fields, opus_stream.MEDIA_TYPE)
        return await _response(clips, after)

    return Route("/jobs/{id}/audio", audio, methods=["GET"])


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(text)
    return int(text)


async def _response(clips: AsyncIterator[Clip], after: int) -> Response:
    end_s = time.monotonic() + RESPONSE_S
    try:
        first = await asyncio.wait_for(anext(clips), RESPONSE_S)
    except TimeoutError:
        return Response(status_code=NOT_YET, headers=HEADERS)
    except StopAsyncIteration:
        return Response(status_code=COMPLETE, headers=HEADERS)

    async def body() -> AsyncIterator[bytes]:
        clip = first
        try:
            while True:
                yield pcm16(clip)
                clip = await asyncio.wait_for(anext(clips), max(end_s - time.monotonic(), 0))
        except (TimeoutError, StopAsyncIteration):
            return

    about = {
        "x-sample-rate": str(first.sampling_rate),
        "x-channels": str(first.channels),
        "x-start": str(after),
    }
    return StreamingResponse(body(), 200, HEADERS | about, "application/octet-stream")


async def _opus(clips: AsyncIterator[Clip]) -> AsyncIterator[bytes]:
    """The clips as Ogg Opus."""
    stream: opus_stream.OpusStream | None = None
    async for clip in clips:
        stream = stream or opus_stream.OpusStream(clip.sampling_rate, clip.channels)
        if pages := await to_thread.run_sync(stream.write, clip):
            yield pages
    if stream:
        yield await to_thread.run_sync(stream.close)


async def _clips_after(job: HasEvents, variation: int, after: int) -> AsyncIterator[Clip]:
    """A variation's new music from sample `after` on, until it is finished or has failed."""
    async with aclosing(job.events()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Failed):
                return
            if not isinstance(event, (Chunk, Finished)) or event.variation != variation:
                continue
            if isinstance(event, Finished):
                return
            # Not counted: of an endless piece the oldest chunks are gone.
            skipped = max(after - event.start_sample, 0)
            if skipped < event.clip.samples.shape[1]:
                yield Clip(event.clip.samples[:, skipped:], event.clip.sampling_rate)


def pcm16(clip: Clip) -> bytes:
    """Samples as little-endian int16, interleaved; rounded as `audio.clip.encode` does."""
    samples = np.nan_to_num(clip.samples) * 32768.0
    whole: np.ndarray = np.clip(np.rint(samples), -32768, 32767).astype("<i2")
    return whole.T.tobytes()
