"""What a hostile visitor may try on an open server, tried; it costs the others nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile
from gradio import routes
from gradio_client import Client, handle_file
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from musicgen_ui.request import FIELDS
from musicgen_ui.server import app as server_app
from musicgen_ui.server import gradio_patches, logs, middleware
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.jobs import made
from tests.helpers.local import free_port, wait_for

ROOT = Path(__file__).parents[2]
HTTP = httpx.Client(verify=False, timeout=60)  # one for all: a client of its own takes 50 ms
SCRIPT = "<img src=x onerror=\"window.hacked='yes'\"><script>window.hacked='yes'</script>"


@pytest.fixture(scope="module")
def engine() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def server(engine: FakeBackend) -> Iterator[SimpleNamespace]:
    """An open server: its address, Gradio's Blocks, its folder."""
    chosen = Settings(port=free_port(), max_upload_mb=20, allowed_hosts="Music.example.com, ")
    demo, temporary = launch(chosen, engine)
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{chosen.port}", port=chosen.port, demo=demo, folder=temporary
    )
    close(demo, temporary)


@pytest.fixture(scope="module")
def client(server: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(server.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def takes(client: Client) -> None:
    """A take that somebody else made, with a name that can be guessed."""
    client.predict(prompt="guess me", seed=7, duration_s=0.5, api_name="/generate")


@pytest.fixture(autouse=True)
def alive(server: SimpleNamespace) -> Iterator[None]:
    """After each attack the server answers as before."""
    yield
    assert HTTP.get(server.url + "/healthz", timeout=20).status_code == 200


def ask(server: SimpleNamespace, fn: int, data: list[Any], session: str = "s") -> dict[str, Any]:
    """The last message about a function called through the queue, or how joining was answered."""
    api = server.url + "/gradio_api/queue"
    body = {"data": data, "fn_index": fn, "session_hash": session}
    joined = HTTP.post(f"{api}/join", json=body)
    if joined.status_code != 200:
        return {"msg": "refused", "status": joined.status_code, "text": joined.text}
    message: dict[str, Any] = {}
    stream = HTTP.stream("GET", f"{api}/data?session_hash={session}", timeout=20)
    with stream as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line[5:])
            if message.get("msg") in ("process_completed", "close_stream", "unexpected_error"):
                return message
    return message


def function(server: SimpleNamespace, name: str) -> tuple[int, list[Any]]:
    """A function's number and its inputs' components."""
    for number, fn in server.demo.fns.items():
        if fn.api_name == name:
            return number, fn.inputs
    raise LookupError(name)


def clip(server: SimpleNamespace, file: dict[str, Any]) -> list[Any]:
    """The API's arguments with `file` as the clip."""
    values: list[Any] = [spec.default for spec in FIELDS.values()]
    values[list(FIELDS).index("audio_prompt")] = file | {"meta": {"_type": "gradio.FileData"}}
    return [list(v) if isinstance(v, tuple) else v for v in values]


def no_traceback(said: Any) -> bool:
    text = json.dumps(said) if not isinstance(said, str) else said
    return not any(word in text for word in ("Traceback", 'File "', "site-packages", '.py"'))


# routes


def test_nothing_but_the_named_routes_of_gradio_is_open(server):
    closed = [
        *("proxy=http://127.0.0.1:1/", "proxy=https://example.com/", "run-history/records"),
        *("runs", "deep_link?session_hash=s", "monitoring", "dev/reload", "vibe-code/"),
        *("stream/s/1/2/playlist.m3u8", "component_server", "custom_component/1/x/component/a.js"),
        *("profiling/traces", "/info", "file/etc/passwd", "nonesuch", "process_recording"),
    ]
    for route in closed:
        for method in ("GET", "POST", "HEAD"):
            answer = HTTP.request(method, f"{server.url}/gradio_api/{route}")
            assert answer.status_code in (404, 405), (method, route)
    assert HTTP.get(server.url + "/monitoring", follow_redirects=False).status_code >= 400


def test_nothing_is_made_past_the_queue(server, engine):
    before = len(engine.requests)
    for name in ("generate", "compose"):
        number, inputs = function(server, name)
        for way in (f"run/{name}", f"run/{number}", f"api/{name}", f"run/{name}/", "run/predict"):
            body = {"data": [None] * len(inputs), "fn_index": number, "session_hash": "x"}
            assert HTTP.post(f"{server.url}/gradio_api/{way}", json=body).status_code >= 400
    assert len(engine.requests) == before


PLACES = [
    "{folder}/../../../../../../etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "{cache}/../takes/{take}",
    "{folder}/takes/{take}",
    "{cache}/../../../../etc/passwd",
    "{cache}/link",
    "{cache}/link/passwd",
    "{cache}/%00.wav",
    "{cache}/" + "a" * 5000,
    "{root}/app.py",
    "{root}/assets/bundled/config.json",
    "README.md",
    "file:///etc/passwd",
    "http://127.0.0.1:{port}/config",
    "http:/127.0.0.1:{port}/config",
    "HTTPS://localhost/",
    "http://169.254.169.254/latest/meta-data/",
    "ftp://127.0.0.1/",
    "",
    ".",
    "{cache}",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_file_but_those_shown_is_served(place, server, takes):
    cache = server.folder / "shown"
    link = cache / "link"
    if not link.exists():
        link.symlink_to("/etc")
    take = "guess-me-fake-seed-7.wav"
    assert (server.folder / "takes" / take).is_file()  # a name that can be guessed
    path = place.format(folder=server.folder, cache=cache, take=take, root=ROOT, port=server.port)
    ways = (path, path.replace(".", "%2e"), path.replace("/", "%2f"), path.replace("..", "%252e."))
    for written in ways:
        answer = raw(server.port, get(f"/gradio_api/file={written}").encode("latin-1"))
        assert answer.split(b" ")[1] in (b"403", b"404", b"400"), answer[:200]
        assert b"root:" not in answer


def get(path: str, host: str = "localhost") -> str:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


def raw(port: int, request: bytes) -> bytes:
    """The answer to a request as it is written, which clients would tidy up."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                parts.append(part)
        return b"".join(parts)


def test_what_is_shown_has_a_name_that_nobody_can_guess(server, client, engine):
    job = client.submit(prompt="guess me", seed=8, duration_s=0.5, api_name="/generate")
    job.result()
    told = json.dumps(job.outputs()) + repr(client)
    assert "/takes/" not in told
    shown = list((server.folder / "shown").rglob("guess-me-fake-seed-8*.wav"))
    assert shown and all(len(file.parent.name) == 64 for file in shown)
    assert HTTP.get(f"{server.url}/gradio_api/file={shown[0]}").status_code == 200


@pytest.mark.parametrize("place", ["{folder}/takes/{take}", "/etc/passwd", "{cache}/../x.wav", "x"])
def test_another_sessions_file_is_no_clip(place, server, takes, engine):
    path = place.format(
        folder=server.folder, cache=server.folder / "shown", take="guess-me-fake-seed-7.wav"
    )
    before = len(engine.requests)
    number, _ = function(server, "generate")
    for extra in ({}, {"is_stream": True}, {"url": "http://127.0.0.1/"}, {"orig_name": "../a"}):
        said = ask(server, number, clip(server, {"path": path, **extra}))
        assert not said.get("success") and no_traceback(said), said
    assert len(engine.requests) == before


# addresses


@pytest.fixture
def listener() -> Iterator[SimpleNamespace]:
    """A server that nobody should be sent to; it redirects, and counts who comes."""
    came: list[str] = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.path)
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    trap = HTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=trap.serve_forever, daemon=True).start()
    yield SimpleNamespace(port=trap.server_port, came=came)
    trap.shutdown()
    trap.server_close()


ADDRESSES = [
    "http://127.0.0.1:{port}/clip.wav",
    "http://localhost:{port}/clip.wav",
    "HTTP://127.0.0.1:{port}/clip.wav",
    " http://127.0.0.1:{port}/clip.wav",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://user:pass@127.0.0.1:{port}/",
    "http://169.254.169.254/latest/meta-data/iam",
    "http://100.100.100.200/latest/meta-data/",
    "https://example.com/clip.wav",
    "file:///etc/passwd",
    "data:audio/wav;base64,UklGRg==",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_file_anywhere(address, server, engine, listener, monkeypatch):
    """In every place that takes a file, by every function; nothing is looked up or fetched."""
    import safehttpx

    async def fetched(*_: Any, **__: Any) -> None:
        listener.came.append("fetched")
        raise AssertionError

    monkeypatch.setattr(safehttpx, "get", fetched)
    monkeypatch.setattr(safehttpx, "async_validate_url", fetched)
    address = address.format(port=listener.port)
    before = len(engine.requests)
    places = 0
    for number, fn in server.demo.fns.items():
        for index, component in enumerate(fn.inputs):
            if component.get_block_name() not in ("audio", "uploadbutton", "file"):
                continue
            places += 1
            data: list[Any] = [None] * len(fn.inputs)
            data[index] = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
            said = ask(server, number, data, f"s{number}")
            assert no_traceback(said), said
    assert places >= 3 and listener.came == [] and len(engine.requests) == before
    number, _ = function(server, "generate")
    said = ask(server, number, clip(server, {"path": address}))
    assert not said["success"] and len(engine.requests) == before


def test_why_an_address_is_refused_is_said(server):
    number, _ = function(server, "generate")
    said = ask(server, number, clip(server, {"path": "https://example.com/clip.wav"}))
    assert "Upload the file instead of a URL" in said["output"]["error"]


# other websites


LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "music.example.com"]
OTHER_NAMES = [
    *("x.localhost", "localhost.", "evil.example", "127.0.0.1.nip.io", "localhost.evil.example"),
    *("", "evil.example#localhost", "localhost@evil.example", "music.example.com.evil.example"),
]
PAGE, FOREIGN = "http://127.0.0.1:{port}", "http://evil.example"


@pytest.mark.parametrize("name", LOCAL_NAMES + OTHER_NAMES)
def test_a_server_of_this_computer_has_no_other_name(name, server):
    """A browser sends to it whatever a website's own name is made to mean (DNS rebinding)."""
    for port in (f":{server.port}", ""):
        for path in ("/", "/config", "/gradio_api/info"):
            answer = raw(server.port, get(path, name + port).encode())
            assert answer.startswith(b"HTTP/1.1 200" if name in LOCAL_NAMES else b"HTTP/1.1 4")
            assert name in LOCAL_NAMES or b"gradio" not in answer


def called(server: SimpleNamespace, **headers: str) -> set[int]:
    """How a page's requests are answered: reading, uploading, generating."""
    number, _ = function(server, "status")
    event = {"data": [], "fn_index": number, "session_hash": "page"}
    answers = [
        HTTP.get(server.url + "/config", headers=headers),
        HTTP.get(server.url + "/", headers=headers),
        HTTP.post(server.url + "/gradio_api/run/predict", json=event, headers=headers),
        HTTP.post(server.url + "/gradio_api/upload", files={"files": b"x"}, headers=headers),
    ]
    assert not any("access-control-allow-credentials" in a.headers for a in answers)
    assert not any("access-control-allow-origin" in a.headers for a in answers)
    return {answer.status_code for answer in answers}


def test_pages_of_other_websites_may_not_use_a_server(server):
    foreign = [
        *(FOREIGN, "null", "http://127.0.0.1:1", "http://x.localhost:{port}", "", "//"),
        *("http://localhost.:{port}", "http://127.0.0.1.evil.example:{port}", "file://"),
    ]
    for origin in foreign:
        assert called(server, origin=origin.format(port=server.port)) == {403}, origin
    asks = {"origin": FOREIGN, "access-control-request-method": "POST"}
    asked = HTTP.options(server.url + "/gradio_api/upload", headers=asks)
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers
    picture = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "no-cors",
        "sec-fetch-dest": "image",
    }
    frame = picture | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    assert called(server, **picture) == called(server, **frame) == {403}


def test_its_own_pages_and_programs_may(server):
    link = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
    }
    own = PAGE.format(port=server.port)
    for headers in ({}, link, {"origin": own, "sec-fetch-site": "same-origin"}):
        assert called(server, **headers) == {200}, headers
    proxied = [
        {"origin": "https://music.example.com"},  # a proxy that passes on its own address for host
        {"origin": "https://music.example.com", "host": "music.example.com"},
        {"origin": "https://music.example.com:8443", "host": "music.example.com"},
        {"origin": "https://other.example", "x-forwarded-host": "other.example"},
    ]
    for headers in proxied:
        assert called(server, **headers) == {200}, headers


