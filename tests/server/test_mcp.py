"""The MCP tool, which needs an older pydantic than the rest: in an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from musicgen_ui.request import FIELDS
from tests.helpers.local import free_port

TESTS = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_clean_environment_serves_the_tool_behind_a_password(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    python = tmp_path / "environment" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "-r"]
    subprocess.run([*install, TESTS.parent / "requirements-mcp.txt"], check=True, timeout=3000)
    serves_the_tool(python)


def serves_the_tool(python: Path) -> None:
    """Starts a server with the real engine and uses its tool."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [python, "-m", "musicgen_ui", "serve", "--mcp", "--port", str(port)]
    secret = os.environ | {"MUSICGEN_UI_AUTH": "ann:secret"}
    server = subprocess.Popen(command, cwd=TESTS.parent, env=secret)
    try:
        until_s = time.monotonic() + 240
        while not answers(url):
            assert server.poll() is None and time.monotonic() < until_s
            time.sleep(0.2)
        assert httpx.get(f"{url}/gradio_api/mcp/").status_code == 401
        client = [python, TESTS / "helpers" / "mcp_client.py", url, "ann", "secret"]
        told = json.loads(subprocess.check_output(client, text=True, timeout=300))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    ((name, (description, parameters)),) = told["tools"].items()
    assert name == "generate" and description.startswith("Makes music from words")
    assert parameters == sorted(FIELDS)
    assert told["is_wav"] and told["bytes"] > 16_000 * 2  # a second of 16 kHz
    assert told["settings"]["seed"] == 4 and told["settings"]["prompt"] == "waltz"
    assert told["wrong"][0] and told["wrong"][1].startswith("Length must be between")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False
