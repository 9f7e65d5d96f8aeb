"""The index of a folder of takes: a SQLite file that holds what their files say.

It is in the user's cache and holds nothing of its own: what is missing or stale is read from the
files again, and a file that is no index is replaced. Several servers may share it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import platformdirs

from musicgen_ui import sidecar, takes
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.request import section_pairs
from musicgen_ui.take_settings import TakeSettings

PAGE = 50  # takes
SETTLED_NS = 2_000_000_000  # a folder that changed later than this may change again unnoticed
BUSY_S = 10.0  # for another server's change
VERSION = 1  # of the columns
LIGHT = (  # what is searched and sorted
    *("name", "endings", "signature", "id", "parent", "title", "starred", "model"),
    *("duration_s", "made_at", "lufs", "search"),
)
HEAVY = ("name", "settings", "overview")  # what is shown
SCHEMA = (
    "DROP TABLE IF EXISTS takes",
    "DROP TABLE IF EXISTS details",
    f"CREATE TABLE takes ({', '.join(LIGHT)}, UNIQUE (name))",
    f"CREATE TABLE details ({', '.join(HEAVY)}, UNIQUE (name))",
    "CREATE INDEX by_time ON takes (made_at DESC, name) WHERE made_at IS NOT NULL",
    "CREATE INDEX by_id ON takes (id)",
    "CREATE INDEX by_parent ON takes (parent)",
    f"PRAGMA user_version = {VERSION}",
)
A_TAKE = "made_at IS NOT NULL"  # other sounds are indexed too, so as not to be read each time

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Card:
    """A take as a list shows it."""

    name: str  # of its files, without ending
    sound: Path  # WAV where there is one
    files: tuple[Path, ...]  # every kind of sound that lies there
    id: str
    parent: str  # the id of what it was made from; empty is nothing
    title: str
    starred: bool
    model: str
    duration_s: float
    made_at: float  # seconds since 1970
    lufs: float  # NaN is not known, see `Library.sidecar`
    settings: TakeSettings
    overview: np.ndarray  # int8 [points, 2]: lowest and highest; no points are not known

    @property
    def operation(self) -> str:
        """How it came from its parent, one of `takes.Operation`; empty without one."""
        return str(self.settings.get("operation", ""))


@dataclass(frozen=True)
class Page:
    """Some of the takes that fit a filter."""

    cards: tuple[Card, ...]
    total: int  # of all that fit


def index_file(folder: Path) -> Path | None:
    """Where the index of a folder is; None where the user has no cache that can be written to."""
    digest = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    with suppress(OSError):
        cache = Path(platformdirs.user_cache_dir("musicgen-ui", appauthor=False))
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache / f"library-{digest}.sqlite3"
    return None


class Files(NamedTuple):
    """What lies in the folder of a take."""

    endings: tuple[str, ...]  # of its sounds, the best first
    signature: str  # sizes and times
    changed_s: float  # when its best sound was written


class Index:
    """What there is in a folder of takes. Its methods may be called from any thread.

    Args:
        folder: of the takes.
        file: of the index; None keeps it in memory.
    """

    def __init__(self, folder: Path, file: Path | None) -> None:
        self.folder = folder
        self._file = file
        self._lock = threading.RLock()
        self._looking = threading.Lock()
        self._seen_ns = 0  # when the folder had changed, as of the last look at all of its files
        self._closed = False
        self._connection = self._opened()

    def close(self) -> None:
        """Closes the file, after a look at the folder that is under way."""
        with self._looking, self._lock:
            self._closed = True
            self._connection.close()

    def _opened(self) -> sqlite3.Connection:
        """The index, anew where the file is none or of another version."""
        try:
            return self._connect(self._file)
        except sqlite3.OperationalError:  # locked by another server: its file stays as it is
            return self._connect(None)
        except sqlite3.DatabaseError:
            for ending in ("", "-journal"):
                with suppress(OSError):
                    Path(f"{self._file}{ending}").unlink(missing_ok=True)
        try:
            return self._connect(self._file)
        except sqlite3.Error:  # a disk where SQLite cannot lock: as long as this process lives
            return self._connect(None)

    def _connect(self, file: Path | None) -> sqlite3.Connection:
        connection = sqlite3.connect(
            file or ":memory:", timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.row_factory = sqlite3.Row
            # Not WAL: its shared memory ends every server on it when one removes a damaged index.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = OFF")  # the files are what counts
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            for statement in SCHEMA if version != VERSION else ():
                connection.execute(statement)
            connection.execute("SELECT count(*) FROM takes")
            connection.execute("COMMIT")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """The connection for a change that no other thread or server interrupts.

        Raises:
            OSError: another server keeps the file busy. The next look at the folder brings the
                index up to date.
        """
        with self._lock:
            self._transact("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._transact("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _transact(self, statement: str) -> None:
        try:
            self._connection.execute(statement)
        except sqlite3.OperationalError as error:
            raise OSError(errno.EBUSY, f"its index is in use ({error})") from error

    def _whole(self, work: Callable[[], T]) -> T:
        """What `work` gives; if the index turns out to be damaged, with a new one."""
        with self._lock:
            try:
                return work()
            except sqlite3.DatabaseError as error:
                # Another server put a new file in its place, whose tables came a moment later.
                is_new = "no such table" in str(error)
                if isinstance(error, sqlite3.OperationalError) and not is_new:
                    raise
                self._connection.close()
                if self._file and not is_new:
                    self._file.unlink(missing_ok=True)
                self._connection = self._opened()
                self._compare(_files_of_takes(self.folder))
                return work()

    def refresh(self) -> None:
        """Brings the index up to date with the files."""
        with self._looking:
            if self._closed:
                return
            changed_ns = self.folder.stat().st_mtime_ns
            settled = time.time_ns() - changed_ns > SETTLED_NS
            there = _files_of_takes(self.folder)
            self._whole(lambda: self._compare(there))
            self._seen_ns = changed_ns if settled else -1

    def _compare(self, there: dict[str, Files]) -> None:
        asked = "SELECT name, signature FROM takes"
        indexed = dict(self._connection.execute(asked).fetchall())
        changed = [n for n, of in there.items() if indexed.get(n) != of.signature]
        gone = [name for name in indexed if name not in there]
        if changed or gone:
            rows = [self._row(name, there[name]) for name in changed]
            with self.changing():
                self._put(rows)
                self.remove(gone)

    def _follow(self) -> None:
        """Looks at the files if the folder has changed: the first time now, later beside the work,
        since what this server changes is in the index already.
        """
        if not self._seen_ns:
            self.refresh()
        elif self.folder.stat().st_mtime_ns != self._seen_ns and not self._looking.locked():
            self.refresh_beside()

    def refresh_beside(self) -> None:
        """Does so on a thread of its own; `close` waits for it."""

        def refresh() -> None:
            try:
                self.refresh()
            except (OSError, sqlite3.Error) as error:  # the next look may succeed
                log.warning("The takes in %s were not looked at: %s", self.folder, error)

        threading.Thread(target=refresh, daemon=True).start()

    def read_again(self, names: Iterable[str]) -> None:
        """Brings the rows of these takes up to date, without a look at the others' files."""
        for name in names:
            if of := _files_of_takes(self.folder, name).get(name):
                self._put([self._row(name, of)])

    def remove(self, names: Iterable[str]) -> None:
        """Forgets these takes."""
        for name in names:
            for table in ("takes", "details"):
                self._connection.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def _put(self, rows: Iterable[Mapping[str, object]]) -> None:
        for row in rows:
            for table, columns in (("takes", LIGHT), ("details", HEAVY)):
                marks = ", ".join("?" * len(columns))
                values = [row.get(column) for column in columns]
                self._connection.execute(f"REPLACE INTO {table} VALUES ({marks})", values)

    def _row(self, name: str, of: Files) -> dict[str, object]:
        """A take's row; one without settings for a sound that was not made here."""
        sound = self.folder / f"{name}{of.endings[0]}"
        data = sidecar.read(sidecar.beside(sound), whole=False)
        settings = takes.checked(data.settings) if data else takes.read_settings(sound)
        if settings is None:
            return {"name": name, "signature": of.signature}
        title = data.title if data else ""
        words = [title, settings["prompt"], name, settings["checkpoint"], settings.get("key", "")]
        words += [text for _, text in section_pairs(settings)]
        return {
            "name": name,
            "endings": " ".join(of.endings),
            "signature": of.signature,
            "id": settings.get("id", ""),
            "parent": settings.get("parent", ""),
            "title": title or " ".join(settings["prompt"].split()) or "Without words",
            "starred": int(data.starred) if data else 0,
            "model": settings["checkpoint"],
            "duration_s": settings.get("prompt_s", 0.0) + settings.get("made_s", 0.0),
            "made_at": data.made_at if data else of.changed_s,
            "lufs": data.lufs if data else None,
            "settings": json.dumps(settings, ensure_ascii=False),
            "overview": data.overview.tobytes() if data else b"",
            "search": "\n".join(words).casefold(),
        }

    def page(
        self,
        words: str = "",
        *,
        starred: bool = False,
        model: str = "",
        start: int = 0,
        count: int = PAGE,
    ) -> Page:
        """The takes from number `start` on, the newest first.

        Args:
            words: all of them must be in the title, prompt, sections, key, model or file name.
            starred: only those with a star.
            model: only those of this checkpoint.
            start: how many are passed over.
            count: how many there are at most.
        """
        where, values = [A_TAKE], list[str]()
        for word in words.casefold().split():
            where.append("instr(search, ?)")
            values.append(word)
        if starred:
            where.append("starred")
        if model:
            where.append("model = ?")
            values.append(model)
        fits = " AND ".join(where)

        def read() -> Page:
            ask = self._connection.execute
            found = ask(f"SELECT name FROM takes WHERE {fits} ORDER BY made_at DESC, name", values)
            names = [row[0] for row in found]
            shown = names[start : start + count]
            marks = ", ".join("?" * len(shown))
            of_names = f"SELECT * FROM takes NATURAL JOIN details WHERE name IN ({marks})"
            rows = {row["name"]: row for row in ask(of_names, shown)}
            cards = (self._card(rows[name]) for name in shown if name in rows)  # not gone by now
            return Page(tuple(cards), len(names))

        self._follow()
        return self._whole(read)

    def models(self) -> list[str]:
        """The checkpoints that takes were made with, by name."""
        ask = f"SELECT DISTINCT model FROM takes WHERE {A_TAKE} ORDER BY model"
        self._follow()
        return self._whole(lambda: [row[0] for row in self._connection.execute(ask)])

    def find(self, column: str, value: str) -> list[Card]:
        """The takes with this name, id or parent, the oldest first."""
        ask = (
            f"SELECT * FROM takes NATURAL JOIN details WHERE {column} = ? AND {A_TAKE} "
            "ORDER BY made_at, name"
        )

        def read() -> list[Card]:
            return [self._card(row) for row in self._connection.execute(ask, (value,))]

        self._follow()
        return self._whole(read)

    def _card(self, row: sqlite3.Row) -> Card:
        sounds = tuple(self.folder / f"{row['name']}{end}" for end in row["endings"].split())
        return Card(
            name=row["name"],
            sound=sounds[0],
            files=sounds,
            id=row["id"],
            parent=row["parent"],
            title=row["title"],
            starred=bool(row["starred"]),
            model=row["model"],
            duration_s=row["duration_s"],
            made_at=row["made_at"],
            lufs=float("nan") if row["lufs"] is None else row["lufs"],
            settings=json.loads(row["settings"]),
            overview=np.frombuffer(row["overview"], np.int8).reshape(-1, 2),
        )


def _files_of_takes(folder: Path, name: str = "") -> dict[str, Files]:
    """The files of every take in a folder, or of `name` alone, by its name."""
    kinds = (*ENDINGS, sidecar.ENDING)
    entries: Iterable[Path | os.DirEntry[str]] = [folder / f"{name}{ending}" for ending in kinds]
    if not name:
        entries = os.scandir(folder)
    found: dict[str, dict[str, os.stat_result]] = {}
    for entry in entries:
        stem, dot, kind = entry.name.rpartition(".")
        if (ending := dot + kind) in kinds and not stem.startswith("."):
            with suppress(OSError):  # not there, or gone by now
                found.setdefault(stem, {})[ending] = entry.stat()
    takes_found: dict[str, Files] = {}
    for stem, about in found.items():
        if sounds := tuple(ending for ending in ENDINGS if ending in about):
            facts = (f"{e}:{about[e].st_size}:{about[e].st_mtime_ns}" for e in kinds if e in about)
            takes_found[stem] = Files(sounds, " ".join(facts), about[sounds[0]].st_mtime)
    return takes_found
