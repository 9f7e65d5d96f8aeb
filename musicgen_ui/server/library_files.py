"""Takes of the library as files to download, one or several, of every kind.

`GET /takes/NAME.ENDING` makes the file when it is asked for, with the take's title and settings in
its tags; `bars=8` makes a loop of it, `fade_s=3` an ending. `GET /takes.zip?name=…&ending=.mp3`
makes an archive. Both are there only where the library is its user's alone.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from musicgen_ui import takes
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.audio.export import Shape
from musicgen_ui.errors import RequestError
from musicgen_ui.library import Library

MOST_NAMES = 200  # in an archive
TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg"}
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def routes(library: Library, temporary: Path) -> list[Route]:
    """The routes; archives are written to `temporary` and deleted once they are sent."""

    async def sound(request: Request) -> Response:
        file = Path(request.path_params["file"])
        query = request.query_params
        try:
            shape = Shape(int(query.get("bars", "0")), float(query.get("fade_s", "0")))
            content = await to_thread.run_sync(exported, library, file.stem, file.suffix, shape)
        except RequestError as error:
            return _refused(404, str(error))
        except ValueError:
            return _refused(400, "bars is a whole number, fade_s a number of seconds.")
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(file.name)}"}
        return Response(content, 200, HEADERS | headers, TYPES.get(file.suffix, "audio/ogg"))

    async def archive(request: Request) -> Response:
        names = request.query_params.getlist("name")[:MOST_NAMES]
        ending = request.query_params.get("ending", ".wav")
        target = temporary / f"{secrets.token_hex(8)}.zip"
        try:
            if ending not in ENDINGS or not names:
                raise RequestError("Name takes, and one of " + ", ".join(ENDINGS) + ".")
            await to_thread.run_sync(library.write_zip, names, ending, target)
        except RequestError as error:
            return _refused(404, str(error))
        done = BackgroundTask(target.unlink, missing_ok=True)
        return FileResponse(target, 200, HEADERS, filename="takes.zip", background=done)

    return [Route("/takes.zip", archive), Route("/takes/{file}", sound)]


def exported(library: Library, name: str, ending: str, shape: Shape) -> bytes:
    """A take of the library as a file of some kind and shape.

    Raises:
        RequestError: there is no such take or kind, or the take cannot have the shape.
    """
    if ending not in ENDINGS:
        raise RequestError("A take is one of these files: " + ", ".join(ENDINGS) + ".")
    card = library.card(name)
    return takes.export_file(card.sound, ending, shape, title=card.title)


def _refused(status: int, sentence: str) -> Response:
    return PlainTextResponse(f"{sentence}\n", status, HEADERS)
