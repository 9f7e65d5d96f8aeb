"""The device of these tests: CUDA, or what MUSICGEN_UI_TEST_DEVICE names.

On a CPU steps go through `CudaGraphStepper` too, uncaptured: a rehearsal of every test's body.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = os.environ.get("MUSICGEN_UI_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
HOG_BYTES = (64 << 20, 8 << 20, (1 << 20) + 512, 1 << 20, 1 << 14, 512)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if item.get_closest_marker("gpu") and ON_CUDA and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("cuda_alone") and not ON_CUDA:
            item.add_marker(pytest.mark.skip(reason="shows what only CUDA does"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests of this folder run."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def exact() -> Iterator[None]:
    """float32 products are float32, as on a CPU."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.fixture(scope="session")
def make(device: str) -> Callable[..., Any]:
    """Makes a batch of a checkpoint's folder that steps by `CudaGraphStepper`."""
    from tests.helpers.engine import make_batch
    from tests.helpers.melody import melody_batch

    def made(folder: Path, **options: Any) -> Any:
        build = melody_batch if "melody" in folder.name else make_batch
        return build(folder, **{"device": device, "graphs": True} | options)

    return made


@pytest.fixture(scope="module")
def batch(folder: Path, make: Callable[..., Any]) -> Any:
    """A batch of either kind of checkpoint on the device."""
    return make(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, device: str) -> Any:
    """The same checkpoint as transformers has it, on the device."""
    from tests.helpers.engine import load

    return load(folder).to(device)


class Full(TorchDispatchMode):
    """A CPU without memory: whatever makes a new tensor fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func._schema.is_mutable):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return func(*args, **kwargs or {})


@pytest.fixture
def exhausted() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Within its context no memory can be allocated on the device."""
    return _exhausted


@contextlib.contextmanager
def _exhausted() -> Iterator[None]:
    if not ON_CUDA:
        with Full():
            yield
        return
    torch.cuda.empty_cache()
    card = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(card) / total, card)
    held = []
    try:
        for size in HOG_BYTES:
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, card)
