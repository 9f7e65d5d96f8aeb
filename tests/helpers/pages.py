"""A page without a browser: the calls that its scripts make."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import httpx


class Page:
    """A page that makes a take, as the server sees it.

    Args:
        url: of the server.
        config: what it answers to /config.
        values: of the form, by field; the others are its defaults.
    """

    def __init__(self, url: str, config: dict[str, Any], **values: Any) -> None:
        self.url, self.told, self.lost = url + "/gradio_api", "", ""
        self.events = {event["api_name"]: event for event in config["dependencies"]}
        self.defaults = {each["id"]: each["props"] for each in config["components"]}
        self.values, self.session = values, secrets.token_hex(6)
        self.thread = threading.Thread(target=self.make)
        self.thread.start()

    def make(self) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
                for name in ("compose", "land"):  # the take is made, then shown
                    self.call(http, name)
                    query = {"session_hash": self.session}
                    with http.stream("GET", "/queue/data", params=query) as stream:
                        for line in stream.iter_lines():
                            self.told += line
        except httpx.HTTPError as error:
            self.lost = repr(error)

    def call(self, http: httpx.Client, name: str) -> None:
        event = self.events[name]
        shown = [self.defaults[each] for each in event["inputs"]]
        data = [self.values.get(each.get("elem_id", ""), each.get("value")) for each in shown]
        body = {"fn_index": event["id"], "session_hash": self.session, "data": data}
        http.post("/queue/join", json=body).raise_for_status()

    def stop(self) -> None:
        """A click on Stop."""
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            self.call(http, "stop")
