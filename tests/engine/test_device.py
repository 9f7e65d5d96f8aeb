"""Where models run is chosen by what the computer has, with the reason, or refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine import device as devices
from musicgen_ui.errors import RequestError


def test_choose_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_has_mps", lambda: False)
    assert devices.choose().device == "cpu"
    assert devices.choose(precision="int8").precision == "int8"
    monkeypatch.setattr(devices, "_has_mps", lambda: True)
    apple = devices.choose()
    assert (apple.device, apple.codec_device, apple.precision) == ("mps", "cpu", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert devices.choose() == devices.Place("cuda", "cuda", "bfloat16", "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    old = devices.choose("cuda:1")
    assert (old.device, old.codec_device, old.precision) == ("cuda:1", "cuda:1", "float16")
    assert "no bfloat16" in old.reason
    assert devices.choose("cpu").device == "cpu"


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [
        ("cuda", "auto", 'no device "cuda"'),
        ("toaster", "auto", "choose auto or cpu"),
        ("cpu", "float8", 'no precision "float8"'),
    ],
)
def test_choose_refuses_an_unavailable_device(monkeypatch, device, precision, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_has_mps", lambda: False)
    with pytest.raises(RequestError, match=said):
        LocalBackend(device=device, precision=precision)


def test_int8_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RequestError, match="int8 runs on the CPU alone"):
        devices.choose("cuda", "int8")


def test_the_budget_is_a_share_of_the_memory():
    place = devices.choose("cpu")
    assert 0.1e9 < devices.budget_bytes(place) < devices._ram_bytes()
    assert LocalBackend(device="cpu", budget_bytes=123).budget_bytes == 123


GIB = 2**30
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"
NO_LIMIT = {V1: "9223372036854771712", V2: "max"}


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Makes a control group with a limit and its use, of which some is file cache."""
    monkeypatch.setattr(devices, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "PROCESS_GROUPS", tmp_path / "own")

    def make(path, version, limit=None, used=0, cached=0):
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / version[0]).write_text(f"{limit or NO_LIMIT[version]}\n")
        (folder / version[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{version[2]} {cached}\n")

    make.told = (tmp_path / "own").write_text
    return make


@pytest.mark.parametrize(
    ("told", "version", "limited", "inner"),
    [
        ("0::/\n", V2, "", None),  # a container that sees its group as the root
        ("0::/user.slice/app.scope\n", V2, "user.slice/app.scope", None),
        ("0::/user.slice/app.scope\n", V2, "user.slice", "user.slice/app.scope"),
        ("0::/../../pod/box\n", V2, "pod", "pod/box"),
        ("9:pids:/\n4:memory:/docker/3f0a\n", V1, "memory", None),  # its path on the host
        ("4:memory:/batch/job\n0::/\n", V1, "memory/batch/job", None),
        ("4:memory:/batch/job\n1:name=systemd:/batch\n", V1, "memory/batch", "memory/batch/job"),
        ("4:cpu,memory:/job\n", V1, "cpu,memory/job", None),
    ],
)
def test_memory_is_limited_by_cgroups(group, monkeypatch, told, version, limited, inner):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=32 * GIB)
    )
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    group.told(told)
    group(limited, version, GIB, used=GIB // 2, cached=GIB // 4)
    if inner:
        group(inner, version, used=GIB // 8)
    assert devices._ram_bytes() == GIB
    assert devices.free_bytes() == GIB * 3 // 4
    assert devices.budget_bytes(devices.choose("cpu")) < GIB
    group(limited, version)
    assert devices._ram_bytes() == 64 * GIB and devices.free_bytes() == 32 * GIB


def test_memory_without_cgroups_is_the_computers(group):
    assert devices._ram_bytes() == psutil.virtual_memory().total
    group.told("0::/gone\nnonsense:x:\n")
    assert devices._ram_bytes() == psutil.virtual_memory().total


def test_model_without_enough_free_memory_is_refused(group, monkeypatch, tiny_mono):
    group.told("0::/\n")
    group("", V2, 64 * GIB, used=64 * GIB - 100_000)
    manager = LocalBackend(device="cpu")
    with pytest.raises(RequestError, match="not enough free memory"), manager.use(str(tiny_mono)):
        pass
    group("", V2, 64 * GIB, used=64 * GIB - 100_000, cached=GIB)
    with manager.use(str(tiny_mono)) as batch:
        assert batch.nbytes
    manager.close()


def test_choose_takes_int8_on_a_cpu() -> None:
    assert devices.choose("cpu").precision == "int8"
    assert devices.choose("cpu", "float32").precision == "float32"


def test_small_decoder_uses_one_thread(tiny_mono, monkeypatch) -> None:
    """Threads that wait for each other in tiny operations cost it most of its speed."""
    monkeypatch.setattr(devices, "THREADS", 4)
    assert [devices.threads_for(n) for n in (6_000_000, 60_000_000, 400_000_000)] == [1, 3, 4]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with LocalBackend(device="cpu").use(str(tiny_mono)) as batch:
            assert not batch.step()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(devices, "BYTES_A_THREAD", 5_000)  # as if it were large
        with LocalBackend(device="cpu").use(str(tiny_mono)) as batch:
            assert batch.threads == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("own", ["", "7"])
def test_idle_torch_threads_spin_briefly(own: str) -> None:
    asked = {"GOMP_SPINCOUNT": own} if own else {}
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | asked
    told = (
        "import musicgen_ui, sys, os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", told]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == [own or "3000", "False"]
