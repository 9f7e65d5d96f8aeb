"""Page, API, MCP and command line do the same over every backend; see also tests/browser.

Over a Ray cluster: `python -m pytest -m ray tests/server/test_ways_in.py`. The MCP tool is tested
where requirements-mcp.txt is installed too.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from musicgen_ui import __main__ as cli
from musicgen_ui import takes
from musicgen_ui.audio import load
from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.backends import KINDS, OPTIONS, backend_of
from tests.helpers.engine import noise
from tests.helpers.jobs import made
from tests.helpers.local import free_port, wait_for
from tests.helpers.pages import Page
from tests.helpers.requirements import ROOT

HAS_MCP = find_spec("mcp") is not None
ASKED = {"prompt": "rock", "duration_s": 0.5, "seed": 7}


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tiny_mono: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A server over one of the backends."""
    folder = tmp_path_factory.mktemp("takes")
    with backend_of(request.param, tiny_mono) as backend:
        chosen = Settings(
            port=free_port(), checkpoint=str(tiny_mono), output_folder=str(folder), mcp=HAS_MCP
        )
        demo, temporary = launch(chosen, backend)
        url = f"http://127.0.0.1:{chosen.port}"
        yield SimpleNamespace(url=url, backend=backend, folder=folder, kind=request.param)
        close(demo, temporary)


@pytest.fixture(scope="module")
def whole(tiny_mono: Path) -> Iterator[Finished]:
    """The take of `ASKED`, from a single process."""
    backend = LocalBackend(**OPTIONS)
    *_, finished = made(backend, GenerationRequest(checkpoint=str(tiny_mono), **ASKED))
    yield finished
    backend.close()


def equals(path: Path | str, take: Finished) -> bool:
    samples, _ = soundfile.read(path, always_2d=True)
    return samples.any() and np.allclose(samples.T, take.clip.samples, atol=1e-3)  # 16 bits


def test_api_gives_the_take_and_its_settings(served, whole, tiny_mono, tmp_path):
    client = Client(served.url, verbose=False, download_files=tmp_path)
    files, settings = client.predict(**ASKED, checkpoint=str(tiny_mono), api_name="/generate")
    assert equals(files[0], whole) and settings["seed"] == 7
    assert (takes.read_settings(files[0]) or {})["prompt"] == "rock" == settings["prompt"]
    kept = sorted(path.suffix for path in served.folder.iterdir() if path.stem[0] != ".")
    assert kept[:3] == [".flac", ".safetensors", ".wav"]


def test_api_refuses_with_a_sentence(served, tmp_path):
    client = Client(served.url, verbose=False)
    with pytest.raises(AppError, match="There is no checkpoint"):
        client.predict(checkpoint=str(tmp_path / "none"), api_name="/generate")


def test_cancelled_call_stops_its_job(served, tiny_mono):
    client = Client(served.url, verbose=False)
    asked = ASKED | {"duration_s": 300, "checkpoint": str(tiny_mono)}
    job = client.submit(**asked, api_name="/generate")
    wait_for(lambda: served.backend.health().jobs, 60)
    job.cancel()
    wait_for(lambda: not served.backend.health().jobs, 30)


def test_page_shows_the_take_and_stops_when_it_is_told(served, tiny_mono):
    config = httpx.get(f"{served.url}/config").json()
    page = Page(served.url, config, duration_s=0.5, checkpoint=str(tiny_mono))
    page.thread.join(120)
    assert not page.lost and '"finished"' in page.told and ".wav" in page.told
    before = set(served.folder.glob("*.wav"))
    page = Page(served.url, config, duration_s=300, checkpoint=str(tiny_mono))
    wait_for(lambda: '"composing"' in page.told, 60)  # Stop is shown with it
    page.stop()
    page.thread.join(60)
    assert not page.thread.is_alive() and '"stopped"' in page.told
    (take,) = set(served.folder.glob("*.wav")) - before
    assert 0 < soundfile.info(take).duration < 300


