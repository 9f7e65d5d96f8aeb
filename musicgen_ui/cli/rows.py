"""A file of requests: what each row asks for, and the name that its takes will have.

A row is any set of the request's fields; what it leaves out is the command's. A take's name holds
the row's line, its prompt and a digest of all that was asked, the clips' content included. So a
finished row is known by its takes, wherever in the file it stands meanwhile, and a row that was
edited is another row.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musicgen_ui import files, takes
from musicgen_ui.audio import load
from musicgen_ui.audio.clip import Clip
from musicgen_ui.cli.generate import TABLES, table_in
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest

JSON_LINES = (".jsonl", ".ndjson", ".json")
# For a clip that is not read yet: neither short nor silent, whatever that one may turn out to be.
STAND_IN = Clip(np.ones((1, 1000), np.float32), 1)


@dataclass(frozen=True)
class Row:
    """A row of the file."""

    line: int
    values: Mapping[str, object]  # the fields that it names
    fault: str = ""  # a sentence, where it cannot be understood


@dataclass(frozen=True, eq=False)
class Piece:
    """One job: a variation of a row, or all of them where the best are kept."""

    line: int
    names: tuple[str, ...]  # of its takes, without their endings
    values: Mapping[str, object]  # what was asked for, with a seed; the rest is the checkpoint's
    clips: Mapping[str, Path]

    @functools.cached_property
    def request(self) -> GenerationRequest:
        """The request as far as it is known without the checkpoint and with clips unread."""
        return GenerationRequest.parse({**self.values, **dict.fromkeys(self.clips, STAND_IN)})

    @property
    def asked(self) -> str:
        """The name of its last take without the line: what tells that it is finished, wherever its
        row stands now.
        """
        return self.names[-1].partition("-")[2]


def read(file: Path) -> list[Row]:
    """The rows of a file: .csv, .jsonl (an object a line), else text with a prompt a line.

    Raises:
        RequestError: there is no such file, it is not text, or its columns are not settings.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise RequestError(f"The batch {file} cannot be read: {reason}.") from error
    kind = file.suffix.lower()
    rows = list(_csv(text) if kind == ".csv" else _lines(text, kind in JSON_LINES))
    if not rows:
        raise RequestError(f"The batch {file} is empty: write a prompt a line.")
    return rows


def _lines(text: str, as_json: bool) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(number, line) if as_json else Row(number, {"prompt": line})


def _object(number: int, line: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return Row(number, {name: value for name, value in values.items() if value is not None})
    return Row(number, {}, 'A row is a JSON object on one line, such as {"prompt": "slow piano"}.')


def _csv(text: str) -> Iterator[Row]:
    head = text.partition("\n")[0]
    table = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    try:
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        for name in table.fieldnames:
            _check_name(name)
        for cells in table:
            if cells.pop(None, None):
                yield Row(table.line_num, {}, "The row has more cells than there are columns.")
            else:
                yield Row(table.line_num, {name: text for name, text in cells.items() if text})
    except csv.Error as error:
        raise RequestError(f"The batch's CSV is broken near line {table.line_num}.") from error


def _check_name(name: str) -> None:
    if name not in FIELDS:
        raise RequestError(f"“{name[:40]}” is not a setting: choose among {', '.join(FIELDS)}.")


class Pieces:
    """Turns rows into pieces.

    Args:
        defaults: fields for rows that leave them out; clips are paths.
        folder: where a row's paths start.
    """

    def __init__(self, defaults: Mapping[str, object], folder: Path) -> None:
        self.defaults = {name: value for name, value in defaults.items() if value is not None}
        for name in set(TABLES) & set(self.defaults):
            self.defaults[name] = table_in(name, defaults[name], Path())
        self.folder = folder
        self._asked: Counter[str] = Counter()

    def of(self, row: Row) -> list[Piece]:
        """The pieces of a row: one a variation, or a single one where the best are kept.

        Raises:
            RequestError: the row cannot be run.
        """
        if row.fault:
            raise RequestError(row.fault)
        for name in row.values:
            _check_name(name)
        clips = dict(self._clips(row))
        values = {n: v for n, v in {**self.defaults, **row.values}.items() if n not in CLIP_FIELDS}
        for name in TABLES:
            values[name] = table_in(name, values.get(name), self.folder)
        request = GenerationRequest.parse({**values, **dict.fromkeys(clips, STAND_IN)})
        asked = {n: v for n, v in request.settings().items() if values.get(n) is not None}
        name = f"{row.line:04d}-{takes.slug(request.prompt) or 'untitled'}-"
        name += self._digest(asked, clips)
        seeded, count = request.with_seed(), request.takes
        names = [f"{name}-{index + 1}" for index in range(count)] if count > 1 else [name]
        if request.keep:
            return [Piece(row.line, tuple(names), asked | {"seed": seeded.seed}, clips)]
        return [
            Piece(row.line, (each,), asked | {"seed": one.seed, "variations": 1}, clips)
            for each, one in zip(names, map(seeded.variation, range(count)), strict=True)
        ]

    def _clips(self, row: Row) -> Iterator[tuple[str, Path]]:
        for name in CLIP_FIELDS:
            text = row.values.get(name, self.defaults.get(name))
            if not text:
                continue
            if not isinstance(text, str) or "\0" in text:
                raise RequestError(f"{FIELDS[name].metadata['label']} must be a file's path.", name)
            folder = self.folder if name in row.values else Path()
            path = folder / files.expanded(text)
            if not load.is_file(path):
                raise RequestError(f"There is no file {text[:80]!r}: choose another.", name)
            yield name, path

    def _digest(self, asked: Mapping[str, object], clips: Mapping[str, Path]) -> str:
        contents = {name: _content(path) for name, path in clips.items()}
        text = json.dumps({**asked, **contents}, sort_keys=True, default=str)
        self._asked[text] += 1  # the same row again is another take
        return hashlib.sha256(f"{text}{self._asked[text]}".encode()).hexdigest()[:8]


@functools.cache
def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{path.name} cannot be read: {error.strerror}.") from error
