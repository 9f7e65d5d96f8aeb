"""Hosting at home: a password at the door, a reverse proxy in front, several users, an MCP tool."""

from __future__ import annotations

import base64
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import soundfile
from gradio_client import Client
from starlette.routing import Route

from musicgen_ui import __main__ as cli
from musicgen_ui.errors import RequestError
from musicgen_ui.server import sign_in
from musicgen_ui.server.app import close, launch, serve
from musicgen_ui.server.settings import Settings, settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port
from tests.helpers.reverse_proxy import under_music

SECRET = "correct-horse:battery"  # a colon in a password is one of its letters
BASIC = ("ann", SECRET)


@pytest.fixture(scope="module")
def guarded(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """A server with a password: its address and Gradio's app."""
    monkeypatch_module.setattr(sign_in, "WRONG_S", 0.01)
    port = free_port()
    demo, temporary = launch(Settings(port=port, auth=f"ann:{SECRET}"), FakeBackend())
    yield f"http://127.0.0.1:{port}", demo.app
    close(demo, temporary)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def routes(app: Any) -> Iterator[tuple[str, str]]:
    """Every method and path that the server answers, with something for each parameter."""

    def walk(found: list[Any], prefix: str) -> Iterator[tuple[str, str]]:
        for route in found:
            path = prefix + getattr(route, "path", "")
            included = getattr(route, "original_router", None)  # FastAPI's, not copied any more
            inner = included.routes if included else getattr(route, "routes", None)
            if inner and not isinstance(route, Route):
                yield from walk(inner, path)
            for method in getattr(route, "methods", None) or (() if inner else ("GET", "POST")):
                yield method, re.sub(r"\{[^}]*\}", "x", path) or "/"

    yield from sorted(set(walk(app.routes, "")))


def test_a_stranger_has_the_sign_in_page_and_nothing_else(guarded: tuple[str, Any]) -> None:
    url, app = guarded
    tried, client = list(routes(app)), httpx.Client()
    paths = {path for _, path in tried}
    assert {"/gradio_api/queue/join", "/gradio_api/upload", "/config"} <= paths
    for method, path in tried:
        if path in sign_in.OPEN_PATHS or path in ("/", "/login", "/login/"):  # the sign-in page
            continue
        answer = client.request(method, url + path, json={})
        assert answer.status_code == 401, (method, path, answer.status_code)
        assert method == "HEAD" or answer.text == "Sign in first.\n"
    for path in ("/", "/login"):
        assert "gradio" not in client.get(url + path).text.lower()
    for hidden in ("gradio_api/mcp/", "gradio_api/file=/etc/passwd", "gradio_api/heartbeat/x"):
        assert httpx.get(f"{url}/{hidden}").status_code == 401
    assert len(tried) > 80


def test_what_is_open_says_nothing_private(guarded: tuple[str, Any]) -> None:
    url, _ = guarded
    for path in sorted({"/", "/login", *sign_in.OPEN_PATHS}):
        answer = httpx.get(url + path)
        assert "ann" not in re.findall(r"\w+", answer.text) and SECRET not in answer.text
        assert "Negative prompt" not in answer.text and "negative_prompt" not in answer.text, path
    assert httpx.get(url + "/healthz").json()["status"] == "ok"


@pytest.mark.parametrize(
    "sneaky", ["/gradio_api/../config", "//config", "/static/../config", "/assets/%2e%2e/config"]
)
def test_no_spelling_of_a_path_gets_round_the_gate(guarded: tuple[str, Any], sneaky: str) -> None:
    url, _ = guarded
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"GET {sneaky} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = connection.makefile("rb").read()
    assert answer.split()[1] in (b"401", b"404", b"403") and b"components" not in answer


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Basic " + base64.b64encode(b"ann:wrong").decode()},
        {"authorization": "Basic not base64"},
        {"authorization": "Bearer " + SECRET},
        {"cookie": "musicgen_ui=x"},
        {"cookie": "=;; ==, musicgen_ui"},
    ],
)
def test_what_is_almost_right_is_refused(guarded: tuple[str, Any], headers: dict) -> None:
    url, _ = guarded
    assert httpx.get(url + "/config", headers=headers).status_code == 401
    cookie = httpx.post(url + "/login", data={"username": "ann", "password": SECRET}).cookies
    for value in ("", "None", "x" * 43):
        named = {"cookie": f"{next(iter(cookie))}={value}"}
        assert httpx.get(url + "/config", headers=named).status_code == 401


