"""A server that speaks S3 on this computer: `pip install s3fs "moto[server]"`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

HAS_S3 = find_spec("s3fs") is not None and find_spec("moto") is not None
needs_s3 = pytest.mark.skipif(not HAS_S3, reason="needs s3fs and moto[server]")


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Runs the server; yields the environment in which s3:// is it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    try:
        yield {
            **keys,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