def test_a_public_space_is_called_by_other_websites_without_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("SPACE_ID", "owner/name")
    for auth, status, origin in (("", 200, "*"), ("ann:secret", 403, None)):
        passed = server_app.middleware(Settings(host="0.0.0.0", auth=auth), tmp_path, set(), [])
        app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("page"))], middleware=passed)
        answer = TestClient(app).get("/", headers={"origin": FOREIGN})
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == origin
        assert "access-control-allow-credentials" not in answer.headers


# names that clients choose


def test_long_names_are_refused_and_not_kept(server):
    number, _ = function(server, "status")
    long = "x" * 4_000
    api = server.url + "/gradio_api"
    event = {"data": [], "fn_index": number}
    ways = [
        *(
            (f"/{route}", {"session_hash": long, **event})
            for route in ("queue/join", "run/predict")
        ),
        ("/run/predict", {"session_hash": "s", "event_id": long, **event}),
        ("/call/generate", {"data": [], "session_hash": long}),
        ("/queue/join", {"session\\u005fhash": long, "session_hash": long, **event}),
    ]
    for path, body in ways:
        answer = HTTP.post(api + path, content=json.dumps(body).replace("\\\\u", "\\u"))
        assert answer.status_code == 400, path
    for path in (f"/heartbeat/{long}", f"/queue/data?session_hash={long}"):
        assert HTTP.get(api + path).status_code == 400
    assert HTTP.post(f"{api}/upload?upload_id={long}", files={"files": b"x"}).status_code == 400
    held = (
        server.demo.state_holder.session_data,
        server.demo._queue.pending_messages_per_session,
        server.demo._queue.pending_event_ids_session,
        routes.file_upload_statuses._statuses,
        routes.file_upload_statuses._signals,
    )
    assert all(len(name) <= middleware.ID_CHARACTERS for names in held for name in names)


