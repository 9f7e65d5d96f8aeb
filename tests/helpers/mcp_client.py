"""A client of the MCP tool, run where `mcp` is installed.

mcp_client.py URL USER PASSWORD [STYLE_CHECKPOINT CLIP]
"""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import httpx


def uploaded(url: str, clip: str) -> str:
    """The URL of a clip that was uploaded, as Gradio's `upload_file_to_gradio` gives it."""
    with Path(clip).open("rb") as file:
        answer = httpx.post(f"{url}/gradio_api/upload", files={"files": file})
    return f"{url}/gradio_api/file={answer.json()[0]}"


async def use(
    url: str, user: str, password: str, checkpoint: str = "", clip: str = ""
) -> dict[str, Any]:
    """What the tool is, what it gives, and what it says of a wrong request."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    signed = {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    address = f"{url}/gradio_api/mcp/"
    async with (
        streamablehttp_client(address, headers=signed) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        tools = (await session.list_tools()).tools
        made = await session.call_tool("generate", {"prompt": "waltz", "duration_s": 1, "seed": 4})
        wrong = await session.call_tool("generate", {"duration_s": 9999})
        styled = []
        for style in (uploaded(url, clip), "http://127.0.0.1:9/a.wav") if clip else ():
            asked = {"checkpoint": checkpoint, "style": style, "prompt": "rock", "duration_s": 0.5}
            answer = await session.call_tool("generate", asked | {"seed": 7})
            styled.append([answer.isError, answer.content[0].text])
    files, settings = ast.literal_eval(made.content[0].text)
    request = urllib.request.Request(files[0]["url"], headers=signed)
    with urllib.request.urlopen(request) as response:
        wav = response.read()
    return {
        "tools": {
            tool.name: [tool.description, sorted(tool.inputSchema["properties"])] for tool in tools
        },
        "bytes": len(wav),
        "is_wav": wav[:4] == b"RIFF",
        "settings": settings,
        "wrong": [wrong.isError, wrong.content[0].text],
        "styled": styled,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(use(*sys.argv[1:]))))
