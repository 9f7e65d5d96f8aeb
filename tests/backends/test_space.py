"""A Space on hardware of its own: the card, the files it starts from, and a start as there.

The short start uses the environment of the tests; the long one, marked `long`, installs
requirements.txt into a clean one first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile
import yaml
from gradio_client import Client
from packaging.requirements import Requirement

from musicgen_ui.checkpoints import registry
from musicgen_ui.server.settings import settings

ROOT = Path(__file__).parents[2]
CARD: dict[str, Any] = yaml.safe_load((ROOT / "README.md").read_text("utf-8").split("---\n")[1])
# The Hub's reference of a Space's settings, those that this card may need.
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
HARDWARE = {
    *("cpu-basic", "cpu-upgrade", "zero-a10g", "t4-small", "t4-medium", "l4x1", "l4x4"),
    *("l40sx1", "l40sx4", "l40sx8", "a10g-small", "a10g-large", "a10g-largex2", "a10g-largex4"),
    *("a100-large", "h100", "h100x8"),
}
FIELDS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version"),
    *("app_file", "app_port", "base_path", "fullWidth", "header", "short_description", "license"),
    *("models", "datasets", "tags", "thumbnail", "pinned", "suggested_hardware"),
    *("preload_from_hub", "startup_duration_timeout", "custom_headers", "disable_embedding"),
}
BINARY = {".safetensors", ".bin", ".npz", ".wav", ".flac", ".png"}
ON_ZERO_GPU = {"2.8.0", "2.9.1", "2.10.0", "2.11.0"}  # torch
NOBODY = 65534
# What Python may say of an event loop that Gradio made and never closed, when it is collected.
UNCLOSED = re.compile(
    r"Exception ignored in: <function BaseEventLoop.__del__.*?\nValueError.*?\n", re.S
)


def uploaded() -> list[Path]:
    """The files that are uploaded: what .gitignore does not name, or all where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [f.relative_to(ROOT) for f in ROOT.rglob("*") if f.is_file()]
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_the_card_has_the_hubs_fields_within_their_limits() -> None:
    assert set(CARD) <= FIELDS
    for name in ("title", "emoji", "short_description", "license", "app_file"):
        assert CARD[name] and isinstance(CARD[name], str)
    assert len(CARD["short_description"]) <= 60
    assert len(CARD["emoji"]) <= 2 and not CARD["emoji"].isascii()
    assert {CARD["colorFrom"], CARD["colorTo"]} <= COLOURS
    assert CARD["suggested_hardware"] in HARDWARE
    assert (ROOT / CARD["app_file"]).is_file() and CARD["sdk"] == "gradio"
    assert CARD["sdk_version"] == importlib.metadata.version("gradio")
    assert isinstance(CARD["sdk_version"], str) and isinstance(CARD["python_version"], str)
    assert CARD["python_version"] in ("3.12.12", "3.10.13")  # what ZeroGPU has
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", model) for model in CARD["models"])


def test_the_default_of_a_gpu_is_preloaded() -> None:
    preloaded = [line.split()[0] for line in CARD["preload_from_hub"]]
    assert registry.DEFAULT_ON_GPU in preloaded and set(preloaded) <= set(CARD["models"])


def test_torch_comes_first_in_a_release_that_zero_gpu_has() -> None:
    lines = re.sub(r"#.*", "", (ROOT / "pre-requirements.txt").read_text()).split()
    (first,) = map(Requirement, lines)
    (pin,) = first.specifier
    assert first.name == "torch" and pin.operator == "==" and pin.version in ON_ZERO_GPU
    wanted = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text()).splitlines()
    torch = next(Requirement(line) for line in wanted if line.startswith("torch"))
    assert torch.specifier.contains(pin.version)  # or it would be replaced
    gradio = next(Requirement(line) for line in wanted if line.startswith("gradio"))
    assert gradio.specifier.contains(CARD["sdk_version"])


def test_binary_files_go_through_lfs_when_pushed_by_git() -> None:
    assert {file.suffix for file in uploaded()} & BINARY
    lines = (ROOT / ".gitattributes").read_text().splitlines()
    through_lfs = {line.split()[0][1:] for line in lines if "filter=lfs" in line}
    for file in uploaded():
        if b"\0" in (ROOT / file).read_bytes()[:8000]:
            assert file.suffix in through_lfs, file


