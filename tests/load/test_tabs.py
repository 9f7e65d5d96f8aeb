"""Tabs that are open and do nothing: what they cost those who make music."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from musicgen_ui.ui.request_form import LATER_S
from tests.helpers.local import wait_for
from tests.helpers.visits import Server, client_of, server, submit


@contextlib.contextmanager
def idle_tabs(server: Server, count: int) -> Iterator[None]:
    """Tabs as the server sees them: each asks once when it is opened, which costs more than all
    that comes later, then holds its heartbeat and asks as often as the page."""
    over, all_there = threading.Event(), threading.Event()
    waiting = list(range(count))

    async def ask(http: httpx.AsyncClient, session: str) -> None:
        tick = {"data": [], "fn_index": server.endpoint("status")["id"], "session_hash": session}
        (await http.post("/run/predict", json=tick)).raise_for_status()

    async def go_on_asking(http: httpx.AsyncClient, session: str) -> None:
        await asyncio.sleep(LATER_S * secrets.randbelow(100) / 100)
        while True:
            await ask(http, session)
            await asyncio.sleep(LATER_S)

    async def tab(http: httpx.AsyncClient) -> None:
        session = secrets.token_hex(6)
        await ask(http, session)
        asking = asyncio.create_task(go_on_asking(http, session))
        try:
            async with http.stream("GET", f"/heartbeat/{session}") as beat:
                async for _ in beat.aiter_raw():
                    if waiting:
                        waiting.pop()
                    if not waiting:
                        all_there.set()
        finally:
            asking.cancel()

    async def tabs() -> None:
        # Each request its own connection: the server may close one that waits for the next.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        base = f"{server.url}/gradio_api"
        async with httpx.AsyncClient(base_url=base, timeout=None, limits=limits) as http:
            tasks = [asyncio.create_task(tab(http)) for _ in range(count)]
            while not over.is_set():
                await asyncio.sleep(0.2)
                assert not any(task.done() for task in tasks), [t for t in tasks if t.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(tabs(),))
    thread.start()
    try:
        assert all_there.wait(60), f"{len(waiting)} tabs could not be opened"
        yield
    finally:
        over.set()
        thread.join()


def took_s(server: Server, duration_s: float) -> float:
    """A job's time on the server."""
    client = client_of(server)
    assert submit(client, {"duration_s": duration_s, "seed": 1, "checkpoint": "bundled"}).take
    return float(server.jobs[-1].values["took_s"])


def test_idle_tabs_cost_little_and_leave_nothing(few_places: Server) -> None:
    """Figured in the server's work, which is steadier than time: a tab in a hundred of a core."""
    few_places.settle()
    before = few_places.process.num_fds()
    with idle_tabs(few_places, 20):
        used = few_places.process.cpu_times()
        threading.Event().wait(2)
        now = few_places.process.cpu_times()
        assert took_s(few_places, 1.0)
    assert now.user + now.system - used.user - used.system < 1.0
    wait_for(lambda: few_places.process.num_fds() <= before + 4, 60)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_idle_tabs_slow_no_job(tmp_path: Path) -> None:
    """With 200 tabs and without, in turns: the middle of the ratios tells."""
    (tmp_path / "server").mkdir()
    with server(tmp_path / "server") as running:
        took_s(running, 2.0)
        ratios = []
        for turn in range(7):
            running.settle()
            time.sleep(5)  # tabs that come and go cost more than those that stay
            alone_s = took_s(running, 60.0)
            with idle_tabs(running, 200):
                time.sleep(5)
                beside_s = took_s(running, 60.0)
            ratios.append(beside_s / alone_s)
            print(f"{turn}: {alone_s:.1f} s alone, {beside_s:.1f} s beside 200 tabs")
        slower = float(np.median(ratios)) - 1
        print(f"slower by {slower:.1%}")
        assert slower < 0.05
