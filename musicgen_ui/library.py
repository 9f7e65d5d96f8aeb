"""The takes that are kept: found, listed, renamed, starred, deleted and brought back.

A take is a sound with settings in it and, beside it, a sidecar under the same name. What the user
edits, title and star, goes into the sidecar; deleted takes lie in a folder of their own for some
days. So the folder holds all there is, and several servers may use it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from musicgen_ui import files, sidecar, takes
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.errors import RequestError
from musicgen_ui.library_index import PAGE, Card, Index, Page, index_file
from musicgen_ui.remote_folder import TRASH, local_folder
from musicgen_ui.sidecar import Sidecar

FOLDER = "MusicGen UI"  # in the user's music folder
TEMPORARY = "temporary"
TRASH_DAYS = 30
TITLE_CHARACTERS = 200
TOKEN = re.compile(r"(\d+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Branch:
    """A take in the tree of those that were made from each other."""

    card: Card
    depth: int  # 0 is the first one


def kept_folder(named: str, host: str, public: bool) -> Path | None:
    """Where a server keeps its takes for good; None is a temporary folder.

    A folder that is named counts, "temporary" is none, and a URL means its mirror. Without a name,
    takes are kept where a server is its user's alone: on an address of this computer, and shown to
    nobody else.

    Args:
        named: the setting.
        host: the address that the server listens on.
        public: others reach it all the same, through a proxy, a shared link or as a Space.
    """
    if named:
        return None if named == TEMPORARY else local_folder(named)
    return home_folder() if _is_loopback(host) and not public else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def home_folder() -> Path | None:
    """Where takes are kept on a computer of one's own; None if that cannot be written to."""
    folder = Path(platformdirs.user_music_dir()) / FOLDER
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