def test_a_space_listens_where_the_hub_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "owner/name")
    there = settings([])
    assert (there.host, there.port) == ("0.0.0.0", CARD.get("app_port", 7860))
    assert not there.any_checkpoint and not there.auth and there.checkpoint == "auto"


@pytest.fixture
def read_only_tree(tmp_path: Path) -> Iterator[Path]:
    """The files as a Space has them, which nobody may change."""
    tree = tmp_path / "app"
    for file in uploaded():
        if file.parts[0] not in ("tests", "training", ".ci"):
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, tree / file)
    folders = [tree, *(path for path in tree.rglob("*") if path.is_dir())]
    for path in [*tree.rglob("*"), tree]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield tree
    for folder in folders:
        folder.chmod(0o755)


def as_nobody() -> list[str]:
    """What runs a command as a user who may read, since tests live in a home, and write nothing."""
    if os.geteuid() != 0:
        return []
    reads = ("--inh-caps", "-all,+dac_read_search", "--ambient-caps", "+dac_read_search")
    user = ("--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    return ["setpriv", *user, *reads, "--no-new-privs"]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder of that user. Not in pytest's, whose parents it may not even ask about."""
    with tempfile.TemporaryDirectory(prefix="space-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder


@contextlib.contextmanager
def space(python: Path | str, tree: Path, scratch: Path, at_home: bool) -> Iterator[str]:
    """`app.py` as a Space starts it: its address. `scratch` is all that it may write to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(scratch),
        "SPACE_ID": "owner/name",
        "SPACE_HOST": "owner-name.hf.space",
        "SYSTEM": "spaces",
        "GRADIO_SSR_MODE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_NUM_PORTS": "1",
        "GRADIO_ALLOW_FLAGGING": "never",
        "GRADIO_THEME": "huggingface",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # tests have no network
        "OMP_NUM_THREADS": "1",
        "MUSICGEN_UI_PRECISION": "float32",  # int8 is 20 s of compiling
    } | ({"HOME": str(scratch)} if at_home else {})
    log = tree.with_name("log.txt")
    with log.open("w") as out:
        command = [*as_nobody(), str(python), CARD["app_file"]]
        app = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not answers(url):
            assert app.poll() is None and time.monotonic() < until_s, log.read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        app.terminate()  # as the Hub, Docker and systemd end it
        app.wait(60)
    said = UNCLOSED.sub("", log.read_text())
    assert not re.search("Traceback|Permission denied|not a writable", said), said[-3000:]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def makes_music(url: str, folder: Path) -> None:
    """The page is the page, and the API makes a take that can be downloaded."""
    page = httpx.get(url, timeout=60)
    assert "gradio_config" in page.text and CARD["title"] in page.text
    client = Client(url, verbose=False, download_files=folder)
    files, told = client.predict(prompt="waltz", duration_s=0.5, seed=1, api_name="/generate")
    assert soundfile.info(files[0]).duration == 0.5 and told["checkpoint"] == "bundled"
    with pytest.raises(Exception, match="alone"):
        client.predict(checkpoint="someone/else", duration_s=0.5, api_name="/generate")


def test_it_starts_as_on_a_space_without_a_home(
    read_only_tree: Path, tmp_path: Path, scratch: Path
) -> None:
    with space(sys.executable, read_only_tree, scratch, at_home=False) as url:
        makes_music(url, tmp_path)
        folders = list(scratch.glob("musicgen-ui-*"))  # uploads and takes are private
        assert folders and all(stat.S_IMODE(f.stat().st_mode) == 0o700 for f in folders)
    assert not list(scratch.glob("musicgen-ui-*"))  # and go with the server


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_it_installs_and_starts_as_on_a_space(
    read_only_tree: Path, tmp_path: Path, scratch: Path
) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    development = (ROOT / "requirements-dev.txt").read_text().splitlines()
    spaces = next(line.split()[0] for line in development if line.startswith("spaces"))
    wanted = ["-r", str(ROOT / "requirements.txt"), spaces]  # Spaces bring that one along
    pip = [environment / "bin" / "pip", "install", "-q", "--no-cache-dir"]
    subprocess.run([*pip, *wanted], check=True, timeout=3000)
    python = environment / "bin" / "python"
    with space(python, read_only_tree, scratch, at_home=True) as url:
        makes_music(url, tmp_path)