def test_name_and_password_open_everything(guarded: tuple[str, Any], tmp_path: Path) -> None:
    url, _ = guarded
    assert "Negative prompt" in httpx.get(url + "/config", auth=BASIC).text
    brought = {"Authorization": "Basic " + base64.b64encode(":".join(BASIC).encode()).decode()}
    for signed_in in ({"auth": BASIC}, {"headers": brought}):
        client = Client(url, verbose=False, download_files=tmp_path, **signed_in)
        files, settings = client.predict(duration_s=1, seed=5, api_name="/generate")
        assert soundfile.info(files[0]).duration == 1 and settings["seed"] == 5
    with pytest.raises(Exception, match=r"401|credentials|authenticat"):
        Client(url, verbose=False)
    with pytest.raises(Exception, match=r"credentials|Could not"):
        Client(url, verbose=False, auth=("ann", "wrong"))


WRONG = "Basic " + base64.b64encode(b"ann:wrong").decode()


@pytest.mark.parametrize(
    "way",
    [
        {"method": "POST", "path": "/login", "data": {"username": "ann", "password": "wrong"}},
        *(
            {"path": path, "headers": {header: WRONG}}
            for header in ("authorization", "x-hf-authorization")
            for path in ("/", "/config", "/theme.css", "/gradio_api/queue/join", "/healthz")
        ),
    ],
)
def test_a_wrong_password_is_answered_late_and_few_are_looked_at(
    guarded: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    url, _ = guarded
    monkeypatch.setattr(sign_in, "WRONG_S", 0.3)
    way = {"method": "GET", **way}
    path = way.pop("path")
    with httpx.Client(base_url=url) as http, ThreadPoolExecutor(20) as guessers:
        began_s = time.monotonic()
        guesses = [guessers.submit(http.request, url=path, **way) for _ in range(20)]
        codes = [guess.result().status_code for guess in guesses]
        took_s = time.monotonic() - began_s
    assert set(codes) <= {400, 401, 429} and took_s >= 0.3
    assert sum(code != 429 for code in codes) <= sign_in.AT_ONCE * (1 + took_s / 0.3)


def test_a_sign_out_is_of_the_browser_that_asks_alone(guarded: tuple[str, Any]) -> None:
    url, _ = guarded
    form = {"username": "ann", "password": SECRET}
    with httpx.Client(base_url=url) as ann, httpx.Client(base_url=url) as other:
        for browser in (ann, other):
            assert browser.post("/login", data=form).status_code == 200
            assert browser.get("/config").status_code == 200
        stolen = dict(ann.cookies)
        gone = ann.get("/logout")
        assert gone.status_code == 302 and gone.headers["location"] == "./"
        assert ann.get("/config").status_code == 401 and other.get("/config").status_code == 200
        assert httpx.get(url + "/config", cookies=stolen).status_code == 401
        assert httpx.get(url + "/logout").status_code == 401
        assert httpx.get(url + "/logout", auth=BASIC).status_code == 302
        assert other.get("/config").status_code == 200


def test_cookies_go_to_no_other_site(
    guarded: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = guarded

    def set_cookies() -> list[str]:
        form = {"username": "ann", "password": SECRET}
        answer = httpx.post(url + "/login", data=form)
        return [c.lower() for c in answer.headers.get_list("set-cookie")]

    cookies = set_cookies()
    assert cookies and all("samesite=lax" in c and "httponly" in c for c in cookies)
    monkeypatch.setenv("SPACE_ID", "owner/name")  # shown in a frame of another site
    assert any("samesite=none" in cookie for cookie in set_cookies())


def test_a_part_of_a_file_repeats_no_header_of_its_request(guarded: tuple[str, Any]) -> None:
    url, _ = guarded
    page = httpx.get(url + "/config", auth=BASIC).text
    file = re.search(r"/gradio_api/file=[^\"]+\.wav", page)[0]
    sent = {"cookie": "secret=1", "x-own": "secret", "range": "bytes=0-9", "user-agent": "secret"}
    for method in ("GET", "HEAD"):
        answer = httpx.request(method, url + file, headers=sent, auth=BASIC)
        told = repr(answer.headers.raw).lower()
        assert "secret" not in told and "authorization" not in told
    assert answer.status_code in (200, 206, 405)
    part = httpx.get(url + file, headers=sent, auth=BASIC)
    assert part.status_code == 206 and len(part.content) == 10
    assert part.headers["accept-ranges"] == "bytes" and "wav" in part.headers["content-type"]


def test_secrets_are_in_no_log_message_or_help(
    guarded: tuple[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    chosen = settings(["--auth", f"ann:{SECRET}", "--metrics-token", "tok"])
    assert SECRET not in repr(chosen) and "tok" not in repr(chosen).replace("token", "")
    for arguments in (["--auth", "nocolon-secret"], ["--auth", ":secret"], ["--auth", "secret:"]):
        with pytest.raises(RequestError) as refused:
            settings(arguments)
        assert "secret" not in str(refused.value) and "--auth" in str(refused.value)
    httpx.post(guarded[0] + "/login", data={"username": "ann", "password": SECRET})
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUSICGEN_UI_AUTH", f"ann:{SECRET}")
        cli.main(["serve", "--help"])
    said = capsys.readouterr()
    assert SECRET not in caplog.text + said.out + said.err


def test_mcp_without_its_packages_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musicgen_ui.server.app.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install -r requirements-mcp\.txt"):
        serve(Settings(mcp=True), FakeBackend())


def test_a_shared_link_offers_the_listed_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings(["--share"]).any_checkpoint
    assert settings(["--share", "--any-checkpoint"]).any_checkpoint
    monkeypatch.setenv("GRADIO_SHARE", "1")
    assert not settings([]).any_checkpoint


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[str, FakeBackend]]:
    port, engine = free_port(), FakeBackend(speed=20)
    demo, temporary = launch(
        Settings(port=port, root_path="music/", allowed_hosts="music.example"), engine
    )
    with under_music(port) as url:
        yield url, engine
    close(demo, temporary)


def test_behind_a_proxy_everything_lies_under_its_path(proxied: tuple[str, FakeBackend]) -> None:
    url, _ = proxied
    page = httpx.get(url + "/").text
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page)[1])
    assert not urlsplit(config["root"]).netloc
    named = set(re.findall(r'(?:src|href)="\./([^"]+)"', page))
    named |= set(re.findall(r'"\./(gradio_api/file=[^"]+)"', page))
    assert {link.rpartition(".")[2] for link in named} >= {"js", "css", "wav", "flac", "png"}
    assert all(httpx.get(f"{url}/{link}").status_code == 200 for link in named)
    assert url.removesuffix("/music") not in page.partition("gradio_api_info")[0]
    assert httpx.get(url + "/healthz").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("headers", "relative"),
    [
        ({"origin": "https://music.example:8443"}, True),  # the proxy loses scheme and port
        ({"origin": "http://music.example"}, True),
        ({"origin": "https://music.example", "sec-fetch-site": "same-origin"}, True),
        ({}, False),  # a program
    ],
)
def test_what_the_page_asks_for_is_answered_with_addresses_relative_to_it(
    proxied: tuple[str, FakeBackend], headers: dict[str, str], relative: bool
) -> None:
    url, _ = proxied
    config = httpx.get(url + "/config").json()
    event = next(e for e in config["dependencies"] if e["api_name"] == "continue")
    given: dict[str, Any] = {"data": [None, None, 10, 0, 12, {}, None], "fn_index": event["id"]}
    answer = httpx.post(
        url + "/gradio_api/run/predict",
        json=given | {"session_hash": "proxied"},
        headers={"host": "music.example", **headers},
    ).json()
    file = next(value for value in answer["data"] if isinstance(value, dict) and "path" in value)
    assert bool(urlsplit(file["url"]).netloc) != relative
    if relative:
        assert httpx.get(f"{url}/{file['url']}").status_code == 200


