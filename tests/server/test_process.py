"""A server's process: what it refuses to begin with, what it obeys, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import soundfile

from musicgen_ui import __main__ as cli
from musicgen_ui import environment
from musicgen_ui.backends.admission import Admission
from musicgen_ui.backends.starting import StartingBackend
from musicgen_ui.engine.linear import PRECISIONS
from musicgen_ui.engine.protocol import Trouble
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server import app, settings
from tests.helpers import jobs
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port, wait_for
from tests.helpers.pages import Page

ROOT = Path(__file__).parents[2]

# What it refuses


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a server is begun."""
    monkeypatch.setattr(app, "launch", lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr(environment, "getproxies", dict)


WRONG = [
    *(["--port", value] for value in ("0", "-1", "65536", "many")),
    *(["--max-upload-mb", value] for value in ("nan", "inf", "0", "-5")),
    *(["--jobs", value] for value in ("0", "-1", "1.5", "9" * 400)),
    *(["--device", value] for value in ("tpu", "cuda:x", "")),
    *(["--precision", value] for value in ("int4", "INT8")),
    *(["--idle-s", value] for value in ("-1", "1e300", "nan")),
    *(["--max-duration-s", value] for value in ("0", "301", "nan")),
    *([name, "-1"] for name in ("--visitor-jobs", "--visitor-seconds", "--memory-gb")),
    ["--queue-length", "0"],
    ["--temporary-gb", "nan"],
    ["--trusted-proxies", "10.0.0.0/8,10.0.0.1/8"],
    ["--host", ""],
    ["--host", "192.0.2.1"],  # of no computer
    ["--checkpoint", "no such checkpoint"],
    ["--checkpoint", str(ROOT)],
    ["--checkpoints", "small,/no/such/folder"],
    ["--output-folder", __file__],
    ["--output-folder", f"{__file__}/takes"],
    ["--mcp=yes"],
    ["--no-such-flag"],
]


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_a_wrong_setting_is_a_sentence_before_anything_begins(
    wrong: list[str], nothing_begins: None, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["serve", "--port", str(free_port()), *wrong]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and wrong[0].partition("=")[0] in said


def test_a_port_that_is_taken_is_a_sentence(
    nothing_begins: None, capsys: pytest.CaptureFixture
) -> None:
    with app.socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and port in said


def test_the_settings_offer_the_engines_precisions() -> None:
    assert ("auto", *PRECISIONS) == settings.PRECISIONS


def test_a_setting_that_only_the_engine_knows_ends_the_server() -> None:
    def build() -> FakeBackend:
        raise RequestError("There is no such device.")

    engine = StartingBackend(build, "auto")
    engine.start()
    server = SimpleNamespace(thread=threading.current_thread())
    demo = SimpleNamespace(backend=Admission(engine, None), server=server)
    assert app.wait_for_end(demo, app.queue.SimpleQueue()) == 2


# Proxies


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the proxy variables, in either spelling, until the end of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)

        def choose(**values: str) -> None:
            for name in ("http", "https", "all", "no"):  # noted, to be set back
                for spelt in (f"{name}_proxy", f"{name}_PROXY".upper()):
                    patch.setenv(spelt, values.get(spelt, ""))
                    if spelt not in values:
                        patch.delenv(spelt)

        yield choose


@pytest.mark.parametrize(
    "values",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9"},
        {"http_proxy": "127.0.0.1:9", "https_proxy": "127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"all_proxy": "socks5h://user:word@127.0.0.1:9/"},
        {"all_proxy": "socks://127.0.0.1:9/"},  # as GNOME sets it
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "[::1], corp.example"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "*"},
    ],
)
def test_this_computer_is_reached_without_the_proxies(variables: Any, values: dict) -> None:
    variables(**values)
    environment.prepare_proxies("192.0.2.7")
    client = httpx.Client()  # raises where it does not understand them
    for host in ("localhost", "127.0.0.1", "[::1]", "192.0.2.7"):
        mine = client._transport_for_url(httpx.URL(f"http://{host}:7860/"))
        assert mine is client._transport, host
    if values.get("NO_PROXY") != "*":
        out = client._transport_for_url(httpx.URL("http://example.com/"))
        assert out is not client._transport
    assert "corp.example" not in values.get("NO_PROXY", "") or "corp" in os.environ["no_proxy"]


def test_without_proxies_no_variable_is_set(variables: Any) -> None:
    variables()
    environment.prepare_proxies()
    assert "no_proxy" not in os.environ and "http_proxy" not in os.environ


