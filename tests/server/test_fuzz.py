"""Damaged files, arbitrary fields and arbitrary requests: each ends in music or in a sentence.

The long tests do the same for minutes: `pytest -m long tests/server/test_fuzz.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import schemathesis

# Now: deep JSON upsets Python 3.11's parser for a while.
import schemathesis.specs.openapi.schemas
import schemathesis.transport.wsgi
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from musicgen_ui import takes
from musicgen_ui.audio import load
from musicgen_ui.cli import rows
from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS, GenerationRequest
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers import mutated
from tests.helpers.fakes import FakeBackend

# files


def examine(path: Path) -> str:
    """Reads a file as an upload is read; "music" or the sentence that refuses it."""
    held = takes.read_settings(path)
    assert held is None or GenerationRequest.parse({k: v for k, v in held.items() if k in FIELDS})
    try:
        reading = load.read(path)
    except RequestError as error:
        said = str(error)
        assert said.endswith(".") and said[0].isupper() and len(said) < 400
        assert not any(word in said for word in ("Error", "Traceback", "0x", "av.", str(path)))
        return re.split("[,:]", said, maxsplit=1)[0]
    clip = reading.clip
    assert clip.samples.dtype == np.float32 and np.isfinite(clip.samples).all()
    assert np.abs(clip.samples).max() <= 1.0001 and clip.channels in (1, 2)
    assert 4_000 <= clip.sampling_rate <= 48_000 and 0 < clip.duration_s <= 120.01
    assert all(note.endswith((".", "…")) for note in reading.notes)
    return "music"


def fuzz(folder: Path, ending: str, count: int, first: int = 0) -> Counter[str]:
    """What became of `count` mutated files; each is made from its number alone."""
    wholes = mutated.seeds(folder, ending)
    ends: Counter[str] = Counter()
    path, process = folder / f"mutated.{ending}", psutil.Process()
    for whole in wholes:
        path.write_bytes(whole)
        assert examine(path) == "music"  # and whatever is imported, is
    before = process.memory_info().rss
    for number in range(first, first + count):
        path.write_bytes(mutated.mutate(wholes[number % len(wholes)], random.Random(number)))
        began_s = time.monotonic()
        try:
            ends[examine(path)] += 1
        except Exception as error:
            raise AssertionError(f"{ending} {number}") from error
        assert time.monotonic() - began_s < 130, number
        assert process.memory_info().rss - before < 300e6, number
    return ends


@pytest.mark.parametrize(
    ("ending", "count"), [*((e, 14) for e in mutated.WITH_SOUNDFILE), ("m4a", 2), ("webm", 2)]
)
def test_a_damaged_file_is_music_or_a_sentence(ending, count, tmp_path):
    assert fuzz(tmp_path, ending, count).total() == count


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("ending", "count"), [*((e, 500) for e in mutated.WITH_SOUNDFILE), ("m4a", 60), ("webm", 60)]
)
def test_thousands_of_damaged_files_are_music_or_a_sentence(ending, count, tmp_path):
    ends = fuzz(tmp_path, ending, count, first=1000)
    print(ending, dict(ends))
    assert ends.total() == count and ends["music"]


# fields

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=50)
    | st.binary(max_size=20)
    | st.just("9" * 5_000)
    | st.just("é" * 10_000)
    | st.sampled_from(["nan", "inf", "-0", "1e400", "true", "OFF", "0x10", "1_0", "٣", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)
REQUEST = st.dictionaries(st.sampled_from(list(FIELDS)), ANYTHING, max_size=6)


def check_request(values: dict) -> None:
    try:
        request = GenerationRequest.parse(values)
    except RequestError as error:
        said = str(error)
        assert error.field in FIELDS and len(said) < 600 and said.isprintable(), said
        return
    told = request.settings()
    assert json.loads(json.dumps(told)) == told
    assert GenerationRequest.parse(told).settings() == told  # what a file carries makes it again
    for name, value in told.items():
        about = FIELDS[name].metadata
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert math.isfinite(value) and about["min"] <= value <= about["max"]
        if isinstance(value, str):
            assert len(value) <= about["max"] and value.encode() is not None
    assert request.words(0).encode() is not None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(REQUEST)
@example({"sections": "[" * 100_000})
@example({"sections": [[0, "a"]] * 51})
@example({"sections": [[float("nan"), "a"]]})
@example({"seed": 2**64})
@example({"duration_s": "30" + "0" * 400})
@example({"stereo": "\ud7fc\ud800\x1b[31m", "key": "\x1b]0;"})
@example({"tempo_bpm": "\ud800"})
def test_any_field_is_taken_or_refused_in_a_sentence(values):
    check_request(values)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(REQUEST)
def test_any_field_is_taken_or_refused_in_a_sentence_for_long(values):
    check_request(values)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*FIELDS, "nonesuch"]), ANYTHING, max_size=5))
def test_any_row_of_a_batch_is_taken_or_refused_in_a_sentence(values):
    values = {name: value for name, value in values.items() if value is not None}
    with contextlib.suppress(RequestError):
        pieces = rows.Pieces({}, Path("/nonexistent")).of(rows.Row(1, values))
        names = [name for piece in pieces for name in piece.names]
        assert all(name.isprintable() and len(name.encode()) < 240 for name in names)
        assert not any("/" in name for name in names)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([".txt", ".csv", ".jsonl"]), st.binary(max_size=300) | st.text(max_size=300))
def test_any_batch_file_is_rows_or_a_sentence(ending, content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"batch{ending}"
        if isinstance(content, str):
            content = content.encode("utf-8", "ignore")
        file.write_bytes(content)
        with contextlib.suppress(RequestError):
            assert rows.read(file)


# the API

ENDLESS = ("heartbeat", "queue/data", "upload_progress")  # these stream until they are left


@pytest.fixture(scope="module")
def api() -> Iterator[schemathesis.BaseSchema]:
    """Every route of an open server, Gradio's included, as its own schema describes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo, temporary = launch(Settings(port=port, max_upload_mb=2), FakeBackend())
    described = {**demo.app.openapi(), "servers": [{"url": f"http://127.0.0.1:{port}"}]}
    paths = (
        described["paths"]
        | httpx.get(f"http://127.0.0.1:{port}/gradio_api/openapi.json").json()["paths"]
    )
    described["paths"] = {
        path: methods for path, methods in paths.items() if not any(e in path for e in ENDLESS)
    }
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=f"http://127.0.0.1:{port}")
    yield schema
    close(demo, temporary)


def call_everything(api: schemathesis.BaseSchema, count: int, only: str = "") -> int:
    """Calls routes `count` times with what their schemas allow and forbid; how many routes."""
    routes = 0
    for found in api.get_all_operations():
        if not re.search(only, found.ok().path):
            continue
        routes += 1
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for mode in modes:

            @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
            @given(found.ok().as_strategy(generation_mode=mode))
            def call(case: schemathesis.Case) -> None:
                answer = case.call(timeout=30, allow_redirects=False)
                where = (case.method, case.formatted_path, case.body)
                assert answer.status_code < 500, (*where, answer.text)
                assert not any(word in answer.text for word in ("Traceback", "site-packages"))

            with contextlib.suppress(Unsatisfiable):  # nothing is forbidden there
                call()
    return routes


def test_no_call_of_the_api_is_a_fault_of_the_server(api):
    assert call_everything(api, 1, "/(generate|upload|queue/join|cancel)$") >= 4


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_call_of_the_api_is_a_fault_of_the_server_for_long(api):
    assert call_everything(api, 40) > 30