def test_a_link_is_previewed_as_this_app(proxied: tuple[str, FakeBackend]) -> None:
    head = httpx.get(proxied[0] + "/").text.partition("</head>")[0]
    previews = re.findall(
        r'<meta\s+(?:property|name)="(?:og|twitter):\w+"\s+content="([^"]*)"', head
    )
    assert "MusicGen UI" in previews and "<title>MusicGen UI</title>" in head
    assert not any("radio" in preview for preview in previews)
    # Without its last slash the page would find nothing of its own: it moves before it looks.
    assert 0 < head.find("location.replace") < head.find("./assets/")


def test_the_api_streams_and_downloads_through_a_proxy(
    proxied: tuple[str, FakeBackend], tmp_path: Path
) -> None:
    url, _ = proxied
    client = Client(url, verbose=False, download_files=tmp_path)
    job = client.submit(duration_s=8, api_name="/generate")
    files, _ = job.result(timeout=60)
    assert soundfile.info(files[0]).duration == 8
    assert sum("Composing" in told["status"] for nothing, told in job.outputs()[:-1]) >= 2


def test_several_users_at_once_have_their_own_takes(
    proxied: tuple[str, FakeBackend], tmp_path: Path
) -> None:
    url, _ = proxied

    def use(seed: int) -> tuple[int, float]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        client = Client(url, verbose=False, download_files=folder)
        files, told = client.predict(duration_s=1 + seed, seed=seed, api_name="/generate")
        return told["seed"], soundfile.info(files[0]).duration

    with ThreadPoolExecutor(4) as users:
        assert list(users.map(use, range(4))) == [(seed, 1.0 + seed) for seed in range(4)]
