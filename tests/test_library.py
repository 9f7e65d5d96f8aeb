from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import soundfile

from musicgen_ui import library as library_module
from musicgen_ui import retake, sidecar, takes
from musicgen_ui.audio import waveform
from musicgen_ui.errors import RequestError
from musicgen_ui.library import TRASH, Library
from musicgen_ui.ui.library_panel import NO_STATE, PAGE, LibraryView
from musicgen_ui.ui.request_form import Restoring
from tests.helpers import many_takes
from tests.helpers.local import wait_for
from tests.helpers.takes import finished, with_codes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "takes"


@pytest.fixture
def library(folder, tmp_path):
    library = Library(folder, tmp_path / "index.sqlite3")
    yield library
    library.close()


def save(folder, seconds=0.5, made_at=None, **settings):
    """A take's name."""
    take = takes.save(with_codes(finished(seconds=seconds, **settings)), folder)
    if made_at is not None:
        path = sidecar.beside(take.wav)
        sidecar.write(path, dataclasses.replace(sidecar.read(path), made_at=made_at))
    return take.wav.stem


def names(page):
    return [card.name for card in page.cards]


def test_a_card_says_what_its_take_is(folder, library):
    name = save(folder, prompt="warm lo-fi", seconds=2.0, channels=2, seed=5)
    (card,) = library.page().cards
    assert (card.name, card.title, card.model) == (name, "warm lo-fi", "bundled")
    assert (card.starred, card.duration_s, card.parent, card.operation) == (False, 2, "", "")
    assert abs(card.made_at - time.time()) < 60
    assert [file.suffix for file in card.files] == [".wav", ".flac"] and card.sound == card.files[0]
    assert card.settings == takes.read_settings(card.sound)
    clip = takes.load(card.sound).clip
    assert np.array_equal(card.overview, list(waveform.levels(clip).values())[-1])
    assert library.sidecar(name).lufs == pytest.approx(card.lufs)


def test_pages_hold_the_newest_first_and_filter(folder, library):
    made = [
        save(folder, made_at=1e9 + i, prompt=f"{'Jazz' if i % 2 else 'rock'} number {i}", seed=i)
        for i in range(6)
    ]
    other = save(folder, made_at=2e9, prompt="Straße", checkpoint="facebook/musicgen-small")
    newest = [other, *made[::-1]]
    assert names(library.page()) == newest
    assert names(library.page(start=2, count=3)) == newest[2:5]
    assert library.page(start=2, count=3).total == 7
    assert names(library.page("jazz NUMBER")) == [made[5], made[3], made[1]]
    assert names(library.page("number jazz 3")) == [made[3]]
    assert names(library.page("STRASSE")) == [other] and not library.page("%").cards
    assert names(library.page(model="facebook/musicgen-small")) == [other]
    assert library.models() == ["bundled", "facebook/musicgen-small"]
    library.star(made[1])
    assert names(library.page(starred=True)) == [made[1]]
    assert names(library.page("jazz", starred=True, model="bundled")) == [made[1]]


def test_title_and_star_are_kept_in_the_files(folder, library, tmp_path):
    name = save(folder, prompt="jazz")
    library.star(name)
    assert library.rename(name, "  My\nfavourite ").title == "My favourite"
    elsewhere = Library(folder, tmp_path / "another index")
    card = elsewhere.card(name)
    assert (card.title, card.starred) == ("My favourite", True)
    assert names(elsewhere.page("favourite")) == [name]
    assert elsewhere.rename(name, "").title == "jazz"
    assert not elsewhere.star(name, False).starred
    library.refresh()
    assert (library.card(name).title, library.card(name).starred) == ("jazz", False)
    assert takes.load(library.card(name).sound).clip.codes is not None
    elsewhere.close()


def test_a_take_from_before_there_were_sidecars_is_kept_like_any_other(folder, library):
    name = save(folder, seconds=1.0, prompt="old one", made_at=5)
    sound = folder / f"{name}.wav"
    sidecar.beside(sound).unlink()
    os.utime(sound, (1e9, 1e9))
    library.refresh()
    card = library.card(name)
    assert (card.title, card.made_at) == ("old one", 1e9)
    assert not len(card.overview) and np.isnan(card.lufs)
    assert library.star(name).starred
    card = library.card(name)
    assert len(card.overview) and card.lufs < 0 and card.made_at == 1e9


