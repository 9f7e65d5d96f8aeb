"""Checkpoints are found by name, described unloaded, downloaded and read, or refused in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import hub as local_hub
import pytest
import tiny
import torch
from huggingface_hub import constants

from musicgen_ui import checkpoints, configuration, hub
from musicgen_ui.request import RequestError

TINY = "someone/musicgen-tiny"


def quiet(_: str) -> None:
    pass


def load(folder: Path | str, say=quiet) -> checkpoints.Loaded:
    return checkpoints.load(checkpoints.resolve(str(folder)), torch.float32, say)


@pytest.fixture
def changeable(tiny_mono: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mono, tmp_path / "checkpoint"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Points the Hub's client at a server of this test and at an empty cache."""

    def point_at(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub._reachable.cache_clear()

    return point_at


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


# Names


@pytest.mark.parametrize(
    "name", ["small", "musicgen-small", "facebook/musicgen-small", "Facebook/MusicGen-Small"]
)
def test_a_checkpoint_has_a_short_name_and_an_id(name):
    assert checkpoints.resolve(name) == checkpoints.Source("facebook/musicgen-small")


def test_stereo_takes_the_sibling_and_a_stereo_checkpoint_stays(tiny_stereo):
    for size in ("small", "medium", "large"):
        stereo = checkpoints.Source(f"facebook/musicgen-stereo-{size}")
        assert checkpoints.resolve(size, stereo=True) == stereo
        assert checkpoints.resolve(f"stereo-{size}", stereo=True) == stereo
        assert checkpoints.resolve(f"stereo-{size}", stereo=False) == stereo
    assert checkpoints.resolve(str(tiny_stereo), stereo=True).folder == tiny_stereo


def test_a_mono_folder_without_a_sibling_refuses_stereo(tiny_mono):
    with pytest.raises(RequestError, match="mono and has no stereo sibling") as error:
        checkpoints.resolve(str(tiny_mono), stereo=True)
    assert error.value.field == "stereo"


def test_the_bundled_checkpoint_finds_a_stereo_sibling_beside_it(
    tiny_mono, tiny_stereo, tmp_path, monkeypatch
):
    bundled = Path(shutil.copytree(tiny_mono, tmp_path / "bundled"))
    monkeypatch.setattr(checkpoints, "BUNDLED", bundled)
    with pytest.raises(RequestError, match="no stereo sibling"):
        checkpoints.resolve("bundled", stereo=True)
    assert checkpoints.describe(checkpoints.resolve("auto")).stereo == "never"
    sibling = Path(shutil.copytree(tiny_stereo, tmp_path / "bundled-stereo"))
    assert checkpoints.resolve("bundled", stereo=True).folder == sibling
    assert checkpoints.describe(checkpoints.resolve("auto")).stereo == "choice"


def test_a_folder_may_be_absolute_relative_or_under_home(changeable, monkeypatch):
    monkeypatch.chdir(changeable.parent)
    monkeypatch.setenv("HOME", str(changeable.parent))
    for name in (str(changeable), "checkpoint", "./checkpoint/", "~/checkpoint"):
        source = checkpoints.resolve(name)
        assert source.folder == changeable
        assert source.name == "~/checkpoint"  # what a take says names no one
    assert checkpoints.resolve(source.name) == source


@pytest.mark.parametrize(
    "name", ["nonsense", "a/b/c", "./missing", "~nobody-here/x", "x" * 400, "é/è", "/", "a b/c"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(RequestError) as error:
        checkpoints.describe(checkpoints.resolve(name))
    assert "bundled" in str(error.value)
    assert error.value.field == "checkpoint"
    assert len(str(error.value)) < 400


# What is known without loading


def test_describe_reads_no_weights_and_imports_nothing_heavy(changeable):
    (changeable / "model.safetensors").unlink()
    description = checkpoints.describe(checkpoints.resolve(str(changeable)))
    assert (description.stereo, description.sampling_rate) == ("never", 32_000)
    code = (
        "import sys; from musicgen_ui import checkpoints as c\n"
        "for n in c.known(): print(c.describe(c.resolve(n)).summary)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(checkpoints.known())
    assert "587 M parameters" in done.stdout
    assert sum("CC-BY-NC 4.0" in line for line in lines) == 6


def test_counted_parameters_are_those_of_the_models_that_transformers_builds(tmp_path):
    from transformers import MusicgenConfig, MusicgenForConditionalGeneration

    variants = [
        {},
        {"stereo": True, "gated_t5": True, "text_hidden": 24},
        {"codebook_size": 32, "ratios": (4, 4, 5, 4), "sampling_rate": 16_000, "layers": 3},
    ]
    folders = [tiny.build(tmp_path / str(i), **kw) for i, kw in enumerate(variants)]
    for folder in [*folders, checkpoints.BUNDLED]:
        with torch.device("meta"):
            config = MusicgenConfig.from_pretrained(folder)
            model = MusicgenForConditionalGeneration(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        read = configuration.read("tiny", folder / "config.json")
        assert configuration.count_parameters(read) == count


def test_memory_grows_with_size_and_with_precision():
    sizes = [configuration.meta(size, False) for size in ("small", "medium", "large")]
    needed = [configuration.estimate_bytes(config) for config in sizes]
    assert needed == sorted(needed)
    assert 2.3e9 < needed[0] < 3.5e9
    assert configuration.estimate_bytes(sizes[0], 2) * 2 == needed[0]


# Reading


def test_half_precision_files_load_as_float32_with_their_own_tokenizer(tmp_path):
    folder = tiny.build(tmp_path / "half", dtype=torch.float16)
    said: list[str] = []
    loaded = load(folder, said.append)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert (loaded.sampling_rate, loaded.channels) == (32_000, 1)
    lower, upper = loaded.tokenizer(["80s pop", "80S POP"]).input_ids
    assert lower == upper and len(lower) == 3 and lower[-1] == loaded.tokenizer.eos_token_id
    assert said == [f"reading {loaded.name}"]


def test_weights_may_be_a_pickle_without_code_or_in_shards(changeable, tmp_path):
    from safetensors.torch import load_file

    expected = load(changeable).model.state_dict()
    weights = load_file(changeable / "model.safetensors")
    pickled = Path(shutil.copytree(changeable, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    sharded = tmp_path / "sharded"
    shutil.copytree(pickled, sharded)
    (sharded / "pytorch_model.bin").unlink()
    load(changeable).model.save_pretrained(sharded, max_shard_size="150KB")
    assert len(list(sharded.glob("model-*"))) > 1
    for folder in (pickled, sharded):
        for key, value in load(folder).model.state_dict().items():
            assert torch.equal(value, expected[key])
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(RequestError, match="incomplete"):
        load(sharded)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_with_code_is_refused_unrun(changeable, monkeypatch):
    monkeypatch.chdir(changeable)
    (changeable / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, changeable / "pytorch_model.bin")
    with pytest.raises(RequestError, match="damaged"):
        load(changeable)
    assert not (changeable / "exploded").exists()


def test_damaged_or_missing_files_are_a_sentence(changeable, tmp_path):
    def broken(name: str, content: bytes | None) -> Path:
        folder = Path(shutil.copytree(changeable, tmp_path / "broken", dirs_exist_ok=True))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    whole = (changeable / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match="damaged or incomplete") as error:
        load(broken("model.safetensors", whole[: len(whole) // 2]))
    assert error.value.__cause__ is not None
    with pytest.raises(RequestError, match=r"no model\.safetensors"):
        load(broken("model.safetensors", None))
    with pytest.raises(RequestError, match=r"no readable config\.json"):
        load(broken("config.json", b"{"))
    with pytest.raises(RequestError, match=r"no readable config\.json"):
        load(broken("config.json", None))
    with pytest.raises(RequestError, match="damaged or incomplete"):
        load(broken("tokenizer.json", b"{"))


def test_missing_weights_are_not_made_up(changeable):
    from safetensors.torch import load_file, save_file

    for lost in ("decoder.model.decoder.layers.0.fc1.weight", "codebook.embed"):
        weights = load_file(changeable / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.endswith(lost)}
        assert len(kept) < len(weights)
        folder = Path(shutil.copytree(changeable, changeable.parent / lost))
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RequestError, match="damaged or incomplete"):
            load(folder)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("decoder", {"vocab_size": 128}, "128 codes and its codec has 64"),
        ("decoder", {"num_codebooks": 8}, "8 codebooks and its codec reads 4"),
        ("decoder", {"audio_channels": 2}, "4 codebooks and its codec reads 8"),
        ("audio_encoder", {"target_bandwidths": [2.4]}, "4 codebooks and its codec reads 8"),
        ("audio_encoder", {"sampling_rate": 32_001}, "32001 Hz"),
        ("audio_encoder", {"sampling_rate": 16_000, "target_bandwidths": [0.6]}, "16000 Hz"),
        ("audio_encoder", {"audio_channels": 2}, "its codec takes 2"),
        ("audio_encoder", {"model_type": "dac"}, "not t5 and dac"),
        (None, {"model_type": "musicgen_melody"}, "musicgen_melody model, not MusicGen"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_weights_are_read(
    changeable, part, values, said
):
    tiny.edit_config(changeable, part, **values)
    (changeable / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(RequestError, match=said):
        load(changeable)


def test_the_harmless_warning_is_silenced_and_no_other(tiny_mono, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load(tiny_mono)
    assert "vocabulary" not in caplog.text
    logging.getLogger("transformers.configuration_utils").warning("something else")
    assert "something else" in caplog.text


# The Hub


def test_a_checkpoint_comes_from_the_hub_with_progress_and_then_from_the_cache(served):
    said: list[str] = []
    loaded = checkpoints.load(checkpoints.resolve(TINY), torch.float32, said.append)
    assert loaded.name == TINY
    assert said[0] == f"asking the Hub for {TINY}"
    assert any(note.startswith(f"downloading {TINY}: ") for note in said)
    done, total = next(n for n in reversed(said) if "downloading" in n).split()[-4:-1:2]
    assert done == total
    assert said[-1] == f"reading {TINY}"
    served.asked.clear()
    load(TINY)
    assert served.asked == []


def test_only_what_is_needed_is_downloaded(served, changeable):
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
    with pytest.raises(RequestError, match="cannot be downloaded now"):
        load(TINY)
    assert hub.cached(TINY) is None
    served.break_after.clear()
    served.asked.clear()
    assert load(TINY).name == TINY
    assert "tokenizer.json" not in served.fetched()  # what was complete was kept


def test_what_say_raises_ends_the_download(served):
    def leave(note: str) -> None:
        if note.startswith("downloading"):
            raise hub.Abandoned

    with pytest.raises(hub.Abandoned):
        checkpoints.load(checkpoints.resolve(TINY), torch.float32, leave)
    assert hub.cached(TINY) is None


def test_an_unknown_id_is_a_sentence(served):
    with pytest.raises(RequestError, match='no checkpoint "someone/nothing"'):
        load("someone/nothing")
    with pytest.raises(RequestError, match='no checkpoint "someone/nothing"'):
        checkpoints.describe(checkpoints.resolve("someone/nothing"))


def test_an_id_is_described_from_its_configuration_alone(served):
    description = checkpoints.describe(checkpoints.resolve(TINY))
    assert description.checkpoint == TINY
    assert served.fetched() == ["config.json"]
    served.asked.clear()
    with pytest.raises(RequestError, match="no stereo sibling"):
        checkpoints.resolve(TINY, stereo=True)
    assert served.asked == []


def test_a_repository_without_a_checkpoint_is_a_sentence(served, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing here")
    served.repositories["someone/empty"] = tmp_path / "empty"
    with pytest.raises(RequestError, match="no weights"):
        load("someone/empty")
    with pytest.raises(RequestError, match="no checkpoint"):
        checkpoints.describe(checkpoints.resolve("someone/empty"))


def test_without_a_network_a_sentence_names_the_bundled_one_and_the_cache_works(
    served, online, tiny_mono
):
    load(TINY)
    online("http://127.0.0.1:9")  # nothing listens: refused at once
    assert load(TINY).name == TINY
    assert checkpoints.describe(checkpoints.resolve(TINY)).checkpoint == TINY
    with pytest.raises(RequestError, match=r"check the network .*bundled"):
        load("small")
    with pytest.raises(RequestError, match=r"check the network .*bundled"):
        checkpoints.describe(checkpoints.resolve("someone/else"))


def test_auto_is_metas_small_one_on_cuda_if_it_can_be_had(served, online, tiny_mono):
    bundled = checkpoints.resolve("bundled")
    assert checkpoints.resolve("auto", device="cpu") == bundled
    assert checkpoints.resolve("auto", device="cuda") == bundled  # the Hub lacks it
    assert checkpoints.resolve("auto", True, "cuda").name == "facebook/musicgen-stereo-small"
    served.repositories["facebook/musicgen-small"] = tiny_mono
    hub._reachable.cache_clear()
    assert checkpoints.resolve("auto", device="cuda").name == "facebook/musicgen-small"
    load("small")
    online("http://127.0.0.1:9")
    assert checkpoints.resolve("auto", device="cuda").name == "facebook/musicgen-small"


def run_with(**environment: str) -> subprocess.CompletedProcess:
    code = (
        "from musicgen_ui import hub\n"
        "from musicgen_ui.request import RequestError\n"
        f"try: print(hub.download({TINY!r}, print))\n"
        "except RequestError as error: print('sentence:', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
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
    results: list[checkpoints.Loaded] = []
    threads = [
        threading.Thread(target=lambda: results.append(hub.download(TINY, quiet))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(str, results))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"model_type": 3}',
        '{"model_type": "musicgen", "decoder": 1}',
        '{"model_type": "musicgen", "decoder": {"vocab_size": "many"}}',
        '{"model_type": "musicgen", "audio_encoder": {"codebook_size": 0}}',
        '{"model_type": "musicgen", "audio_encoder": {"upsampling_ratios": [8, null]}}',
    ],
)
def test_a_configuration_of_the_wrong_kind_is_a_sentence(changeable, text):
    (changeable / "config.json").write_text(text)
    with pytest.raises(RequestError):
        checkpoints.describe(checkpoints.resolve(str(changeable)))
