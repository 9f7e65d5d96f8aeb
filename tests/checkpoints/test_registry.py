"""Checkpoints are found by name, described unloaded, downloaded and read, or refused in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from musicgen_ui.checkpoints import registry
from musicgen_ui.errors import RequestError
from tests.helpers import tiny

TINY = "someone/musicgen-tiny"


def quiet(_: str) -> None:
    pass


def load(folder: Path | str, say=quiet) -> registry.Loaded:
    return registry.load(registry.resolve(str(folder)), torch.float32, say)


@pytest.fixture
def changeable(tiny_mono: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mono, tmp_path / "checkpoint"))


# Names


@pytest.mark.parametrize(
    "name", ["small", "musicgen-small", "facebook/musicgen-small", "Facebook/MusicGen-Small"]
)
def test_a_checkpoint_has_a_short_name_and_an_id(name):
    assert registry.resolve(name) == registry.Source("facebook/musicgen-small")


def test_stereo_takes_the_sibling_and_a_stereo_checkpoint_stays(tiny_stereo):
    for size in ("small", "medium", "large"):
        stereo = registry.Source(f"facebook/musicgen-stereo-{size}")
        assert registry.resolve(size, stereo=True) == stereo
        assert registry.resolve(f"stereo-{size}", stereo=True) == stereo
        assert registry.resolve(f"stereo-{size}", stereo=False) == stereo
    assert registry.resolve(str(tiny_stereo), stereo=True).folder == tiny_stereo


def test_a_mono_folder_without_a_sibling_refuses_stereo(tiny_mono):
    with pytest.raises(RequestError, match="mono and has no stereo sibling") as error:
        registry.resolve(str(tiny_mono), stereo=True)
    assert error.value.field == "stereo"


def test_the_bundled_checkpoint_finds_a_stereo_sibling_beside_it(
    tiny_mono, tiny_stereo, tmp_path, monkeypatch
):
    bundled = Path(shutil.copytree(tiny_mono, tmp_path / "bundled"))
    monkeypatch.setattr(registry, "BUNDLED", bundled)
    with pytest.raises(RequestError, match="no stereo sibling"):
        registry.resolve("bundled", stereo=True)
    assert registry.describe(registry.resolve("auto")).stereo == "never"
    sibling = Path(shutil.copytree(tiny_stereo, tmp_path / "bundled-stereo"))
    assert registry.resolve("bundled", stereo=True).folder == sibling
    assert registry.describe(registry.resolve("auto")).stereo == "choice"


def test_the_bundled_folder_is_the_bundled_checkpoint():
    assert registry.resolve(str(registry.BUNDLED)) == registry.resolve("bundled")


def test_a_folder_may_be_absolute_relative_or_under_home(changeable, monkeypatch):
    monkeypatch.chdir(changeable.parent)
    monkeypatch.setenv("HOME", str(changeable.parent))
    for name in (str(changeable), "checkpoint", "./checkpoint/", "~/checkpoint"):
        source = registry.resolve(name)
        assert source.folder == changeable
        assert source.name == "~/checkpoint"  # what a take says names no one
    assert registry.resolve(source.name) == source


@pytest.mark.parametrize(
    "name", ["nonsense", "a/b/c", "./missing", "~nobody-here/x", "x" * 400, "é/è", "/", "a b/c"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(RequestError) as error:
        registry.describe(registry.resolve(name))
    assert "bundled" in str(error.value)
    assert error.value.field == "checkpoint"
    assert len(str(error.value)) < 400


# What is known without loading


def test_describe_reads_no_weights_and_imports_nothing_heavy(changeable):
    (changeable / "model.safetensors").unlink()
    description = registry.describe(registry.resolve(str(changeable)))
    assert (description.stereo, description.sampling_rate) == ("never", 32_000)
    code = (
        "import sys; from musicgen_ui.checkpoints import registry as c\n"
        "for n in c.known(): print(c.describe(c.resolve(n)).summary)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(registry.known())
    assert "587 M parameters" in done.stdout
    assert sum("CC-BY-NC 4.0" in line for line in lines) == 12


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


def test_weights_under_the_names_of_older_versions_are_read(changeable):
    from safetensors.torch import load_file, save_file

    expected = load(changeable).model.state_dict()
    weights = load_file(changeable / "model.safetensors")
    old = {"parametrizations.weight.original0": "weight_g"}
    old |= {"parametrizations.weight.original1": "weight_v"}
    for new_name, old_name in old.items():
        weights = {key.replace(new_name, old_name): value for key, value in weights.items()}
    weights["decoder.model.decoder.embed_positions.weights"] = torch.zeros(2048, 16)
    save_file(weights, changeable / "model.safetensors", metadata={"format": "pt"})
    for key, value in load(changeable).model.state_dict().items():
        assert torch.equal(value, expected[key])


def test_two_threads_may_load_at_once(tiny_mono, tiny_stereo):
    with ThreadPoolExecutor(4) as pool:
        loads = list(pool.map(load, [tiny_mono, tiny_stereo] * 4))
    assert [loaded.channels for loaded in loads] == [1, 2] * 4


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
    with pytest.raises(RequestError, match="cannot be used") as error:
        load(broken("model.safetensors", whole[: len(whole) // 2]))
    assert error.value.__cause__ is not None
    with pytest.raises(RequestError, match=r"no model\.safetensors"):
        load(broken("model.safetensors", None))
    with pytest.raises(RequestError, match=r"no readable config\.json"):
        load(broken("config.json", b"{"))
    with pytest.raises(RequestError, match=r"no readable config\.json"):
        load(broken("config.json", None))
    with pytest.raises(RequestError, match="cannot be used"):
        load(broken("tokenizer.json", b"{"))


def test_missing_weights_are_not_made_up(changeable):
    from safetensors.torch import load_file, save_file

    for lost in ("decoder.model.decoder.layers.0.fc1.weight", "codebook.embed"):
        weights = load_file(changeable / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.endswith(lost)}
        assert len(kept) < len(weights)
        folder = Path(shutil.copytree(changeable, changeable.parent / lost))
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RequestError, match="cannot be used"):
            load(folder)


def test_the_harmless_warning_is_silenced_and_no_other(tiny_mono, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # the bench makes it quieter
    load(tiny_mono)
    assert "vocabulary" not in caplog.text
    logging.getLogger("transformers.configuration_utils").warning("something else")
    assert "something else" in caplog.text
