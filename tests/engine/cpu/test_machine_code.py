"""Compiled kernels on the disk: the same music from the first start on, whatever lies there."""

from __future__ import annotations

import ast
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.cpu import machine_code
from musicgen_ui.engine.cpu.machine_code import CHECKSUM, PREFIX, STORE, Kernel, Store, is_complete

ROOT = Path(__file__).parents[3]
CPU = ROOT / "musicgen_ui" / "engine" / "cpu"

# The attention that every int8 step is made of. When parts of it were not inlined, they were
# optimised apart from the kernel and rounded differently.
ATTENDING = """
import hashlib
import torch
from musicgen_ui.engine.cpu.int8 import Int8Cache

torch.manual_seed(0)
(cache,) = Int8Cache.of_layers(1, (2, 4, 130, 64))
out = cache.attend(torch.randn(2, 130, 3, 4, 64), 0)
print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_code_that_is_loaded_computes_as_when_it_was_compiled(tmp_path: Path) -> None:
    script = tmp_path / "attending.py"
    script.write_text(ATTENDING)
    places = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def start() -> str:
        done = subprocess.run(
            [sys.executable, script], env={**os.environ, **places}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = start()
    assert list((tmp_path / "cache").rglob(CHECKSUM))
    assert start() == first


def test_no_thread_is_in_a_kernel_when_python_shuts_down() -> None:
    """It would abort the process: `generate` that had made its take failed in the end."""
    script = """
import atexit, threading
atexit.register(lambda: print(sorted(thread.name for thread in threading.enumerate())))
import torch
from musicgen_ui.engine.cpu import int8
torch.set_num_threads(3)
int8.run(lambda *given: None, 1)
assert len(threading.enumerate()) == 3
"""
    asked = [sys.executable, "-c", script]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['MainThread']"]


def test_kernels_are_compiled_from_this_package_alone() -> None:
    decorators = {"compiled", "compiled_sum", "kernel", "_intrinsic"}
    for file in (ROOT / "musicgen_ui").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        named = {d.id for f in functions for d in f.decorator_list if isinstance(d, ast.Name)}
        assert file.parent == CPU or not named & decorators, file


@pytest.mark.parametrize("source", sorted(file.name for file in CPU.glob("*.py")))
def test_a_changed_source_is_another_version(tmp_path: Path, source: str) -> None:
    for file in CPU.glob("*.py"):
        shutil.copy(file, tmp_path)
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "machine_code.py")
    assert spec and spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    before = copied.version()
    with (tmp_path / source).open("a") as changed:
        changed.write("\n# changed\n")
    copied.version.cache_clear()
    assert copied.version() != before


# What lies on the disk


def double(x, out):
    for i in range(len(x)):
        out[i] = x[i] + x[i]


def doubles(store: Store) -> bool:
    """Whether a kernel works that is new to this process, with `store` as its disk."""
    x, out = np.arange(5.0), np.zeros(5)
    Kernel(double, store)(x, out)
    return out.tolist() == [0, 2, 4, 6, 8]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3 :: 7] = bytes(len(content[len(content) // 3 :: 7]))
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    *((cut, ending) for ending in (".nbi", ".nbc", CHECKSUM)),
    *((overwrite, ".nbc"), (Path.unlink, ".nbi"), (replace_by_folder, ".nbc")),
]


@pytest.mark.parametrize(("damage", "ending"), DAMAGES)
def test_damaged_code_is_compiled_again(
    tmp_path: Path, damage: Callable[[Path], object], ending: str
) -> None:
    store = Store([tmp_path])
    assert doubles(store) and store.folder
    (file,) = (file for file in store.folder.rglob("*") if file.name.endswith(ending))
    damage(file)
    later = Store([tmp_path])
    assert doubles(later) and not later.trouble
    (kept,) = store.folder.iterdir()
    assert is_complete(kept)


def test_a_sealed_folder_that_numba_cannot_read_is_compiled_again(tmp_path: Path) -> None:
    """As where another release of numba wrote it: the checksum is right and the rest is not."""
    store = Store([tmp_path])
    assert doubles(store) and store.folder
    for file in store.folder.rglob("*.nb?"):
        cut(file)
        machine_code.write_checksum(file.parents[1])
    assert doubles(Store([tmp_path]))
    assert all(file.stat().st_size > 1000 for file in store.folder.rglob("*.nbc"))


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Files can have so many bytes and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("nbytes", [0, 2000])
def test_a_full_disk_costs_the_keeping_alone(tmp_path: Path, nbytes: int) -> None:
    store = Store([tmp_path])
    with full_disk(nbytes):
        assert doubles(store)
    assert str(tmp_path) in store.trouble and store.folder
    assert not list(store.folder.iterdir())
    assert doubles(Store([tmp_path])) and list(store.folder.rglob(CHECKSUM))


def test_without_a_folder_everything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store([tmp_path / "file"])
    assert doubles(store) and store.folder is None and store.trouble
    second = Store([tmp_path / "file", tmp_path / "second"])
    assert doubles(second) and not second.trouble


def test_health_tells_what_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(LocalBackend(device="cpu")) as manager:
        assert not manager.health().warnings
        monkeypatch.setattr(STORE, "trouble", "the disk is full")
        health = manager.health()
    assert health.warnings == ("the disk is full",) and not health.trouble


def test_versions_that_nothing_uses_any_more_are_removed(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / name for name in (PREFIX + "1", PREFIX + "2", "engine_3"))
    for folder in (old, recent, other):
        (folder / "inner").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, times=(time.time() - 90 * 86_400,) * 2)
    assert Store([tmp_path]).folder
    assert not old.exists() and recent.exists() and other.exists()
