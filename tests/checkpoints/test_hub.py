"""Checkpoints come from the Hub with progress, whole, once; else a sentence says what to do."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anyio import to_thread
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.checkpoints import hub, hub_errors, lora, registry
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers import hub as local_hub
from tests.helpers import tiny

TINY = "someone/musicgen-tiny"


def load(name: str) -> registry.Loaded:
    return registry.load(registry.resolve(name), torch.float32, lambda _: None)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Points the Hub's client at a server of this test and at an empty cache."""

    return lambda url: local_hub.point_at(monkeypatch, url, tmp_path / "cache")


@pytest.fixture
def served(tiny_mono: Path, tiny_stereo: Path, online):
    with local_hub.serve(
        someone__musicgen_tiny=tiny_mono, facebook__musicgen_stereo_small=tiny_stereo
    ) as server:
        server.repositories = {
            name.replace("_", "-"): folder for name, folder in server.repositories.items()
        }
        online(server.url)
        yield server


def test_a_checkpoint_comes_from_the_hub_with_progress_and_then_from_the_cache(served):
    said: list[str] = []
    loaded = registry.load(registry.resolve(TINY), torch.float32, said.append)
    assert loaded.name == TINY
    assert said[0] == f"asking the Hub for {TINY}"
    assert any(note.startswith(f"downloading {TINY}: ") for note in said)
    downloads = [note for note in said if isinstance(note, hub.Downloading)]
    assert downloads[-1].share == 1 and downloads[-1].endswith("(100%)")
    assert said[-1] == f"reading {TINY}"
    served.asked.clear()
    load(TINY)
    assert served.asked == []


def test_only_what_is_needed_is_downloaded(served, tiny_mono, tmp_path):
    changeable = Path(shutil.copytree(tiny_mono, tmp_path / "more"))
    (changeable / "pytorch_model.bin").write_bytes(b"the same again")
    (changeable / "training_state.bin").write_bytes(b"something else")
    served.repositories[TINY] = changeable
    load(TINY)
    assert "model.safetensors" in served.fetched()
    assert not {"pytorch_model.bin", "training_state.bin"} & set(served.fetched())


