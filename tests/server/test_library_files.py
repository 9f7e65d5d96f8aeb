"""Downloads of the library."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import soundfile
from starlette.applications import Starlette
from starlette.testclient import TestClient

from musicgen_ui import takes
from musicgen_ui.library import Library
from musicgen_ui.server import library_files
from musicgen_ui.server.folders import is_shown_to_others, kept_folder
from musicgen_ui.server.settings import Settings
from tests.helpers.takes import finished

NAME = "夜 & 100% jazz"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    folder = tmp_path / "takes"
    for name in (NAME, "other"):
        takes.save(finished(seconds=4.0, tempo_bpm=120, prompt=name), folder, name)
    library = Library(folder, tmp_path / "index.sqlite3")
    library.rename(NAME, "Closing theme")
    return TestClient(Starlette(routes=library_files.routes(library, tmp_path)))


def test_download_is_the_take_in_any_format(client: TestClient, tmp_path: Path) -> None:
    for ending in (".wav", ".flac", ".mp3", ".opus"):
        answer = client.get(f"/takes/{NAME}{ending}".replace("%", "%25"))
        assert answer.status_code == 200 and "attachment" in answer.headers["content-disposition"]
        file = tmp_path / f"got{ending}"
        file.write_bytes(answer.content)
        settings = takes.read_settings(file)
        assert settings and settings["prompt"] == NAME and soundfile.info(file).duration > 3.9
    assert "Closing theme" in soundfile.SoundFile(tmp_path / "got.flac").title


def test_download_can_be_a_loop(client: TestClient) -> None:
    answer = client.get("/takes/other.wav", params={"bars": 1})
    assert soundfile.info(io.BytesIO(answer.content)).duration == 2
    assert client.get("/takes/other.wav", params={"bars": 90}).status_code == 404
    assert client.get("/takes/other.wav", params={"bars": "x"}).status_code == 400


@pytest.mark.parametrize("path", ["gone.wav", "other.exe", "other", "..%2Findex.sqlite3"])
def test_nothing_but_takes_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/takes/{path}").status_code == 404


def test_archive_holds_takes_and_is_deleted(client: TestClient, tmp_path: Path) -> None:
    answer = client.get("/takes.zip", params={"name": [NAME, "other"], "ending": ".flac"})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == sorted([f"{NAME}.flac", "other.flac"])
    assert not list(tmp_path.glob("*.zip"))
    assert client.get("/takes.zip", params={"ending": ".flac"}).status_code == 404


def test_takes_are_kept_where_a_server_is_its_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_MUSIC_DIR", str(tmp_path))
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert kept_folder(Settings()) == tmp_path / "MusicGen UI"
    assert kept_folder(Settings(output_folder="temporary")) is None
    for shown in ({"host": "0.0.0.0"}, {"share": True}, {"allowed_hosts": "a.example"}):
        chosen = Settings(**shown)
        assert is_shown_to_others(chosen) and kept_folder(chosen) is None
    assert kept_folder(Settings(host="0.0.0.0", output_folder=str(tmp_path))) == tmp_path
    monkeypatch.setenv("SPACE_ID", "me/mine")
    assert kept_folder(Settings()) is None
