"""The API as `gradio_client` sees it, and what the server refuses, over a real local server."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port


@pytest.fixture(scope="module")
def engine() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def url(engine: FakeBackend) -> Iterator[str]:
    chosen = Settings(port=free_port(), queue_length=2, max_upload_mb=2)
    demo, temporary = launch(chosen, engine)
    yield f"http://127.0.0.1:{chosen.port}"
    close(demo, temporary)
    assert not temporary.exists()


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@contextlib.contextmanager
def slowly(engine: FakeBackend, speed: float) -> Iterator[None]:
    engine.speed = speed
    try:
        yield
    finally:
        engine.speed = 0.0


def test_every_parameter_is_optional_and_has_the_requests_name(client: Client) -> None:
    told: Any = client.view_api(return_format="dict", print_info=False)
    assert list(told["named_endpoints"]) == ["/generate"]  # the page's own are private
    parameters = told["named_endpoints"]["/generate"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == list(FIELDS)
    assert all(p["parameter_has_default"] for p in parameters)
    defaults = {p["parameter_name"]: p["parameter_default"] for p in parameters}
    # None is what the checkpoint states, else the request's default.
    own = dict.fromkeys(CHECKPOINT_FIELDS)
    own |= {"sections": [], "automation": []}  # JSON has no tuples
    assert defaults == {name: spec.default for name, spec in FIELDS.items()} | own


def test_predict_without_anything_gives_files_and_settings(client: Client) -> None:
    files, settings = client.predict(api_name="/generate")
    assert [Path(f).suffix for f in files] == [".wav", ".flac"]
    assert soundfile.info(files[0]).duration == 10.0 == settings["duration_s"]
    assert settings["prompt"] == "" and settings["seed"] >= 0
    assert "path" not in str(settings) and ".wav" not in str(settings)


def test_settings_reach_the_engine(client: Client, engine: FakeBackend, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.full(16_000, 0.1), 16_000)
    files, settings = client.predict(
        prompt="slow waltz",
        audio_prompt=handle_file(clip),
        duration_s=2,
        guidance_scale=15.5,  # more than the page's slider offers
        stereo=True,
        seed=3,
        variations=2,
        api_name="/generate",
    )
    assert len(files) == 4 and soundfile.info(files[0]).channels == 2
    assert soundfile.info(files[0]).duration == 3.0
    request = engine.requests[-1]
    assert (request.prompt, request.guidance_scale, request.seed) == ("slow waltz", 15.5, 3)
    assert request.audio_prompt is not None and request.audio_prompt.duration_s == 1.0
    assert [take["seed"] for take in settings["takes"]] == [3, 4]


def test_automation_is_a_parameter_and_comes_back(client: Client, engine: FakeBackend) -> None:
    rows = [[0.0, {"prompts": [["rock", 0.75], ["piano", 0.25]]}], [0.5, {"top_k": 5}]]
    _, settings = client.predict(duration_s=1, automation=rows, skip_s=2, api_name="/generate")
    assert (settings["automation"], settings["skip_s"]) == (rows, 2.0)
    (_, mix), (at_s, change) = engine.requests[-1].automation
    assert mix.prompts == (("rock", 0.75), ("piano", 0.25)) and (at_s, change.top_k) == (0.5, 5)
    with pytest.raises(AppError, match="row 1 must change one or more"):
        client.predict(automation=[[0, {"volume": 3}]], api_name="/generate")


def test_reports_of_what_was_played_are_the_owners_alone(url: str) -> None:
    for body in ({"samples": 5, "underruns": 0}, {"samples": -1}, {}):
        headers = {"x-session": "mine"}
        assert httpx.post(f"{url}/jobs/other/played", json=body, headers=headers).status_code == 404


def test_submit_tells_progress(client: Client, engine: FakeBackend) -> None:
    with slowly(engine, 8):
        job = client.submit(duration_s=4, api_name="/generate")
        job.result()
    told = [progress["status"] for nothing, progress in job.outputs()[:-1]]
    assert any(line.startswith("Composing") for line in told)
    assert job.outputs()[-1][0]


def test_a_caller_hears_the_take_while_it_is_made(client: Client, engine: FakeBackend) -> None:
    with slowly(engine, 4):
        job = client.submit(duration_s=4, api_name="/generate")
        progress = next(iter(job))[1]
        asked: Any = {"params": {"format": "opus"}, "headers": {"x-session": client.session_hash}}
        address = f"{client.src}jobs/{progress['job']}/audio"
        with httpx.stream("GET", address, **asked) as answer:
            pages = answer.iter_bytes()
            beginning = next(pages)
            assert not job.done()
            sound = beginning + b"".join(pages)
    assert job.result()[1]["made_s"] == soundfile.info(io.BytesIO(sound)).duration == 4
    stranger: Any = asked | {"headers": {"x-session": "other"}}
    assert httpx.get(address, **stranger).status_code == 404


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"duration_s": 301}, "Length must be"),
        ({"duration_s": "long"}, "Length must be"),
        ({"prompt": "x" * 2001}, "shorten it to 2,000"),
        ({"variations": 2.5}, "Variations must be"),
        ({"checkpoint": "nonsense"}, "There is no checkpoint"),
    ],
)
def test_errors_are_sentences(client: Client, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AppError, match=said):
        client.predict(**changes, api_name="/generate")


def test_a_misspelt_parameter_is_noticed(client: Client) -> None:
    with pytest.raises(TypeError, match="lenght_s"):
        client.predict(lenght_s=3, api_name="/generate")


def test_a_full_queue_says_so(client: Client, engine: FakeBackend) -> None:
    with slowly(engine, 1):
        jobs = [client.submit(duration_s=30, api_name="/generate") for _ in range(2)]
        while engine.running < 2:
            time.sleep(0.02)
        with pytest.raises(AppError, match="queue is full"):
            client.predict(api_name="/generate")
        for job in jobs:
            job.cancel()
        while engine.running:
            time.sleep(0.02)


def test_a_cancelled_job_leaves_the_engine(client: Client, engine: FakeBackend) -> None:
    with slowly(engine, 1):
        job = client.submit(duration_s=30, api_name="/generate")
        while not engine.running:
            time.sleep(0.02)
        job.cancel()
        waited = threading.Event()
        for _ in range(200):
            if not engine.running:
                break
            waited.wait(0.02)
        assert engine.running == 0


@pytest.mark.parametrize("path", ["run/generate", "api/generate", "call/generate"])
def test_there_is_no_way_round_the_queue(url: str, engine: FakeBackend, path: str) -> None:
    before = len(engine.requests)
    answer = httpx.post(
        f"{url}/gradio_api/{path}", json={"data": [s.default for s in FIELDS.values()]}
    )
    if path.startswith("call"):  # queued like any other
        assert answer.status_code == 200
        return
    assert answer.status_code >= 400 and len(engine.requests) == before


def test_a_file_of_the_server_cannot_be_named_as_a_clip(url: str, engine: FakeBackend) -> None:
    values = [spec.default for spec in FIELDS.values()]
    values[list(FIELDS).index("audio_prompt")] = {
        "path": str(Path(__file__).resolve()),
        "meta": {"_type": "gradio.FileData"},
    }
    before = len(engine.requests)
    call = f"{url}/gradio_api/call/generate"
    event = httpx.post(call, json={"data": values}).json()["event_id"]
    told = httpx.get(f"{call}/{event}", timeout=30).text
    assert "event: error" in told and "uploaded" in told
    assert not any(request.audio_prompt for request in engine.requests[before:])


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        ("clip.wav", "audio_prompt must be a file"),  # of the caller's, not handed over
        (7, "audio_prompt must be a file"),
        (
            {"path": "https://example.com/a.wav", "meta": {"_type": "gradio.FileData"}},
            "instead of a URL",
        ),
    ],
)
def test_a_clip_that_cannot_be_taken_is_told_why(client: Client, clip: Any, said: str) -> None:
    with pytest.raises(AppError, match=said):
        client.predict(audio_prompt=clip, api_name="/generate")


def test_a_call_of_the_wrong_shape_is_told_why(url: str) -> None:
    call = f"{url}/gradio_api/call/generate"
    event = httpx.post(call, json={"data": ["waltz"]}).json()["event_id"]
    told = httpx.get(f"{call}/{event}", timeout=30).text
    assert "event: error" in told and f"{len(FIELDS)} values" in told
    unknown = httpx.post(f"{url}/gradio_api/call/nothing", json={"data": []})
    assert unknown.status_code == 400 and "Use via API" in unknown.text


def test_no_page_has_an_address_fetched_after_its_components_were_made_anew(url: str) -> None:
    config = httpx.get(f"{url}/config").json()
    event = next(e for e in config["dependencies"] if e["api_name"] == "clip")
    address = {"path": "http://127.0.0.1:9/a.wav", "meta": {"_type": "gradio.FileData"}}
    for clip in (None, address):  # the first answer leaves the clip out, which makes it anew
        given = {
            "data": [clip, 10, 0, 12, {}, None],
            "fn_index": event["id"],
            "session_hash": "anew",
        }
        answer = httpx.post(f"{url}/gradio_api/run/predict", json=given)
    assert "instead of a URL" in answer.json()["error"]


def test_oversize_bodies_are_refused(url: str) -> None:
    big = {"data": ["x" * 5_000_000]}
    assert httpx.post(f"{url}/gradio_api/queue/join", json=big).status_code == 413
    upload = {"files": ("a.wav", b"x" * 3_000_000)}
    assert httpx.post(f"{url}/gradio_api/upload", files=upload).status_code == 413


def test_nothing_but_what_is_shown_is_served(url: str) -> None:
    root = Path(__file__).parents[2]
    for path in (root / "README.md", root / "app.py", Path("/etc/passwd")):
        assert httpx.get(f"{url}/gradio_api/file={path}").status_code in (403, 404)


def test_health(url: str) -> None:
    told = httpx.get(f"{url}/healthz").json()
    assert (told["status"], told["engine"]) == ("ok", "fake · CPU · float32 · 1 MB")


def test_the_page_names_nothing_outside(url: str) -> None:
    page = httpx.get(url).text
    for outside in ("googleapis", "gstatic", "huggingface.co", "cdn."):
        assert outside not in page
