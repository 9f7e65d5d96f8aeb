"""The nginx configuration of docs/hosting.md, run by nginx itself in front of a server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import soundfile
from gradio_client import Client

from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port, wait_for

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
MAIN = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/site.conf;
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx")


def documented(**changes: str) -> str:
    """The configuration with shorter times and smaller numbers, so that a test need not wait."""
    text = (ROOT / "docs" / "hosting.md").read_text(encoding="utf-8")
    found = re.search(r"```nginx\n(.*?)```", text, re.DOTALL)
    assert found
    site = found[1]
    for directive, value in changes.items():
        site, count = re.subn(rf"(\b{directive} )[^;]+;", rf"\g<1>{value};", site)
        assert count == 1, directive
    return site


@contextlib.contextmanager
def nginx(folder: Path, **changes: str) -> Iterator[int]:
    """Runs nginx with the site of the documentation; gives its port."""
    port = free_port()
    (folder / "site.conf").write_text(documented(listen=f"127.0.0.1:{port}", **changes))
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder))
    process = subprocess.Popen([str(NGINX), "-p", folder, "-c", folder / "nginx.conf"])

    def listens() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_for(listens, 20)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server as documented, behind nginx with small limits."""
    own = free_port()
    arguments = "--root-path /music --trusted-proxies 127.0.0.1 --allowed-hosts music.example.com"
    demo, temporary = launch(settings([*arguments.split(), "--port", str(own)]), FakeBackend())
    limits = {
        "client_header_timeout": "1s",
        "client_body_timeout": "1s",
        "limit_conn": "connections 4",
        "proxy_pass": f"http://127.0.0.1:{own}/",
    }
    with nginx(tmp_path_factory.mktemp("nginx"), **limits) as port:
        yield SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}/music")
    close(demo, temporary)


def test_nginx_shows_the_page_and_its_api(proxied: SimpleNamespace, tmp_path: Path) -> None:
    host = {"host": "music.example.com", "origin": "http://music.example.com"}
    page = httpx.get(proxied.url + "/", headers=host)
    assert page.status_code == 200 and "MusicGen UI" in page.text
    assert httpx.get(proxied.url + "/healthz").json()["status"] == "ok"
    client = Client(proxied.url, verbose=False, download_files=tmp_path)
    files, _ = client.predict(duration_s=1, api_name="/generate")
    assert soundfile.info(files[0]).duration == 1


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /music/healthz HTTP/1.1\r\nHost: localhost\r\nX-",
        b"POST /music/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["head", "body"],
)
def test_nginx_ends_slow_requests(proxied: SimpleNamespace, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", proxied.port), timeout=20) as slow:
        slow.sendall(begun)
        answer = slow.recv(1000)
        assert answer == b"" or b" 408 " in answer


def test_nginx_bounds_the_connections_of_an_address(proxied: SimpleNamespace) -> None:
    with contextlib.ExitStack() as opened:
        codes = []
        for number in range(5):
            beat = httpx.stream("GET", f"{proxied.url}/gradio_api/heartbeat/{number}", timeout=20)
            codes.append(opened.enter_context(beat).status_code)
    assert codes[0] == 200 and codes[-1] == 503  # the client above may still hold one or two