def test_sounds_that_were_not_made_here_are_not_listed(folder, library):
    save(folder)
    soundfile.write(folder / "song.wav", np.zeros(100), 16_000)
    (folder / "broken.flac").write_bytes(b"fLaC")
    (folder / "notes.txt").write_text("hello")
    (folder / "x.safetensors").write_bytes(b"\xff" * 20)
    assert library.page().total == 1


def test_an_index_that_is_lost_or_damaged_is_made_again(folder, library, tmp_path):
    made = {save(folder, seed=seed) for seed in range(3)}
    index = tmp_path / "index.sqlite3"
    assert library.page().total == 3
    for spoil in (index.unlink, lambda: index.write_bytes(b"no index" * 1000)):
        library.close()
        for rest in tmp_path.glob("index.sqlite3-*"):
            rest.unlink()
        spoil()
        library = Library(folder, index)
        assert set(names(library.page())) == made
    library.close()


def test_files_that_come_change_and_go_are_noticed(folder, library):
    name = save(folder, prompt="first")
    assert library.page().total == 1
    shutil.copy(folder / f"{name}.flac", folder / "copied in.flac")
    library.refresh()
    assert set(names(library.page())) == {name, "copied in"}
    takes.write(finished(prompt="another"), folder / "copied in.flac")
    library.refresh()
    assert library.card("copied in").title == "another"
    for file in folder.glob(f"{name}.*"):
        file.unlink()
    library.refresh()
    assert names(library.page()) == ["copied in"]
    with pytest.raises(RequestError, match="not there any more"):
        library.card(name)


def test_a_change_by_another_program_shows_without_being_asked_for(folder, library):
    assert library.page().total == 0
    save(folder)
    end_s = time.monotonic() + 20
    while library.page().total == 0 and time.monotonic() < end_s:
        time.sleep(0.01)
    assert library.page().total == 1


def test_a_take_that_was_saved_here_is_there_at_once(folder, library):
    assert library.page().total == 0
    name = save(folder)
    library.refresh()
    assert library.card(name).name == name and library.page().total == 1


def test_files_that_have_not_changed_are_not_read_again(folder, library, tmp_path, monkeypatch):
    for seed in range(3):
        save(folder, seed=seed)
    library.page()
    library.close()
    monkeypatch.setattr(sidecar, "read", None)
    again = Library(folder, tmp_path / "index.sqlite3")
    assert again.page().total == 3
    again.close()


def test_the_folder_is_read_beside_the_start(folder, library, tmp_path, monkeypatch):
    name = save(folder)
    library.refresh_beside()

    def indexed():
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite3")) as index:
            return index.execute("SELECT name FROM takes").fetchall()

    wait_for(lambda: indexed() == [(name,)])
    monkeypatch.setattr(sidecar, "read", None)  # the first page reads no file again
    assert names(library.page()) == [name] and library.models() == ["bundled"]


def test_deleted_takes_come_back_whole(folder, library):
    first, second = save(folder, seed=1), save(folder, seed=2)
    (folder / f"{first}.png").write_bytes(b"picture")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    token = library.delete([first, second])
    assert library.page().total == 0
    assert [path.name for path in folder.iterdir()] == [TRASH]
    assert set(library.restore(token)) == {first, second}
    assert library.page().total == 2
    after = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert after == before
    with pytest.raises(RequestError, match="not in the trash"):
        library.restore(token)


def test_a_take_that_comes_back_takes_no_name_away(folder, library):
    name = save(folder, prompt="jazz", seed=1, level=0.1)
    deleted = (folder / f"{name}.wav").read_bytes()
    token = library.delete([name])
    assert save(folder, prompt="jazz", seed=1, level=0.2) == name
    (back,) = library.restore(token)
    assert back != name and (folder / f"{back}.wav").read_bytes() == deleted
    assert {file.suffix for file in folder.glob(f"{back}.*")} == {".wav", ".flac", ".safetensors"}
    library.refresh()
    assert library.page().total == 2


@pytest.mark.parametrize("token", ["", "..", "../..", "1-00000000/..", "0-zzzzzzzz", "/etc"])
def test_nothing_but_the_trash_is_brought_back(folder, library, token):
    with pytest.raises(RequestError, match="not in the trash"):
        library.restore(token)


def test_only_takes_of_the_library_are_deleted(folder, library, tmp_path):
    (tmp_path / "outside.wav").write_bytes(b"x")
    with pytest.raises(RequestError):
        library.delete(["../outside"])
    assert (tmp_path / "outside.wav").exists()


