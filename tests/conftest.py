"""What tests share: no network, and tiny checkpoints, built once a run."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from musicgen_ui import heap
from musicgen_ui.server import gradio_import

if TYPE_CHECKING:
    from transformers import MusicgenForConditionalGeneration
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

    from musicgen_ui.engine.scheduler import Scheduler

# Before the libraries read them. Tests of downloads have a Hub of their own on this computer.
os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
# Nor does a server that a test starts keep its takes in the music folder of whoever runs the tests.
os.environ["XDG_MUSIC_DIR"] = tempfile.mkdtemp(prefix="music-of-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_MUSIC_DIR"], ignore_errors=True)
if not Path("/dev/nvidia0").exists():  # without a GPU Triton's kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

# As the app does: a process of tests is a gigabyte smaller, and imports two seconds faster.
heap.share()
gradio_import.skip_stubs()

# A shell's background job ignores interrupts, and so would the servers that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_mono(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mono checkpoint's folder; copy it before changing it."""
    from tests.helpers import tiny

    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-mono")


@pytest.fixture(scope="session")
def tiny_stereo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stereo checkpoint's folder; copy it before changing it."""
    from tests.helpers import tiny

    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-stereo", stereo=True)


@pytest.fixture(scope="session")
def tiny_melody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny melody checkpoint's folder; copy it before changing it."""
    from tests.helpers import tiny

    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-melody", melody=True)


@pytest.fixture(scope="session")
def tiny_stereo_melody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stereo melody checkpoint's folder; copy it before changing it."""
    from tests.helpers import tiny

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-stereo-melody"
    return tiny.build(folder, stereo=True, melody=True, text_hidden=24)


@pytest.fixture(scope="session")
def tiny_style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny style checkpoint's folder, in audiocraft's layout; copy it before changing it."""
    from tests.helpers import style

    return style.build(tmp_path_factory.mktemp("checkpoints") / "tiny-style")


@pytest.fixture(scope="module", params=["mono", "stereo"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A tiny checkpoint's folder, of either kind."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module", params=["eager", "graph"])
def batch(folder: Path, request: pytest.FixtureRequest) -> Scheduler:
    """Both ways of stepping; the graph's as it runs before it is captured."""
    from tests.helpers.engine import make_batch

    return make_batch(folder, graphs=request.param == "graph")


@pytest.fixture(scope="module")
def reference(folder: Path) -> MusicgenForConditionalGeneration:
    """The same checkpoint as transformers has it."""
    from tests.helpers.engine import load

    return load(folder)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undoes what a test changed in the environment: a launched server sets variables that the
    servers of later tests would read."""
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):  # of servers that are running
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def pytest_configure(config: pytest.Config) -> None:
    """The summary shows why a test was run again."""
    config.option.rerun_show_tracebacks = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests first: see `pytest_xdist_make_scheduler`; one that fails is run once more.

    Not after its time is over: the second run would have no limit. The recipe's tests come next:
    they are the longest file, and no process is to be left alone with it in the end.
    """
    once_more = pytest.mark.flaky(reruns=1, rerun_except="from pytest-timeout")
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)
            item.add_marker(once_more)
    order = ["browser", "training"]
    items.sort(key=lambda item: [*order, item.path.parent.name].index(item.path.parent.name))


def pytest_collection_finish() -> None:
    """What was imported for the tests stays: no collection of garbage looks at it again.

    Closing a backend collects garbage, which takes 0.3 s among the objects of all imports.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count what is left at the end of the process see it let go."""
    gc.unfreeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """All browser tests in one process (`-n 2`), the other files whole in whichever is free.

    They wait for sound in real time while the others need the processor, and begin first.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "browser" if "/browser/" in nodeid else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