@pytest.mark.parametrize("command", [["serve"], ["generate", "--checkpoint", "small"]])
@pytest.mark.parametrize("proxy", ["socks4://127.0.0.1:9", "http://", "http://h:port", "ftp://h"])
def test_a_proxy_that_cannot_be_used_is_named_in_a_sentence(
    variables: Any, command: list[str], proxy: str, capsys: pytest.CaptureFixture
) -> None:
    variables(ALL_PROXY=proxy)
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ALL_PROXY" in said


# A server of its own, with much that is odd around it

SERVER = """
import sys
from tests.helpers.fakes import FakeBackend
from musicgen_ui.server import app as server, settings
server.leave(server.serve(settings.settings(sys.argv[1:]), FakeBackend(speed=1.0)))
"""
ODD = {
    "GRADIO_DEBUG": "1",
    "GRADIO_NUM_WORKERS": "1",
    "GRADIO_SERVER_NAME": "::",
    "GRADIO_SERVER_PORT": "not mine",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks://127.0.0.1:9/",
    "NO_PROXY": "[::1]",
}


SOME_MUSIC = re.compile(r'"done_s"[\]:, ]+(0\.[1-9]|[1-9])')  # in an update, whole or a difference


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A server that was asked to stop while three pages made takes: what is left of it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "tmp").mkdir()
    command = [sys.executable, "-c", SERVER, "--host", "::1", "--port", str(port)]
    command += ["--output-folder", str(folder / "takes")]
    environment = {**os.environ, **ODD, "TMPDIR": str(folder / "tmp")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
    url = f"http://[::1]:{port}"

    def is_up() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        return "MusicGen UI is at" in (folder / "log").read_text()

    wait_for(is_up, 60)
    config = httpx.get(url + "/config", trust_env=False).json()
    pages = [Page(url, config, duration_s=60) for _ in range(3)]
    try:
        for page in pages:
            wait_for(lambda page=page: SOME_MUSIC.search(page.told) or page.lost, 60)
            assert not page.lost, page.lost
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    finally:
        process.kill()
        for page in pages:
            page.thread.join()
    return SimpleNamespace(code=code, folder=folder, pages=pages, log=(folder / "log").read_text())


def test_a_server_that_is_asked_to_stop_ends_as_asked(ended: SimpleNamespace) -> None:
    assert ended.code == 128 + signal.SIGTERM, ended.log
    assert list((ended.folder / "tmp").iterdir()) == []
    assert "Traceback" not in ended.log


def test_what_its_jobs_made_until_then_is_kept(ended: SimpleNamespace) -> None:
    takes = sorted(file for file in (ended.folder / "takes").iterdir() if file.suffix != ".png")
    assert [take.suffix for take in takes] == [".flac", ".safetensors", ".wav"] * 3
    assert all(0 < soundfile.info(take).duration < 60 for take in takes[::3] + takes[2::3])


def test_its_pages_are_told_of_a_stop_and_of_no_failure(ended: SimpleNamespace) -> None:
    for page in ended.pages:
        assert "unexpected" not in page.told
        assert page.lost or "process_completed" in page.told


# Signals while it starts


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    """The server's process, as a shell begins it."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONFAULTHANDLER": ""}
    command = (sys.executable, *command, "--port", str(free_port()))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=pipe, stdout=pipe, text=True)


@pytest.mark.parametrize(
    ("command", "imported"),
    [
        (("app.py",), "musicgen_ui.cli"),
        (("app.py",), "pydantic_settings"),
        (("-m", "musicgen_ui", "serve"), "numpy"),
        (("-m", "musicgen_ui", "serve"), "gradio"),
    ],
)
def test_ctrl_c_during_imports_is_no_traceback(
    command: tuple[str, ...], imported: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {imported!r}:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        process = started(tmp_path, *command)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_stop_during_the_launch_ends_it_at_once(tmp_path: Path) -> None:
    process = started(tmp_path, "app.py")
    try:
        # Its folder: it is launching.
        wait_for(lambda: list((tmp_path / "tmp").glob("musicgen-ui-*")), 60)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    assert list((tmp_path / "tmp").iterdir()) == []


# How it ends


CHILD = """
import os, signal, sys

def write(*_):
    os.makedirs(sys.argv[1])  # it was deleted before
    os._exit(0)

signal.signal(signal.SIGTERM, write)
print(os.getpid(), flush=True)
signal.pause()
"""
PARENT = f"""
import subprocess, sys
from musicgen_ui import files
from musicgen_ui.server import app as server

folder = files.private_folder(files.SHORT)
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, folder], stdout=subprocess.PIPE)
print(folder, int(child.stdout.readline()), flush=True)
files.delete_private()
server.leave(3)
"""


def test_a_process_that_ends_takes_along_what_it_started() -> None:
    """And what that writes as it ends."""
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    folder, pid = done.stdout.split()
    wait_for(lambda: not psutil.pid_exists(int(pid)))
    assert not Path(folder).exists()


class Drained:
    """A server with one page, which waits for the end of its call."""

    def __init__(self, backend: Admission) -> None:
        self.backend, self.pending = backend, {"call"}
        self._queue = SimpleNamespace(pending_event_ids_session={"page": self.pending})


def test_drained_server_lets_its_jobs_end_and_refuses_new_ones(monkeypatch) -> None:
    monkeypatch.setattr(app, "DRAINED_DELIVERY_S", 1000.0)
    admission = Admission(FakeBackend(speed=10.0), None)
    demo, asked = Drained(admission), app.queue.SimpleQueue()
    short = admission.submit(GenerationRequest(duration_s=3))
    draining = threading.Thread(target=app.drain, args=(demo, asked, 60.0))
    draining.start()
    wait_for(lambda: admission.health().trouble is Trouble.STOPPING)
    with pytest.raises(RequestError, match="being stopped"):
        jobs.read(admission.submit(GenerationRequest()))
    (take,) = jobs.takes(jobs.read(short))
    assert draining.is_alive() and not take.stopped  # its page does not know yet
    demo.pending.clear()
    draining.join(20)
    assert not draining.is_alive()


def test_draining_ends_in_time_or_by_a_second_signal() -> None:
    admission = Admission(FakeBackend(speed=1.0), None)
    demo, asked = Drained(admission), app.queue.SimpleQueue()
    job = admission.submit(GenerationRequest(duration_s=60))
    app.drain(demo, asked, 0.2)
    asked.put(signal.SIGTERM)
    app.drain(demo, asked, 60.0)
    assert not job.ended
    job.stop()


def test_delivery_does_not_wait_for_pages_that_are_gone() -> None:
    demo = Drained(Admission(FakeBackend(), None))
    app.deliver(demo, 0.05)
    assert demo.pending


class Dying:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_is_heeded_wherever_it_comes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    asked: list[int] = []
    with app.stop_signals(asked.append):
        Dying()  # what is raised in here is lost
        assert asked == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_handler_that_a_library_replaced_is_set_again() -> None:
    """As Ray does, below Python."""
    code = (
        "import ctypes, queue, signal, threading, types\n"
        "from musicgen_ui.server import app\n"
        "made = types.SimpleNamespace\n"
        "backend = made(backend=None, health=lambda: made(trouble=None))\n"
        "demo = made(server=made(thread=made(is_alive=lambda: True)), backend=backend)\n"
        "asked = queue.SimpleQueue()\n"
        "with app.stop_signals(asked.put):\n"
        "    ctypes.CDLL(None).signal(signal.SIGTERM, 0)  # the default: it kills\n"
        "    threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()\n"
        "    print(app.wait_for_end(demo, asked, 0.05))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{128 + signal.SIGTERM}\n", done


def test_a_signal_that_the_process_was_told_to_ignore_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
    try:
        asked: list[int] = []
        with app.stop_signals(asked.append):
            signal.raise_signal(signal.SIGINT)
        assert not asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_engine_that_is_closed_while_it_is_built_leaves_no_load_behind() -> None:
    building, go = threading.Event(), threading.Event()
    loaded = []

    class Slow(FakeBackend):
        def preload(self, checkpoint: str) -> None:
            loaded.append(checkpoint)

    def build() -> FakeBackend:
        building.set()
        go.wait()
        return Slow()

    engine = StartingBackend(build, "auto")
    engine.start()
    building.wait()
    threading.Timer(0.1, go.set).start()
    engine.close()
    assert not engine._thread.is_alive() and not loaded


def test_closing_a_manager_ends_the_threads_that_make_music(tiny_mono: Path) -> None:
    from musicgen_ui.backends.local import LocalBackend

    before = set(threading.enumerate())
    backend = LocalBackend(device="cpu", precision="float32")
    job = backend.submit(GenerationRequest(duration_s=20, checkpoint=str(tiny_mono)))
    for count, _ in enumerate(job.follow(), 1):
        if count == 5:
            backend.close()  # while it is in use
            job.stop()
    assert count >= 5
    ended = {"musicgen-job", "musicgen-worker"}
    wait_for(lambda: ended.isdisjoint(each.name for each in set(threading.enumerate()) - before))
