"""Takes in object storage: two servers with a mirror each.

With a server that speaks S3 too: `python -m pytest -m long tests/test_remote_folder.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from musicgen_ui import remote_folder
from musicgen_ui.errors import RequestError
from musicgen_ui.library import Library, kept_folder
from musicgen_ui.remote_folder import RemoteFolder
from musicgen_ui.takes import save
from tests.helpers.local import wait_for
from tests.helpers.object_storage import needs_s3, s3_server
from tests.helpers.takes import finished


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["memory", pytest.param("s3", marks=[needs_s3, pytest.mark.long])])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Storage without anything in it."""
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3").items():
            monkeypatch.setenv(name, value)
    yield f"{request.param}://takes-{uuid.uuid4()}/all"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def servers(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[RemoteFolder, Library]]]:
    """Two servers with the same storage, which look at it only when a test says so."""
    monkeypatch.setattr(remote_folder, "LOCAL_S", 1000.0)
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        library = Library(tmp_path / name, tmp_path / f"{name}.sqlite3")
        made.append((RemoteFolder(url, library.folder), library))
    yield made
    for folder, library in made:
        folder.close()
        library.close()


def synchronise(servers: list[tuple[RemoteFolder, Library]]) -> None:
    for folder, library in (*servers, *servers):
        folder.synchronise()
        library.refresh()


def sounds(library: Library) -> set[str]:
    return {path.name for path in library.folder.iterdir() if not path.name.startswith(".")}


def test_take_of_one_server_is_in_the_library_of_the_other(servers):
    (_, here), (_, there) = servers
    save(finished(seed=4), here.folder)
    synchronise(servers)
    (card,) = there.page().cards
    assert card.settings["seed"] == 4 and sounds(here) == sounds(there)
    assert card.sound.read_bytes() == (here.folder / card.sound.name).read_bytes()
    here.rename(card.name, "Waltz")
    there.star(card.name)  # both change it: one of them stays, whole
    here.star(card.name)
    synchronise(servers)
    titles = [library.page().cards[0].title for library in (here, there)]
    assert titles[0] == titles[1] and here.card(card.name).starred


def test_what_is_the_same_is_not_copied_again(servers, monkeypatch):
    (folder, here), _ = servers
    save(finished(), here.folder)
    synchronise(servers)

    def refuse(*_: object) -> None:
        raise AssertionError

    for way in ("put_file", "cat_file"):
        monkeypatch.setattr(folder._storage, way, refuse)
    synchronise(servers)


def test_deleted_take_goes_to_the_trash_of_the_other_server(servers):
    (_, here), (_, there) = servers
    save(finished(), here.folder)
    synchronise(servers)
    (card,) = here.page().cards
    token = here.delete([card.name])
    synchronise(servers)
    assert (
        not there.page().cards and not sounds(there) and list(there.folder.glob(".trash/*/*.wav"))
    )
    here.restore(token)
    synchronise(servers)
    assert there.page().cards and sounds(here) == sounds(there)


def test_file_that_vanished_from_a_mirror_comes_back(servers):
    (_, here), _ = servers
    take = save(finished(), here.folder)
    synchronise(servers)
    take.wav.unlink()  # by nobody's wish: it is not in the trash
    synchronise(servers)
    assert take.wav.exists()


def test_storage_that_fails_loses_nothing(servers, monkeypatch):
    (folder, here), (_, there) = servers
    save(finished(), here.folder)

    def refuse(*_: object) -> None:
        raise OSError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(folder._storage, "mv", refuse)
        folder._try()
        assert not any(".part" not in name for name in folder._storage.find(folder._path))
    synchronise(servers)
    assert there.page().cards


def test_server_copies_by_itself_and_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_folder, "LOCAL_S", 0.02)
    folder = RemoteFolder("memory://by-itself", tmp_path)
    storage = fsspec.filesystem("memory")
    (tmp_path / "a.wav").write_bytes(b"a")
    wait_for(lambda: storage.exists("/by-itself/a.wav"))
    monkeypatch.setattr(remote_folder, "LOCAL_S", 1000.0)
    (tmp_path / "b.wav").write_bytes(b"b")
    folder.close()
    assert storage.cat_file("/by-itself/b.wav") == b"b" and not folder._thread.is_alive()


def test_copying_goes_on_after_a_look_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_folder, "LOCAL_S", 0.02)
    look, failed = RemoteFolder._local, []

    def fail_once(folder: RemoteFolder) -> dict[str, str]:
        if not failed:
            failed.append(folder)
            raise OSError(24, "Too many open files")
        return look(folder)

    monkeypatch.setattr(RemoteFolder, "_local", fail_once)
    folder, storage = RemoteFolder("memory://after-all", tmp_path), fsspec.filesystem("memory")
    wait_for(lambda: failed)
    (tmp_path / "a.wav").write_bytes(b"a")
    wait_for(lambda: storage.exists("/after-all/a.wav"))
    folder.close()


def test_names_of_folders_and_urls(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_folder.platformdirs, "user_data_dir", lambda *_, **__: tmp_path)
    assert kept_folder("file:///takes/all%20of%20them", "0.0.0.0", True) == Path(
        "/takes/all of them"
    )
    assert kept_folder("C:/takes", "", True) == Path("C:/takes")
    mirror = kept_folder("memory://x", "", True)
    assert mirror == kept_folder("memory://x", "", True) and mirror.parent == tmp_path / "mirrors"
    assert mirror != kept_folder("memory://y", "", True)


@pytest.mark.parametrize("url", ["nothing://x", "s3a+x://y"])
def test_unknown_storage_is_a_sentence(url, tmp_path):
    with pytest.raises(RequestError, match="folder of takes"):
        RemoteFolder(url, tmp_path)