def test_a_broken_transfer_is_taken_up_where_it_stopped(served, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    served.break_after["model.safetensors"] = [150_000]
    load(TINY)
    ranges = [r for m, p, r in served.asked if m == "GET" and p.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] == "" and 0 < int(ranges[1].removeprefix("bytes=").strip("-")) <= 150_000


def test_a_download_that_fails_is_a_sentence_and_the_next_one_completes(served, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    served.break_after["model.safetensors"] = [1000] + [0] * 20
    with pytest.raises(RequestError, match="network"):
        load(TINY)
    assert hub.cached(TINY) is None
    served.break_after.clear()
    served.asked.clear()
    assert load(TINY).name == TINY
    assert "tokenizer.json" not in served.fetched()  # what was complete was kept


def test_a_damaged_file_is_fetched_again(served):
    served.damaged = {"model.safetensors": 1, "config.json": 1}
    load(TINY)
    assert served.fetched().count("model.safetensors") == 2
    assert served.fetched().count("tokenizer.json") == 1


def test_a_file_that_keeps_coming_damaged_is_told_and_not_kept(served, tmp_path):
    served.damaged = {"model.safetensors": 2}
    with pytest.raises(RequestError, match="damaged from the Hub, twice"):
        load(TINY)
    assert hub.cached(TINY) is None
    assert all(path.exists() for path in (tmp_path / "cache").rglob("*"))  # no dead link
    load(TINY)


@pytest.mark.parametrize("stalls", ["silent", "slow"])
def test_a_hub_that_hangs_is_told_and_the_next_attempt_completes(served, monkeypatch, stalls):
    from huggingface_hub import file_download

    monkeypatch.setattr(hub, "_ANSWER_S", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    gate = threading.Event()
    setattr(served, stalls, gate)  # no answer at all, or half of the weights
    with pytest.raises(RequestError, match="network"):
        hub.download(TINY, print)
    setattr(served, stalls, None)
    gate.set()
    assert hub.weights_in(hub.download(TINY, print))


def test_what_say_raises_ends_the_download(served):
    def leave(note: str) -> None:
        if note.startswith("downloading"):
            raise hub.Abandoned

    with pytest.raises(hub.Abandoned):
        registry.load(registry.resolve(TINY), torch.float32, leave)
    assert hub.cached(TINY) is None


def test_an_unknown_id_is_a_sentence(served):
    with pytest.raises(RequestError, match='no checkpoint "someone/nothing"'):
        load("someone/nothing")
    with pytest.raises(RequestError, match='no checkpoint "someone/nothing"'):
        registry.describe(registry.resolve("someone/nothing"))


def test_an_id_is_described_from_its_configuration_alone(served):
    description = registry.describe(registry.resolve(TINY))
    assert description.checkpoint == TINY
    assert sorted(served.fetched()) == ["config.json", "generation_config.json"]
    assert description.defaults == {"do_sample": True, "guidance_scale": 3.0}
    served.asked.clear()
    with pytest.raises(RequestError, match="no stereo sibling"):
        registry.resolve(TINY, stereo=True)
    assert served.asked == []


def test_parts_that_do_not_fit_are_refused_before_the_download(served, tiny_mono, tmp_path):
    folder = Path(shutil.copytree(tiny_mono, tmp_path / "misfit"))
    tiny.edit_config(folder, "decoder", vocab_size=128)
    served.repositories[TINY] = folder
    with pytest.raises(RequestError, match="128 codes"):
        load(TINY)
    assert sorted(served.fetched()) == ["config.json", "generation_config.json"]


def test_a_repository_without_a_checkpoint_is_a_sentence(served, tiny_mono, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("nothing here")
    served.repositories[TINY] = folder
    with pytest.raises(RequestError, match="not a checkpoint"):
        load(TINY)
    shutil.copy(tiny_mono / "config.json", folder)
    with pytest.raises(RequestError, match="no weights"):
        hub.download(TINY, print)


def test_without_a_network_a_sentence_names_the_bundled_one_and_the_cache_works(
    served, online, tiny_mono
):
    load(TINY)
    online("http://127.0.0.1:9")  # nothing listens: refused at once
    assert load(TINY).name == TINY
    assert registry.describe(registry.resolve(TINY)).checkpoint == TINY
    with pytest.raises(RequestError, match=r"check the network .*bundled"):
        load("small")
    with pytest.raises(RequestError, match=r"check the network .*bundled"):
        registry.describe(registry.resolve("someone/else"))


def test_auto_is_metas_small_one_on_cuda_if_it_can_be_had(served, online, tiny_mono):
    bundled = registry.resolve("bundled")
    assert registry.resolve("auto", device="cpu") == bundled
    assert registry.resolve("auto", device="cuda") == bundled  # the Hub lacks it
    assert registry.resolve("auto", True, "cuda").name == "facebook/musicgen-stereo-small"
    served.repositories["facebook/musicgen-small"] = tiny_mono
    hub._reachable.cache_clear()
    assert registry.resolve("auto", device="cuda").name == "facebook/musicgen-small"
    load("small")
    online("http://127.0.0.1:9")
    assert registry.resolve("auto", device="cuda").name == "facebook/musicgen-small"


def run_with(**environment: str) -> subprocess.CompletedProcess:
    code = (
        "from musicgen_ui.checkpoints import hub\n"
        "from musicgen_ui.errors import RequestError\n"
        f"try: print(hub.download({TINY!r}, print))\n"
        "except RequestError as error: print('sentence:', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_hub_and_being_offline_are_set_by_the_environment(tiny_mono, tmp_path):
    cache = str(tmp_path / "cache")
    with local_hub.serve() as server:
        server.repositories[TINY] = tiny_mono
        offline = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        assert "sentence:" in run_with(**offline).stdout
        assert server.asked == []
        folder = run_with(HF_ENDPOINT=server.url, HF_HUB_CACHE=cache).stdout.splitlines()[-1]
        assert (Path(folder) / "model.safetensors").is_file()
        server.asked.clear()
        assert run_with(**offline).stdout.strip() == folder
        assert server.asked == []


def test_several_threads_may_download_the_same(served):
    results: list[registry.Loaded] = []
    threads = [
        threading.Thread(target=lambda: results.append(hub.download(TINY, print))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(str, results))) == 1


def test_an_adapter_comes_from_the_hub_and_then_from_the_cache(served, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    for name in (lora.CONFIG, lora.WEIGHTS, "README.md"):
        (folder / name).write_text("{}")
    served.repositories["someone/lora"] = folder
    found = lora.find("someone/lora")
    assert {file.name for file in lora.fetch(found).iterdir()} == {
        lora.CONFIG,
        lora.WEIGHTS,
    }
    served.asked.clear()
    lora.fetch(found)
    assert served.asked == []
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    (older / lora.WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, older / lora.PICKLED)
    served.repositories["someone/older"] = older
    assert (lora.fetch(lora.find("someone/older")) / lora.PICKLED).is_file()
    served.asked.clear()
    lora.fetch(lora.find("someone/older"))
    assert served.asked == []
    with pytest.raises(RequestError, match='no adapter "someone/nothing"') as error:
        lora.fetch(lora.find("someone/nothing"))
    assert error.value.field == "adapter"


def test_a_decoder_alone_on_the_hub_brings_its_base(served, tiny_mono, tmp_path):
    from transformers import MusicgenForCausalLM

    folder = tmp_path / "decoder"
    MusicgenForCausalLM.from_pretrained(tiny_mono).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nbase_model: {TINY}\n---\n")
    served.repositories["someone/decoder"] = folder
    loaded = load("someone/decoder")
    assert loaded.name == "someone/decoder" and loaded.sampling_rate == 32_000
    served.asked.clear()
    load("someone/decoder")
    assert served.asked == []


# What fails is told by its cause

TOKEN = {"HF_TOKEN": "hf_expired"}
CODE = "X-Error-Code"


@pytest.mark.parametrize(
    ("status", "headers", "token", "told"),
    [
        (401, {CODE: "RepoNotFound"}, TOKEN, r"token.*expired"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, TOKEN, "token"),
        (401, {CODE: "RepoNotFound"}, {}, r"no checkpoint.*check the name"),
        (403, {CODE: "GatedRepo"}, TOKEN, "terms"),
        (403, {"X-Error-Message": "not yours"}, TOKEN, "token may not read"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, {}, "disabled"),
        (404, {CODE: "RepoNotFound"}, TOKEN, "check the name"),
        (429, {"Retry-After": "7"}, {}, "in 7 s"),
        (503, {}, {}, r"503.*later"),
    ],
)
def test_a_refusal_is_told_by_its_status(served, monkeypatch, status, headers, token, told):
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    served.refusal = status, headers
    for ask in (load, lambda name: hub.download(name, print), hub.config_file):
        with pytest.raises(RequestError, match=told) as error:
            ask(TINY)
        assert "check the network" not in str(error.value)
    with pytest.raises(RequestError) as error:
        lora.fetch(lora.find("someone/lora"))
    assert error.value.field == "adapter"


def told_of(error: Exception) -> str:
    return str(hub_errors.explained(error, TINY, "checkpoint"))


def wrapped(cause: Exception) -> Exception:
    """As the client wraps what goes wrong on the way: in an error about the local disk."""
    connect = type("ConnectError", (type("TransportError", (Exception,), {}),), {})()
    connect.__cause__ = cause
    outer = LocalEntryNotFoundError("cannot find the requested files in the local cache")
    outer.__cause__ = connect
    return outer


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (wrapped(ssl.SSLCertVerificationError("self-signed")), "certificate.*SSL_CERT_FILE"),
        (wrapped(socket.gaierror(-2, "Name or service not known")), "name.*check the network"),
        (wrapped(ConnectionRefusedError(111, "refused")), "check the network"),
        (wrapped(PermissionError(errno.EACCES, "blocked by a firewall")), "check the network"),
        (wrapped(OfflineModeIsEnabled("off")), "HF_HUB_OFFLINE"),
        (wrapped(json.JSONDecodeError("no JSON", "<html>", 0)), "HF_ENDPOINT"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "/cache/x.*HF_HUB_CACHE"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/x"), "HF_HUB_CACHE"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/x"), "disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"), "ALL_PROXY"),
        (HFValidationError("Repo id must be …"), "cannot be an id"),
        (KeyError("something new"), "something new"),
    ],
)
def test_every_cause_on_the_way_to_the_hub_has_a_sentence_of_its_own(error, told):
    said = told_of(error)
    assert re.search(told, said), said
    assert ("check the network" in said) == ("network" in told)


def test_a_cache_that_cannot_be_written_is_named(served, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RequestError, match=r"HF_HUB_CACHE") as error:
        load(TINY)
    assert str(tmp_path / "file") in str(error.value)


# What the cache lacks, and other forms


def test_a_cache_that_another_program_filled_without_the_tokenizer_is_completed(
    served, tmp_path, monkeypatch
):
    source = registry.resolve(TINY)
    registry.fetch(source, print)
    for number in "12":  # another folder, since the client remembers what it has seen
        shutil.copytree(
            tmp_path / "cache",
            tmp_path / number,
            symlinks=True,
            ignore=shutil.ignore_patterns("trees", "token*"),
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "1"))
    assert hub.cached(TINY) and not hub.has_tokenizer(hub.cached(TINY))
    assert hub.has_tokenizer(registry.fetch(source, print))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "2"))
    served.refusal = 503, {}
    with pytest.raises(RequestError, match="503"):
        registry.fetch(source, print)
    served.refusal = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=f"^The tokenizer of {TINY} is not on this computer"):
        registry.fetch(source, print)


