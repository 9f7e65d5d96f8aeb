"""Where models run is chosen by what the computer has, with the reason, or refused in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from musicgen_ui.engine import device as devices
from musicgen_ui.manager import ModelManager
from musicgen_ui.request import RequestError


def test_the_device_and_its_precision_are_chosen_with_a_reason(monkeypatch):
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
def test_a_device_or_precision_that_is_not_there_is_a_sentence(
    monkeypatch, device, precision, said
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_has_mps", lambda: False)
    with pytest.raises(RequestError, match=said):
        ModelManager(device=device, precision=precision)


def test_int8_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RequestError, match="int8 runs on the CPU alone"):
        devices.choose("cuda", "int8")


def test_the_budget_is_a_share_of_the_memory():
    place = devices.choose("cpu")
    assert 0.1e9 < devices.budget_bytes(place) < devices._ram_bytes()
    assert ModelManager(device="cpu", budget_bytes=123).budget_bytes == 123


def test_int8_is_the_cpus_choice_unless_another_is_named() -> None:
    assert devices.choose("cpu").precision == "int8"
    assert devices.choose("cpu", "float32").precision == "float32"


def test_a_small_decoder_keeps_to_one_thread(tiny_mono, monkeypatch) -> None:
    """Threads that wait for each other in tiny operations cost it most of its speed."""
    monkeypatch.setattr(devices, "THREADS", 4)
    assert [devices.threads_for(n) for n in (6_000_000, 60_000_000, 400_000_000)] == [1, 3, 4]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ModelManager(device="cpu").use(str(tiny_mono)) as batch:
            assert not batch.step()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(devices, "BYTES_A_THREAD", 5_000)  # as if it were large
        with ModelManager(device="cpu").use(str(tiny_mono)) as batch:
            assert batch.threads == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("own", ["", "7"])
def test_idle_threads_of_torch_soon_leave_the_cores_to_others(own: str) -> None:
    asked = {"GOMP_SPINCOUNT": own} if own else {}
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | asked
    told = (
        "import musicgen_ui, sys, os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", told]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == [own or "3000", "False"]