class Library:
    """The takes of a folder. Its methods may be called from any thread.

    Args:
        folder: of the takes; it is made.
        index: the file of the index, by default one in the user's cache.
    """

    def __init__(self, folder: Path, index: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._index = Index(self.folder, index or index_file(self.folder))
        self.empty_trash()

    def close(self) -> None:
        """Closes the index."""
        self._index.close()

    def refresh(self) -> None:
        """Brings the index up to date with files that others changed, before it is asked again."""
        self._index.refresh()

    def refresh_beside(self) -> None:
        """Does so on a thread of its own, so that the first page need not wait for it."""
        self._index.refresh_beside()

    def page(
        self,
        words: str = "",
        *,
        starred: bool = False,
        model: str = "",
        start: int = 0,
        count: int = PAGE,
    ) -> Page:
        """See `Index.page`."""
        return self._index.page(words, starred=starred, model=model, start=start, count=count)

    def models(self) -> list[str]:
        """The checkpoints that takes were made with, by name."""
        return self._index.models()

    def card(self, name: str) -> Card:
        """The take of that name.

        Raises:
            RequestError: there is none.
        """
        if found := self._index.find("name", name):
            return found[0]
        raise RequestError("This take is not there any more: it was moved or deleted.")

    def tree(self, name: str) -> list[Branch]:
        """The takes that were made from each other, this one among them: each before what was
        made from it, the oldest first.
        """
        first = self.card(name)
        seen = {first.id}
        while first.parent and first.parent not in seen:
            if not (found := self._index.find("id", first.parent)):
                break
            first = found[0]
            seen.add(first.id)
        branches: list[Branch] = []
        waiting, reached = [Branch(first, 0)], {first.name}
        while waiting:
            branches.append(branch := waiting.pop())
            made = self._index.find("parent", branch.card.id) if branch.card.id else []
            for card in reversed([card for card in made if card.name not in reached]):
                reached.add(card.name)
                waiting.append(Branch(card, branch.depth + 1))
        return branches

    def sidecar(self, name: str) -> Sidecar:
        """A take's codes, waveform and loudness; measured now where its files have none.

        Raises:
            RequestError: there is no such take, or its sound cannot be read.
        """
        card = self.card(name)
        path = sidecar.beside(card.sound)
        data = sidecar.read(path)
        if data and data.waveform:
            return data
        kept = takes.load(card.sound)
        data = sidecar.of_clip(kept.clip, kept.settings, None, card.made_at)
        with (
            suppress(OSError),
            self._index.changing(),
        ):  # a folder that is full can still be listened to
            sidecar.write(path, data)
            self._index.read_again([name])
        return data

    def rename(self, name: str, title: str) -> Card:
        """Gives a take another title; an empty one is its prompt. Its files keep their names.

        Raises:
            RequestError: there is no such take, or the folder cannot be written to.
        """
        title = " ".join(title.split())[:TITLE_CHARACTERS]
        return self._edit(name, lambda data: replace(data, title=title))

    def star(self, name: str, starred: bool = True) -> Card:
        """Marks a take as one of the best, or no longer.

        Raises:
            RequestError: there is no such take, or the folder cannot be written to.
        """
        return self._edit(name, lambda data: replace(data, starred=starred))

    def _edit(self, name: str, change: Callable[[Sidecar], Sidecar]) -> Card:
        self.sidecar(name)
        path = self.folder / f"{name}{sidecar.ENDING}"
        try:
            with self._index.changing():
                if data := sidecar.read(path):
                    sidecar.write(path, change(data))
                    self._index.read_again([name])
        except OSError as error:
            raise _refused(error) from error
        return self.card(name)

    def delete(self, names: Sequence[str]) -> str:
        """Moves takes to the trash; returns what `restore` wants to bring them back.

        Raises:
            RequestError: there is no such take, or the folder cannot be written to.
        """
        cards = [self.card(name) for name in names]
        token = f"{time.time_ns()}-{secrets.token_hex(4)}"
        trash = self.folder / TRASH / token
        try:
            trash.mkdir(parents=True)
            for card in cards:  # the sounds first: without one, nothing of a take is shown
                beside = [sidecar.beside(card.sound), card.sound.with_suffix(".png")]
                for path in (*card.files, *beside):
                    with suppress(FileNotFoundError):
                        path.rename(trash / path.name)
        except OSError as error:
            raise _refused(error) from error
        with suppress(OSError), self._index.changing():  # the files are what counts
            self._index.remove(card.name for card in cards)
        return token

    def restore(self, token: str) -> list[str]:
        """Brings back what `delete` moved away; returns the names, new ones where others have them.

        Raises:
            RequestError: it is not in the trash any more, or the folder cannot be written to.
        """
        trash = self.folder / TRASH / token
        if not TOKEN.fullmatch(token) or not trash.is_dir():
            raise RequestError("This is not in the trash any more: it cannot be brought back.")
        names: list[str] = []
        try:
            for old in sorted({path.stem for path in trash.iterdir()}):
                name = self._free_name(old)
                there = sorted(trash.glob(f"{_escaped(old)}.*"), key=_sounds_last)
                for path in there:
                    path.rename(self.folder / f"{name}{path.suffix}")
                names += [name] * any(path.suffix in ENDINGS for path in there)
            trash.rmdir()
        except OSError as error:
            raise _refused(error) from error
        with suppress(OSError), self._index.changing():
            self._index.read_again(names)
        return names

    def _free_name(self, name: str) -> str:
        """The name, with a number where it is taken: by whatever kind of file of a take."""
        found, number = name, 1
        while any((self.folder / f"{found}{end}").exists() for end in (*ENDINGS, sidecar.ENDING)):
            number += 1
            found = f"{name}-{number}"
        return found

    def empty_trash(self, days: float = TRASH_DAYS) -> None:
        """Deletes for good what was deleted longer ago than so many days."""
        oldest_ns = time.time_ns() - round(days * 24 * 3600 * 1e9)
        with suppress(OSError):
            for path in list((self.folder / TRASH).iterdir()):
                if (found := TOKEN.fullmatch(path.name)) and int(found[1]) <= oldest_ns:
                    files.delete(path)

    def write_zip(self, names: Sequence[str], ending: str, target: Path) -> None:
        """Writes takes as one archive, each as a file of the kind `ending` with its title.

        Raises:
            RequestError: a take is not there or cannot be such a file, or the disk is full.
        """
        cards = [self.card(name) for name in names]
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}{files.PART}")
        try:
            with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:  # sound is dense
                for card in cards:
                    content = takes.export_file(card.sound, ending, title=card.title)
                    archive.writestr(f"{card.name}{ending}", content)
            part.replace(target)
        except OSError as error:
            raise _refused(error) from error
        finally:
            part.unlink(missing_ok=True)


def _sounds_last(path: Path) -> bool:
    return path.suffix in ENDINGS


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _refused(error: OSError) -> RequestError:
    return RequestError(
        f"The folder of takes does not take this change: {error.strerror or error}. Nothing was "
        "lost; make room or let it be written to, and try again."
    )