def test_a_damaged_file_of_the_cache_is_deleted_and_downloaded_again(served):
    load(TINY)
    cached = hub.cached(TINY) / "model.safetensors"
    cached.resolve().write_bytes(cached.read_bytes()[:-9])
    with pytest.raises(RequestError, match=r"model\.safetensors in the Hub's cache was damaged"):
        load(TINY)
    assert load(TINY).name == TINY


@pytest.fixture
def exported(served, tmp_path) -> str:
    """A repository with audiocraft's two files alone, and the text encoder that it names."""
    golden = Path(__file__).parents[1] / "golden"
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in hub.AUDIOCRAFT:
        shutil.copyfile(golden / "mono" / name, folder / name)
    served.repositories |= {"someone/songs": folder, "google-t5/t5-base": golden / "text_encoder"}
    return "someone/songs"


def test_a_repository_in_audiocrafts_format_is_described_without_its_weights(served, exported):
    description = registry.describe(registry.resolve(exported))
    assert (description.sampling_rate, description.melody) == (32_000, False)
    pieces = [r for _, path, r in served.asked if path.endswith(f"main/{hub.AUDIOCRAFT[1]}")]
    read = sum(int(b) - int(a) for a, b in (r.removeprefix("bytes=").split("-") for r in pieces))
    assert 0 < read < 500_000 < (served.repositories[exported] / hub.AUDIOCRAFT[1]).stat().st_size


