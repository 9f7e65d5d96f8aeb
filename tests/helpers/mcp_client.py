"""A client of the MCP tool, run where `mcp` is installed: mcp_client.py URL USER PASSWORD."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import sys
import urllib.request
from typing import Any


async def use(url: str, user: str, password: str) -> dict[str, Any]:
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
    files, settings = ast.literal_eval(made.content[0].text)
    asked = urllib.request.Request(files[0]["url"], headers=signed)
    with urllib.request.urlopen(asked) as answer:
        wav = answer.read()
    return {
        "tools": {
            tool.name: [tool.description, sorted(tool.inputSchema["properties"])] for tool in tools
        },
        "bytes": len(wav),
        "is_wav": wav[:4] == b"RIFF",
        "settings": settings,
        "wrong": [wrong.isError, wrong.content[0].text],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(use(*sys.argv[1:]))))