def test_what_pages_send_is_not_kept(server):
    mark = "keep me " * 1000
    for name in ("checkpoint", "clip_use", "enter", "melody"):
        number, inputs = function(server, name)
        event = {"data": [mark for _ in inputs], "fn_index": number, "session_hash": f"k{number}"}
        HTTP.post(server.url + "/gradio_api/run/predict", json=event)
    for session in list(server.demo.state_holder.session_data.values()):
        values = [c["props"].get("value") for c in session.components if "props" in c]
        assert "keep me" not in repr([values, session.state_data])


# bodies


def upload(
    server: SimpleNamespace, name: str, content: bytes = b"x", **more: Any
) -> httpx.Response:
    files = {"files": (name, content)}
    return HTTP.post(f"{server.url}/gradio_api/upload", files=files, timeout=60, **more)


def slow_body(megabytes: int) -> Iterator[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
    yield head
    for _ in range(megabytes):
        yield b"x" * 1_000_000


def test_a_form_field_of_150_mb_is_refused_and_never_held(server):
    process = psutil.Process()
    before, most = process.memory_info().rss, 0

    def watched() -> Iterator[bytes]:
        nonlocal most
        for part in slow_body(150):
            most = max(most, process.memory_info().rss)
            yield part

    for path in ("upload", "queue/join", "call/generate"):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        try:
            answer = HTTP.post(
                f"{server.url}/gradio_api/{path}", content=watched(), headers=headers, timeout=60
            )
            assert answer.status_code in (400, 413, 422)
        except httpx.TransportError:
            pass  # closed while it was still talking
    assert most - before < 100e6  # of the process that holds all tests


def test_only_files_are_taken_and_few_at_once(server):
    for body in ({"data": {"files": "text"}}, {"data": {"other": "x"}, "files": {"files": b"x"}}):
        answer = HTTP.post(f"{server.url}/gradio_api/upload?upload_id=1", **body)
        assert answer.status_code == 400 and no_traceback(answer.text)
    many = [("files", (f"{i}.wav", b"x")) for i in range(gradio_patches.MAX_FILES + 1)]
    answer = HTTP.post(f"{server.url}/gradio_api/upload", files=many)
    assert answer.status_code == 400


NAMES = [
    "../../../etc/cron.d/x",
    "..%2f..%2fx",
    "/etc/passwd",
    "..",
    ".",
    "C:\\windows\\x.wav",
    "a\x00b.wav",
    "a\nb\r\n\x1b[31m.wav",
    "\u202egnp.wav",
    "x" * 3000 + ".wav",
    SCRIPT + ".wav",
    "-rf *;`id`$(id).wav",
    "CON.wav",
    "…/日本語.wav",
]


def astray(server: SimpleNamespace, name: str) -> set[Path]:
    """What is called as an upload's name ends, in the folders above the server's."""
    last = re.split(r"[/\\]|%2f", name)[-1]
    if "\x00" in last or len(last) > 255:
        return set()  # no file can be called so
    return {p / last for p in server.folder.parents if os.path.lexists(p / last)}


@pytest.mark.parametrize("name", NAMES)
def test_an_uploads_name_leads_nowhere(name, server):
    before = astray(server, name)
    answer = upload(server, name, b"RIFF")
    assert answer.status_code < 500 and no_traceback(answer.text)
    if answer.status_code == 200:
        (path,) = answer.json()
        stored = Path(path)
        assert stored.is_relative_to(server.folder / "shown") and stored.is_file()
        assert not any(c in stored.name for c in "/\\<>\n\r\x00\x1b")
    assert astray(server, name) == before


def files_of(server: SimpleNamespace) -> set[Path]:
    return {path for path in (server.folder / "shown").rglob("*") if path.is_file()}


def test_an_upload_that_is_too_large_leaves_nothing(server):
    before = files_of(server)
    assert upload(server, "a.wav", b"x" * 20_050_000).status_code == 413
    wait_for(lambda: files_of(server) == before)


def test_uploads_end_where_the_disk_is_nearly_full(server, monkeypatch):
    monkeypatch.setattr(middleware, "SPARE_BYTES", 10**18)
    answer = upload(server, "a.wav")
    assert answer.status_code == 507 and "no room" in answer.text


# nonsense for every function

JUNK: list[Any] = [None, -1, 1e308, "\x00\u202e" + SCRIPT, [[[]]], {"path": "x", "meta": {}}]


def test_no_function_tells_a_traceback_whatever_it_is_given(server):
    for number, fn in server.demo.fns.items():
        for junk in JUNK if fn.fn else ():
            said = ask(server, number, [junk] * len(fn.inputs), f"junk{number}")
            assert no_traceback(said) and said.get("status", 200) < 500, (fn.api_name, said)


@pytest.mark.parametrize("length", [2_001, 10_000, 100_000, 3_000_000])
def test_a_long_prompt_is_a_sentence(length, server):
    number, _ = function(server, "generate")
    for name in ("prompt", "negative_prompt", "checkpoint", "key"):
        values = clip(server, {})
        values[list(FIELDS).index("audio_prompt")] = None
        values[list(FIELDS).index(name)] = "é" * length
        said = ask(server, number, values)
        if said["msg"] == "refused":
            assert said["status"] == 413
        else:
            assert "shorten it" in said["output"]["error"] and len(json.dumps(said)) < 5_000


def test_a_prompt_of_script_names_files_and_logs_harmlessly(server, client, caplog):
    caplog.set_level(logging.DEBUG)
    prompt = SCRIPT + "\n\x1b[31m../../x\u202e"
    files, settings = client.predict(prompt=prompt, duration_s=0.5, api_name="/generate")
    for file in files:
        assert not any(c in Path(file).name for c in "<>\"'&/\\\n\x1b\u202e=")
    assert "\x1b" not in settings["prompt"] and "\u202e" not in settings["prompt"]
    ours = [record.getMessage() for record in caplog.records if "musicgen" in record.name]
    assert ours and not any("\x1b" in line or "onerror" in line for line in ours)


# secrets


def test_tokens_are_in_no_log_and_no_answer(server, client, engine, caplog):
    caplog.set_level(logging.DEBUG)
    token = "hf_" + "Ab3" * 11
    failure = RuntimeError(f"401 for https://x/y?token={token}&X-Amz-Signature=abcdef0123456789")
    engine.failure = failure
    try:
        with pytest.raises(Exception) as caught:
            client.predict(duration_s=0.5, api_name="/generate")
    finally:
        engine.failure = None
    assert token not in str(caught.value)
    text = "\n".join(logs.RedactingFormatter().format(record) for record in caplog.records)
    assert "A job failed" in text and "Traceback" in text
    assert token not in text and "abcdef0123456789" not in text and "https://x/y?…" in text


def test_the_logs_own_handler_cleans(monkeypatch, capsys):
    """As `serve` and `app.py` set it up; with what the environment holds in secret."""
    monkeypatch.setenv("HF_TOKEN", "not-a-usual-token")
    monkeypatch.setenv("MUSICGEN_UI_AUTH", "ann:open sesame")
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers.clear()
    try:
        logs.set_up()
        logging.info("Authorization: Bearer abc.def not-a-usual-token of open sesame")
        logging.info("http://ann:pass@host/x?key=1#y stays http://host/x")
    finally:
        root.handlers[:] = before
    told = capsys.readouterr().err
    assert told.splitlines()[0].endswith("Authorization: Bearer … … of …")
    assert told.splitlines()[1].endswith("http://…@host/x?… stays http://host/x")
    for file in ("server/app.py",):
        assert "logs.set_up()" in (ROOT / "musicgen_ui" / file).read_text()


# hostile checkpoints


@pytest.fixture
def hostile(tiny_mono: Path, tmp_path: Path) -> Path:
    """A checkpoint that asks for its own code to be run wherever a file may ask for that."""
    import shutil

    folder = tmp_path / "hostile"
    shutil.copytree(tiny_mono, folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil", "setup"):
        (folder / f"{name}.py").write_text(code + "class Evil: pass\n")
    maps = {
        "AutoModel": "modeling_evil.Evil",
        "AutoConfig": "configuration_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
        "MusicgenForConditionalGeneration": "modeling_evil.Evil",
    }
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        held = json.loads(path.read_text()) if path.exists() else {}
        held |= {"auto_map": maps, "trust_remote_code": True, "custom_generate": "evil"}
        path.write_text(json.dumps(held))
    return folder


def test_a_checkpoints_own_code_is_never_run(hostile, tmp_path):
    from musicgen_ui.backends.local import LocalBackend
    from musicgen_ui.errors import RequestError
    from musicgen_ui.request import GenerationRequest

    manager = LocalBackend(device="cpu", precision="float32")
    try:
        with contextlib.suppress(RequestError):
            request = GenerationRequest(checkpoint=str(hostile), duration_s=0.5)
            made(manager, request)
    finally:
        manager.close()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_runs_something_is_refused(tiny_mono, tmp_path):
    import pickle
    import shutil

    import torch

    from musicgen_ui.checkpoints import registry
    from musicgen_ui.errors import RequestError

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name in ("pytorch_model.bin", "state_dict.bin"):
        folder = tmp_path / name
        shutil.copytree(tiny_mono, folder)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        torch.save({"decoder": Bomb()}, folder / name)
        if name == "state_dict.bin":
            (folder / "config.json").unlink()
            torch.save({"xp.cfg": Bomb()}, folder / "compression_state_dict.bin")
        with pytest.raises(RequestError):
            registry.load(registry.resolve(str(folder)), torch.float32, lambda _: None)
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(RequestError):
            registry.load(registry.resolve(str(folder)), torch.float32, lambda _: None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "named", ["{folder}", "/etc", "~", ".", "../..", "evil/remote-code", "file:///etc", "\x00"]
)
def test_on_a_public_server_visitors_name_listed_checkpoints_alone(named, hostile, monkeypatch):
    from musicgen_ui.backends.local import LocalBackend
    from musicgen_ui.checkpoints import hub
    from musicgen_ui.errors import RequestError

    monkeypatch.setattr(hub, "config_file", lambda name: pytest.fail(f"asked the Hub for {name}"))
    manager = LocalBackend(device="cpu", allow_any=False)
    with pytest.raises(RequestError, match="offers these checkpoints alone"):
        manager.describe(named.format(folder=hostile))


@pytest.fixture
def real(server, tiny_mono) -> Iterator[Any]:
    """The real engine beside an open server, whose folders hold checkpoints of visitors."""
    from musicgen_ui.backends.local import LocalBackend

    manager = LocalBackend(device="cpu", load=lambda *_: pytest.fail("a visitor's file was loaded"))
    yield manager
    manager.close()


def places_of_visitors(server: SimpleNamespace) -> Iterator[Path]:
    (path,) = upload(server, "state_dict.bin", b"x" * 86).json()
    (config,) = upload(server, "config.json", b'{"model_type": "musicgen"}').json()
    yield from (Path(path).parent, Path(config).parent, server.folder / "takes" / "inside")
    yield from (server.folder, server.folder / "shown", server.folder / "takes")
    yield server.folder.parent / "musicgen-ui-1-abcdef-other" / "shown"  # another server's


def test_what_visitors_put_on_the_disk_is_no_checkpoint_and_no_adapter(
    server, real, tiny_mono, tmp_path, monkeypatch
):
    from musicgen_ui import files
    from musicgen_ui.checkpoints import lora, registry
    from musicgen_ui.errors import RequestError

    (own := tmp_path / "own").mkdir()
    monkeypatch.setattr(files, "TAKES", files.TAKES | {own})
    for folder in [*places_of_visitors(server), own]:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text((tiny_mono / "config.json").read_text())
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(folder)
        for named in (str(folder), f"{folder}/.", f"{folder}/../{folder.name}", tmp_path / "link"):
            with pytest.raises(RequestError, match="no checkpoints"):
                real.describe(str(named))
            with pytest.raises(RequestError, match="no checkpoints"):
                lora.find(str(named))
        (folder / "config.json").unlink()
        if made:
            folder.rmdir()
    alone = tmp_path / "alone"
    alone.mkdir()
    named = {"model_type": "musicgen_decoder", "base_model": str(server.folder)}
    (alone / "config.json").write_text(json.dumps(named))
    with pytest.raises(RequestError, match="no checkpoints"):
        real.describe(str(alone))
    assert registry.folder_of(str(tiny_mono)) == tiny_mono.resolve()


def test_no_module_trusts_remote_code():
    for file in (ROOT / "musicgen_ui").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, file
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, file
        assert "shell=True" not in text and "os.system" not in text, file


# bombs


def test_an_uploaded_bomb_of_silence_is_heard_within_bounds(server, client, engine, tmp_path):
    """A quarter of an hour of silence, some kB as FLAC, as a clip to continue."""
    bomb = tmp_path / "bomb.flac"
    with soundfile.SoundFile(bomb, "w", 48_000, 2, "PCM_16") as file:
        quiet = np.zeros((48_000 * 60, 2), np.int16)
        for _ in range(15):
            file.write(quiet)
    assert bomb.stat().st_size < 5e5
    process, most = psutil.Process(), 0
    before = process.memory_info().rss
    job = client.submit(audio_prompt=handle_file(bomb), duration_s=0.5, api_name="/generate")
    while not job.done():
        most = max(most, process.memory_info().rss)
        time.sleep(0.02)
    job.result()
    assert most - before < 300e6
    assert engine.requests[-1].audio_prompt.duration_s == 120


# what the app is made of


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-mcp.txt"])
def test_every_dependency_has_a_tested_range_and_a_reason(name):
    """Nothing untested is installed by itself, nothing is there without a use."""
    lines = [li for li in (ROOT / name).read_text().splitlines() if li and li[0] not in "#-"]
    assert lines
    for line in lines:
        wanted, _, reason = line.partition("#")
        assert ("<" in wanted and ">=" in wanted) or "==" in wanted, line
        assert reason.strip(), line