def test_a_repository_in_audiocrafts_format_plays_and_then_needs_no_network(served, exported):
    loaded = load(exported)
    assert (loaded.name, loaded.sampling_rate) == (exported, 32_000)
    served.asked.clear()
    load(exported)
    registry.describe(registry.resolve(exported))
    assert served.asked == []


def test_a_text_encoder_by_name_is_the_hubs_whatever_lies_here(
    served, exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for stray in ("t5-base", "google-t5/t5-base"):
        (tmp_path / stray).mkdir(parents=True)
        (tmp_path / stray / "config.json").write_text("{}")
    assert load(exported).tokenizer("calm piano").input_ids


def test_an_adapter_named_as_a_checkpoint_is_told_as_one(served, tiny_mono, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(tiny_mono / "config.json", folder)  # as some trainers leave it beside
    base = {"peft_type": "LORA", "base_model_name_or_path": "facebook/musicgen-small"}
    (folder / lora.CONFIG).write_text(json.dumps(base))
    (folder / lora.WEIGHTS).write_bytes(b"weights")
    served.repositories["someone/lora"] = folder
    for name in ("someone/lora", str(folder)):
        with pytest.raises(RequestError, match=r"adapter.*facebook/musicgen-small"):
            registry.describe(registry.resolve(name))
    assert lora.WEIGHTS not in served.fetched()


def test_a_pasted_link_is_the_id_in_it(served):
    link = f"{served.url}/{TINY}"
    for name in (link, f"{link}/tree/main", f"https://hf.co/{TINY}/blob/main/config.json", TINY):
        assert registry.resolve(name) == registry.Source(TINY)
        assert lora.find(name) == registry.Source(TINY)
    for name in (f"{link}/tree/other", "https://hf.co/datasets/a/b", "https://example.com/a/b"):
        for find, field in ((registry.resolve, "checkpoint"), (lora.find, "adapter")):
            with pytest.raises(RequestError, match="link") as error:
                find(name)
            assert error.value.field == field


def test_a_silent_hub_delays_those_alone_who_ask_it(served):
    """Many ask for what only the Hub could know: others are answered as ever."""
    served.silent = threading.Event()

    def refused(*_: object) -> None:
        raise RequestError("loaded")

    manager = LocalBackend(device="cpu", load=refused)

    async def made(**settings: str) -> str:
        job = manager.submit(GenerationRequest(duration_s=1, **settings))
        events = [event async for event in job.events()]
        return str(events[-1].error)

    async def described(checkpoint: str) -> object:
        try:
            return await to_thread.run_sync(manager.describe, checkpoint)
        except RequestError as error:
            return str(error)

    async def run() -> tuple[list, list, float]:
        asking = [described(f"someone/model-{n}") for n in range(60)]
        asking += [made(adapter=f"someone/lora-{n}") for n in range(12)]
        asking += [made(checkpoint=f"someone/model-{n}") for n in range(12)]
        tasks = [asyncio.create_task(coroutine) for coroutine in asking]
        await asyncio.sleep(0.2)
        began_s = time.monotonic()
        others = await asyncio.gather(made(checkpoint="bundled"), described("bundled"))
        took_s = time.monotonic() - began_s
        served.silent.set()
        return others, await asyncio.gather(*tasks), took_s

    others, asked, took_s = asyncio.run(run())
    manager.close()
    assert took_s < 2 and others[0] == "loaded" and others[1].checkpoint == "bundled"
    assert all(isinstance(answer, str) and "Traceback" not in answer for answer in asked)