def test_health_and_metrics_speak_of_the_backend(served, tiny_mono):
    made(served.backend, GenerationRequest(checkpoint=str(tiny_mono), **ASKED))
    health = httpx.get(f"{served.url}/healthz")
    assert health.status_code == 200 and str(tiny_mono) in health.json()["engine"]
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "musicgen_up 1.0" in metrics
    assert ("musicgen_replica_up" in metrics) == (served.kind != "local")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.wav"
    soundfile.write(path, noise(3.5, seed=3).samples.T, 32_000)
    return path


@pytest.fixture(scope="module")
def styled(tiny_style: Path, clip: Path) -> Iterator[Finished]:
    """A take of `ASKED` in the style of the clip, from a single process."""
    backend, style = LocalBackend(**OPTIONS), load.read(clip).clip
    *_, take = made(backend, GenerationRequest(checkpoint=str(tiny_style), style=style, **ASKED))
    yield take
    backend.close()


def test_api_takes_on_the_style_of_a_clip(served, styled, clip, tiny_style, tmp_path):
    """Once as one take, once as one that is steered on its way as in live mode."""
    if served.kind != "local":
        pytest.skip("its replicas have one checkpoint")
    client = Client(served.url, verbose=False, download_files=tmp_path)
    asked = ASKED | {"checkpoint": str(tiny_style), "api_name": "/generate"}
    files, settings = client.predict(**asked, style=handle_file(clip))
    assert equals(files[0], styled) and settings["style_s"] == 3.5
    rows = [[0, {"prompts": [["rock", 1.0]]}], [0.2, {"prompts": [["piano", 1.0]]}]]
    steered, settings = client.predict(**asked, style=handle_file(clip), automation=rows)
    assert settings["automation"] == rows and not equals(steered[0], styled)
    with pytest.raises(AppError, match="from words, from the style of a clip, or from both"):
        client.predict(**asked | {"prompt": ""})


@pytest.mark.skipif(not HAS_MCP, reason="needs requirements-mcp.txt")
def test_mcp_tool_takes_on_the_style_of_a_clip(served, styled, clip, tiny_style):
    if served.kind != "local":
        pytest.skip("its replicas have one checkpoint")
    client = [sys.executable, ROOT / "tests" / "helpers" / "mcp_client.py", served.url, "a", "b"]
    client += [tiny_style, clip]
    made, fetched = json.loads(subprocess.check_output(client, text=True, timeout=300))["styled"]
    files, settings = ast.literal_eval(made[1])
    assert not made[0] and settings["style_s"] == 3.5 and equals(files[0]["path"], styled)
    assert fetched == [True, "Upload the file instead of a URL."]


@pytest.mark.skipif(not HAS_MCP, reason="needs requirements-mcp.txt")
def test_mcp_tool_gives_the_take(served):
    client = [sys.executable, ROOT / "tests" / "helpers" / "mcp_client.py", served.url, "a", "b"]
    told = json.loads(subprocess.check_output(client, text=True, timeout=300))
    assert told["is_wav"] and told["settings"]["seed"] == 4
    assert told["wrong"][0] and told["wrong"][1].startswith("Length must be between")


def run_command(kind: str, arguments: list[str]) -> None:
    """Runs the command line: here, or beside a cluster in a process of its own."""
    if kind != "ray":
        assert cli.main(arguments) == 0
        return
    import ray

    address = ["--ray-address", ray.get_runtime_context().gcs_address]
    command = [sys.executable, "-m", "musicgen_ui", *arguments, *address]
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    print(f"the command took {time.monotonic() - began_s:.1f} s")


def test_command_line_gives_the_take(served, whole, tiny_mono, tmp_path):
    if served.kind == "front":
        pytest.skip("replicas in this process have no address")
    flags = ["--duration", "0.5", "--seed", "7", "--checkpoint", str(tiny_mono)]
    if served.kind == "local":
        flags += ["--device", "cpu", "--precision", "float32"]
    out, rows, folder = tmp_path / "out.wav", tmp_path / "rows.txt", tmp_path / "batch"
    run_command(served.kind, ["generate", "rock", *flags, "-o", str(out)])
    assert equals(out, whole)
    rows.write_text("rock\npiano\n")
    run_command(served.kind, ["generate", "--batch", str(rows), *flags, "-o", str(folder)])
    assert len(list(folder.glob("*.wav"))) == 2
