"""Every private interface of Gradio or uvicorn in use: an upgrade that moves one fails here."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio import blocks, component_meta, route_utils, routes, state_holder
from gradio_client.utils import encode_file_path
from starlette.datastructures import Headers

from musicgen_ui.server import gradio_patches
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port
from tests.helpers.requirements import ROOT

GRADIO = Path(gr.__file__).parent


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    demo, temporary = launch(Settings(port=free_port()), FakeBackend())
    yield demo
    close(demo, temporary)


def source(module: Any) -> str:
    return Path(inspect.getfile(module)).read_text(encoding="utf-8")


def test_no_stubs_are_written_at_import() -> None:
    code = "\n".join(
        [
            "from musicgen_ui.server import gradio_import",
            "gradio_import.skip_stubs()",
            "import gradio, gradio.component_meta as meta",
            "print(meta.create_or_modify_pyi.__module__, gradio.Textbox.change.__name__)",
        ]
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert printed.split()[0] == "musicgen_ui.server.gradio_import"
    assert "        create_or_modify_pyi(component_class, name, events)" in source(component_meta)


def test_cors_middleware_is_replaced(demo: Any) -> None:
    kinds = [each.cls for each in demo.app.user_middleware]
    assert gradio_patches.PassThrough in kinds
    assert not any("CORS" in kind.__name__ for kind in kinds)
    assert "app.add_middleware(\n            CustomCORSMiddleware," in source(routes)


def test_upload_parser_takes_files_alone() -> None:
    assert route_utils.GradioMultiPartParser is gradio_patches.upload_parser
    assert "= GradioMultiPartParser(" in inspect.getsource(route_utils.upload_fn)

    async def parse(disposition: str) -> Any:
        async def stream() -> Any:
            yield f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\nx\r\n".encode()
            yield b"--b--\r\n"

        headers = Headers({"content-type": "multipart/form-data; boundary=b"})
        parser = route_utils.GradioMultiPartParser(
            headers, stream(), max_files=1000, max_fields=1000, max_file_size=10
        )
        return await parser.parse()

    form = asyncio.run(parse('name="files"; filename="a.wav"'))
    Path(form["files"].file.name).unlink()
    with pytest.raises(Exception, match="Too many fields"):
        asyncio.run(parse('name="files"'))


def test_components_refuse_urls_before_they_are_fetched(demo: Any) -> None:
    assert blocks.Block.async_move_resource_to_block_cache is gradio_patches.refuse_urls
    used = "block.async_move_resource_to_block_cache("
    assert used in (GRADIO / "processing_utils.py").read_text(encoding="utf-8")
    with pytest.raises(gr.Error, match="instead of a URL"):
        asyncio.run(gr.Audio().async_move_resource_to_block_cache("https://example.com/a.wav"))


def test_url_of_an_upload_is_that_upload(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Gradio's own upload tool gives it to MCP clients; nothing is fetched."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    upload, outside = tmp_path / "cache" / "1f" / "my clip #2.wav", tmp_path / "secret.wav"
    upload.parent.mkdir(parents=True)
    for file in (upload, outside):
        file.write_bytes(b"RIFF")
    (upload.parent / "link.wav").symlink_to(outside)

    def moved(file: str) -> str:
        address = f"http://server/music/gradio_api/file={encode_file_path(file)}"
        return str(asyncio.run(gradio_patches.refuse_urls(gr.Audio(), address)))

    assert Path(moved(str(upload))).read_bytes() == b"RIFF"
    for other in (outside, upload.parent / "link.wav", upload.parent, upload.parent / "none.wav"):
        with pytest.raises(gr.Error, match="instead of a URL"):
            moved(str(other))
    with pytest.raises(gr.Error, match="instead of a URL"):
        moved(f"{upload.parent}/../../secret.wav")


def test_sessions_keep_no_values(demo: Any) -> None:
    session = state_holder.SessionState(demo)
    component = next(iter(demo.blocks))
    assert "self.config_values" in source(state_holder)
    for name in ("_update_value_in_config", "config_values", "blocks_config"):
        assert hasattr(session, name)
    session._update_value_in_config(component, "kept")
    session[component] = demo.blocks[component]
    assert not list(session.components)


def test_refused_calls_are_explained(demo: Any) -> None:
    assert demo.preprocess_data.__name__ == "explained"
    given = list(inspect.signature(blocks.Blocks.preprocess_data).parameters)
    assert given[:3] == ["self", "block_fn", "inputs"]
    assert ".preprocess_data(" in source(blocks)
    wrong = SimpleNamespace(inputs=[gr.Number()])
    with pytest.raises(gr.Error, match="1 values are expected"):
        asyncio.run(demo.preprocess_data(wrong, [], None))


def test_page_and_answers_have_relative_addresses() -> None:
    assert route_utils.get_root_url is gradio_patches.root_url
    assert routes.templates.TemplateResponse is gradio_patches.page_response
    asked = list(inspect.signature(gradio_patches._get_root_url).parameters)
    assert asked == ["request", "route_path", "root_path"]
    assert "route_utils.get_root_url(" in source(routes)
    assert callable(route_utils.update_root_in_config)


def test_page_template_has_the_head_of_this_app(demo: Any) -> None:
    plain, *_ = gradio_patches._get_source(routes.templates.env, "frontend/index.html")
    assert gradio_patches._PREVIEW.search(plain) and "<head>" in plain
    page = httpx.get(demo.local_url).text
    assert page.count(gradio_patches.HEAD) == 1 and 'property="og:image"' not in page


def test_sliders_leave_their_limits_to_the_request() -> None:
    assert gr.Slider(0, 10).preprocess(15) == 15


def test_mcp_server_calls_the_api_with_a_client_of_ours() -> None:
    server = (GRADIO / "mcp.py").read_text(encoding="utf-8")
    assert "def _get_or_create_client(self)" in server
    assert "run_sync(self._get_or_create_client)" in server
    assert "self.mcp_server_obj" in source(blocks)


def test_hang_up_breaks_connections_off() -> None:
    demo, temporary = launch(Settings(port=free_port()), FakeBackend())
    with socket.create_connection(("127.0.0.1", demo.server_port), timeout=10) as connection:
        connection.sendall(b"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        gradio_patches.hang_up(demo.server)
        with pytest.raises(ConnectionResetError):
            while connection.recv(1000):
                pass
            raise ConnectionResetError  # an end of the stream is one, too
    assert not demo.server.thread.is_alive()
    close(demo, temporary)