def test_the_trash_is_emptied_after_days(folder, library, tmp_path):
    token = library.delete([save(folder)])
    library.empty_trash()
    assert (folder / TRASH / token).exists()
    old_ns = time.time_ns() - 31 * 24 * 3600 * 10**9
    (folder / TRASH / token).rename(folder / TRASH / f"{old_ns}-00000000")
    (folder / TRASH / "mine").mkdir()
    Library(folder, tmp_path / "again").close()
    assert [path.name for path in (folder / TRASH).iterdir()] == ["mine"]


def test_several_takes_come_as_one_archive(folder, library, tmp_path):
    made = [save(folder, prompt=f"piece {seed}", seed=seed) for seed in range(2)]
    library.rename(made[0], "Best")
    library.write_zip(made, ".opus", tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.namelist() == [f"{name}.opus" for name in made]
        archive.extractall(tmp_path / "out")
    first = tmp_path / "out" / f"{made[0]}.opus"
    assert takes.read_settings(first)["prompt"] == "piece 0"
    assert soundfile.SoundFile(first).title == "Best"
    with pytest.raises(RequestError):
        library.write_zip([*made, "gone"], ".wav", tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists() and not list(tmp_path.glob(".*"))


def test_takes_that_were_made_from_each_other_are_a_tree(folder, library):
    root = save(folder, seconds=1.0, made_at=1)
    trimmed = []
    for number, (parent, end_s) in enumerate([(root, 0.9), (root, 0.8), (0, 0.7), (2, 0.6)]):
        parent = trimmed[parent] if isinstance(parent, int) else parent
        take = retake.trim(takes.load(folder / f"{parent}.wav"), 0, end_s, folder)
        path = sidecar.beside(take.wav)
        sidecar.write(path, dataclasses.replace(sidecar.read(path), made_at=2.0 + number))
        trimmed.append(take.wav.stem)
    save(folder, prompt="alone")
    library.refresh()
    expected = [(root, 0), (trimmed[0], 1), (trimmed[2], 2), (trimmed[3], 3), (trimmed[1], 1)]
    for name in (root, *trimmed):
        found = library.tree(name)
        assert [(branch.card.name, branch.depth) for branch in found] == expected
    assert {branch.card.operation for branch in found} == {"", "trim"}
    library.delete([trimmed[0]])
    assert [b.card.name for b in library.tree(trimmed[3])] == [trimmed[2], trimmed[3]]
    assert [b.card.name for b in library.tree(root)] == [root, trimmed[1]]


def test_an_index_that_another_server_made_anew_is_read(folder, library, tmp_path):
    save(folder)
    library.refresh()
    assert library.page().total == 1
    other = sqlite3.connect(tmp_path / "index.sqlite3", isolation_level=None)
    for table in ("takes", "details"):  # as if the new file had no tables yet
        other.execute(f"DROP TABLE {table}")
    other.execute("PRAGMA user_version = 0")
    other.close()
    save(folder, seed=2)
    library.refresh()
    assert library.page().total == 2


def test_two_servers_on_one_folder_lose_nothing(folder, tmp_path):
    made = [save(folder, seed=seed, prompt="") for seed in range(4)]
    servers = [Library(folder, tmp_path / "index") for _ in range(2)]
    failures: list[Exception] = []

    def work(library, edit):
        try:
            for name in made * 3:
                edit(library, name)
                library.page()
        except Exception as error:
            failures.append(error)

    edits = [
        lambda library, name: library.star(name),
        lambda library, name: library.rename(name, f"title of {name}"),
    ]
    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(servers, edits, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for library in servers:
        library.refresh()
        cards = library.page().cards
        assert len(cards) == 4 and all(card.starred for card in cards)
        assert all(card.title == f"title of {card.name}" for card in cards)
        library.close()


KILLED = """
import sys
from pathlib import Path
from tests.helpers.takes import finished, with_codes
from musicgen_ui import takes
from musicgen_ui.library import Library
folder = Path(sys.argv[1])
library = Library(folder, Path(sys.argv[2]))
for seed in range(10_000):
    take = takes.save(with_codes(finished(seconds=0.1, seed=seed)), folder)
    library.refresh()
    library.star(take.wav.stem)
    print(take.wav.stem, flush=True)
"""


def test_a_killed_server_loses_no_finished_take(folder, tmp_path):
    index = tmp_path / "index"
    command = [sys.executable, "-c", KILLED, str(folder), str(index)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        said = [server.stdout.readline().strip() for _ in range(3)]
        server.send_signal(signal.SIGKILL)
        said += server.stdout.read().split()
    library = Library(folder, index)
    cards = {card.name: card for card in library.page(count=10_000).cards}
    assert set(said) <= set(cards) and len(said) >= 3
    assert all(cards[name].starred for name in said)
    assert all(takes.load(cards[name].sound).clip.codes is not None for name in said)
    library.close()


@pytest.mark.long
def test_thousands_of_takes_stay_quick(folder, tmp_path):
    """Beside the index, the page itself: its first cards, filters, and what is new after a take."""
    many_takes.write(folder, 5000)

    def opened():
        library = Library(folder, tmp_path / "index")
        view = LibraryView(library, Restoring(), tmp_path)
        assert len(view.models()["library_model"]["choices"]) > 1
        shown = view.filter("", False, "")["library_cards"]
        assert shown.count('class="card"') == PAGE and "of 5,000" in shown
        return library, view

    assert least_s(opened, 1) < 3  # once, until it is indexed
    assert least_s(opened, 3) < 1
    library, view = opened()
    asked = [("piece 1234", False, ""), ("", True, ""), ("", False, "bundled")]
    for filters in asked:
        assert least_s(lambda f=filters: view.filter(*f), 5) < 0.1, filters
    assert least_s(lambda: view.show("", False, "", NO_STATE | {"start": 4900}), 5) < 0.1
    assert least_s(lambda: view.look_again("", False, "", NO_STATE), 3) < 1
    library.close()


def least_s(work, times):
    """Seconds of this thread in the quickest of some runs: others use this computer too."""
    took = []
    for _ in range(times):
        began_s = time.thread_time()
        work()
        took.append(time.thread_time() - began_s)
    return min(took)


def test_a_folder_that_cannot_be_written_to_says_so_and_keeps_all(folder, library, monkeypatch):
    name = save(folder)
    library.page()
    refused = OSError(30, "Read-only file system")
    monkeypatch.setattr(sidecar, "write", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(RequestError, match=r"Read-only.*Nothing was lost"):
        library.star(name)
    assert not library.card(name).starred


def test_deleted_takes_come_back_where_the_index_is_busy(folder, library, tmp_path, monkeypatch):
    name = save(folder)
    library.page()
    library._index._connection.execute("PRAGMA busy_timeout = 0")
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite3")) as other:
        other.execute("BEGIN IMMEDIATE")
        token = library.delete([name])
        assert not (folder / f"{name}.wav").exists()
        other.rollback()
    library.refresh()
    assert not names(library.page())
    assert library.restore(token) == [name] == names(library.page())


def test_an_index_that_was_busy_takes_the_next_change(folder, library, tmp_path):
    name = save(folder)
    library.page()
    library._index._connection.execute("PRAGMA busy_timeout = 0")
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite3")) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM takes").fetchone()  # held until the transaction ends
        with pytest.raises(RequestError, match="index is in use"):
            library.star(name)
    assert library.star(name).starred


def test_takes_at_home_are_in_the_music_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_music_dir", lambda: str(tmp_path / "Music"))
    found = library_module.home_folder()
    assert found == tmp_path / "Music" / "MusicGen UI" and found.is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_music_dir", lambda: str(tmp_path / "file"))
    assert library_module.home_folder() is None


@pytest.mark.parametrize(
    ("named", "host", "public", "kept"),
    [
        ("", "127.0.0.1", False, "Music/MusicGen UI"),
        ("", "::1", False, "Music/MusicGen UI"),
        ("", "localhost", False, "Music/MusicGen UI"),
        ("", "127.0.0.1", True, None),
        ("", "0.0.0.0", False, None),
        ("", "192.168.1.5", False, None),
        ("temporary", "127.0.0.1", False, None),
        ("/srv/takes", "0.0.0.0", True, "/srv/takes"),
    ],
)
def test_servers_for_others_keep_takes_only_where_told(
    named, host, public, kept, tmp_path, monkeypatch
):
    monkeypatch.setattr(platformdirs, "user_music_dir", lambda: str(tmp_path / "Music"))
    expected = kept and tmp_path / kept
    assert library_module.kept_folder(named, host, public) == expected


def test_every_folder_has_an_index_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    first, second = (library_module.index_file(tmp_path / name) for name in "ab")
    assert first != second and first.parent == second.parent == tmp_path / "cache"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "file"))
    assert library_module.index_file(tmp_path) is None
    Library(tmp_path / "takes").close()
