"""No file of a checkpoint takes memory or time for itself: each is refused, soon, in a sentence."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from musicgen_ui.checkpoints import file_checks, lora, registry
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.errors import RequestError


@contextmanager
def refused_cheaply(kind: type[Exception] = RequestError) -> Iterator[None]:
    """What is within is refused, within 60 MB and 5 s."""
    tracemalloc.start()
    began_s = time.monotonic()
    try:
        with pytest.raises(kind) as refusal:
            yield
        assert tracemalloc.get_traced_memory()[1] < 60e6 and time.monotonic() - began_s < 5
        assert len(str(refusal.value)) < 600
    finally:
        tracemalloc.stop()


@pytest.fixture
def changeable(tiny_mono: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mono, tmp_path / "checkpoint"))


def use(folder: Path) -> None:
    """Everything that a visitor can have done with a checkpoint."""
    source = registry.resolve(str(folder))
    registry.describe(source)
    registry.load(source, torch.float32, lambda _: None)


LONG = "1" + "0" * 400
FILES = [
    *("", "[]", "[" * 100_000, '{"a":' * 100_000, LONG, "Infinity", "NaN", "null", "\x00"),
    '{"model_type": ["musicgen"]}',
    '{"model_type": {"musicgen": 1}}',
    '{"model_type": "' + "x" * 900_000 + '"}',
    '{"model_type": "musicgen", "audio_encoder": []}',
]


@pytest.mark.parametrize("text", FILES, ids=lambda text: text[:40])
def test_a_configuration_that_is_none_is_a_sentence(changeable, text):
    (changeable / "config.json").write_text(text)
    with refused_cheaply():
        use(changeable)


VALUES = [
    ("audio_encoder", "upsampling_ratios", f"[{'99,' * 90_000}99]"),
    ("audio_encoder", "upsampling_ratios", f"[{'99,' * 1_000_000}99]"),
    ("audio_encoder", "upsampling_ratios", "[]"),
    ("audio_encoder", "upsampling_ratios", "[99, 99, 99, 99, 99]"),
    ("audio_encoder", "upsampling_ratios", f"[8, 5, 4, {LONG}]"),
    ("audio_encoder", "target_bandwidths", f"[{'2.2,' * 60_000}2.2]"),
    ("audio_encoder", "target_bandwidths", "[1e300]"),
    ("audio_encoder", "target_bandwidths", "[Infinity]"),
    ("audio_encoder", "target_bandwidths", "[NaN]"),
    ("audio_encoder", "target_bandwidths", "[]"),
    ("audio_encoder", "codebook_dim", "1000000000"),
    ("audio_encoder", "sampling_rate", LONG),
    ("audio_encoder", "sampling_rate", "1" + "0" * 5_000),
    ("audio_encoder", "num_filters", "1" + "0" * 15),
    ("audio_encoder", "num_lstm_layers", "100000"),
    ("audio_encoder", "num_residual_layers", "60"),
    ("audio_encoder", "dilation_growth_rate", "100000"),
    ("audio_encoder", "kernel_size", "1e400"),
    ("audio_encoder", "attn_implementation", '"someone/kernel"'),
    ("decoder", "max_position_embeddings", "100000000"),
    ("decoder", "max_position_embeddings", LONG),
    ("decoder", "num_hidden_layers", "100000000"),
    ("decoder", "hidden_size", "-Infinity"),
    ("text_encoder", "num_layers", "100000000"),
    ("text_encoder", "d_model", "true"),
    ("text_encoder", "vocab_size", "100000000000"),
    ("text_encoder", "num_labels", "100000000"),
    ("decoder", "num_labels", '"many"'),
    (None, "num_labels", LONG),
    ("text_encoder", "deep", "[" * 900 + "]" * 900),
]


def write_value(file: Path, part: str | None, key: str, text: str) -> None:
    """Puts JSON that Python would not write into a file."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    (held.setdefault(part, {}) if part else held)[key] = "here"
    file.write_text(json.dumps(held).replace('"here"', text))


@pytest.mark.parametrize(("part", "key", "text"), VALUES, ids=lambda value: str(value)[-30:])
def test_a_value_of_a_configuration_is_bounded_before_it_is_used(changeable, part, key, text):
    write_value(changeable / "config.json", part, key, text)
    began_s = time.monotonic()
    with pytest.raises(RequestError) as refusal:
        registry.describe(registry.resolve(str(changeable)))
    assert len(str(refusal.value)) < 600 and time.monotonic() - began_s < 3


@pytest.mark.parametrize("text", ["[]", LONG])
@pytest.mark.parametrize(
    ("name", "key"),
    [("generation_config.json", "max_length"), ("processor_config.json", "feature_extractor")],
)
def test_other_settings_of_a_checkpoint_end_in_no_traceback(changeable, name, key, text):
    write_value(changeable / name, None, key, text)
    with suppress(RequestError):
        use(changeable)
    (changeable / name).write_text(text)
    assert registry.describe(registry.resolve(str(changeable)))


@pytest.mark.parametrize(
    ("n_fft", "hop", "rate"), [(2**20, 1, 32_000), (16_384, 1, 32_000), (2**17, 2**16, 32_000)]
)
def test_a_melodys_windows_are_bounded(tiny_melody, tmp_path, n_fft, hop, rate):
    folder = Path(shutil.copytree(tiny_melody, tmp_path / "checkpoint"))
    file = folder / "processor_config.json"
    held = json.loads(file.read_text())
    held["feature_extractor"] |= {"n_fft": n_fft, "hop_length": hop, "sampling_rate": rate}
    file.write_text(json.dumps(held))
    with refused_cheaply():
        use(folder)


def merges() -> str:
    """Each name has ten times the keys of the one before."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize("text", [merges(), "[" * 19_000, ":".join("1" * 9_000), "a: &a [*a]"])
def test_a_card_is_bounded(tiny_mono, tmp_path, text):
    folder = tmp_path / "alone"
    folder.mkdir()
    decoder = json.loads((tiny_mono / "config.json").read_text())["decoder"]
    (folder / "config.json").write_text(json.dumps(decoder | {"model_type": "musicgen_decoder"}))
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    with refused_cheaply():
        use(folder)
    with refused_cheaply(ValueError):
        file_checks.read_yaml(text)


# pickles


class Call:
    """Pickles as a call, of what a pickle of weights may not call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


HUGE = 6_000_000_000
PICKLES = [
    Call(bytearray, HUGE),
    {"best_state": {"a": Call(bytearray, HUGE)}},
    Call(torch.Tensor, HUGE),
    Call(torch.sparse_coo_tensor, [[0]], [1.0], [HUGE, HUGE]),
]
WEIGHTS = ["state_dict.bin", "pytorch_model.bin"]


def with_pickle(folder: Path, name: str) -> Path:
    """A checkpoint whose weights are in the file that is returned."""
    (folder / "model.safetensors").unlink()
    if name == "state_dict.bin":
        (folder / "config.json").unlink()
        torch.save({"pretrained": "someone/codec"}, folder / "compression_state_dict.bin")
    return folder / name


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("held", PICKLES, ids=lambda held: type(held).__name__)
def test_a_pickle_that_asks_for_memory_is_refused(changeable, name, held):
    file = with_pickle(changeable, name)
    for write in (
        lambda: file.write_bytes(pickle.dumps(held, protocol=2)),
        lambda: torch.save(held, file),
        lambda: torch.save(held, file, _use_new_zipfile_serialization=False),
    ):
        write()
        with refused_cheaply():
            use(changeable)


def test_a_pickle_of_many_steps_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save([], file)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("data.pkl")]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            f"{names[0].partition('/')[0]}/data.pkl", b"\x80\x02" + b"]" * 400_000 + b"."
        )
    with pytest.raises(pickle.UnpicklingError):
        file_checks.require_weights(file)


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_archive_that_grows_is_refused(changeable, name):
    file = with_pickle(changeable, name)
    torch.save({"best_state": {"a": torch.zeros(5_000_000)}}, changeable / "plain")
    with zipfile.ZipFile(changeable / "plain") as plain:
        packed = [zipfile.ZIP_DEFLATED] * 2, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
        for kinds in packed:
            with zipfile.ZipFile(file, "w") as archive:
                for entry in plain.infolist():
                    kind = kinds[entry.filename.endswith("/data/0")]
                    archive.writestr(entry.filename, plain.read(entry), kind)
            assert file.stat().st_size < 1e6
            with pytest.raises(RequestError):
                use(changeable)


@pytest.mark.parametrize("new", [True, False])
def test_weights_as_torch_writes_them_are_read(tmp_path, new):
    held = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "b": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2).half(),
        "number": 3,
        "text": {"xp.cfg": "x", "history": [{"loss": 0.5, "done": True}]},
    }
    held["tied"] = held["a"]
    torch.save(held, tmp_path / "weights.bin", _use_new_zipfile_serialization=new)
    file_checks.require_weights(tmp_path / "weights.bin")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "state.bin")
    file_checks.require_weights(tmp_path / "state.bin")


def test_a_list_of_weights_without_end_is_refused(changeable):
    file = changeable / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 90_000_000) + b"{" + b" " * 1000 + file.read_bytes())
    with refused_cheaply():
        use(changeable)


# tokenizers


def tokenizer(**parts_of_it: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    for name, value in parts_of_it.items():
        setattr(made, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def charsmap(text: bytes) -> bytes:
    return struct.pack("<I", 4) + b"\0" * 4 + text + b"\0"


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("a", "a" * 100_000),
        normalizers.Replace(Regex("."), "b" * 5_000),
        normalizers.Replace("", "b" * 5_000),
        normalizers.Prepend("a" * 100_000),
        normalizers.Sequence([normalizers.Replace("a", "aa")] * 40),
    ],
    ids=lambda normalizer: str(normalizer)[:30],
)
def test_a_tokenizer_that_makes_texts_long_is_refused(changeable, normalizer):
    tokenizer(normalizer=normalizer).save_pretrained(changeable)
    with refused_cheaply():
        use(changeable)
    with refused_cheaply():
        exported.text_encoder_weights(changeable)


def test_what_is_put_around_a_text_is_bounded():
    names = " ".join(["<pad>"] * 20_000)
    around = processors.TemplateProcessing(f"$A {names}", special_tokens=[("<pad>", 0)])
    with refused_cheaply(ValueError):
        file_checks.require_bounded_tokenizer(tokenizer(post_processor=around))
    file_checks.require_bounded_tokenizer(tokenizer(normalizer=normalizers.NFKD()))


def test_sentencepieces_replacements_are_bounded():
    state = {"type": "Precompiled"}
    for text, calm in ((b"x" * 18, True), (b"x" * 5_000, False)):
        coded = base64.b64encode(charsmap(text)).decode()
        grown = file_checks._growth(state | {"precompiled_charsmap": coded})
        assert (grown <= file_checks.GROWTH) == calm


@pytest.mark.parametrize("text", ["100000000", LONG, "1e300", '"many"', "-1"])
def test_a_tokenizers_extra_ids_are_bounded(changeable, text):
    (changeable / "tokenizer.json").unlink()
    write_value(changeable / "tokenizer_config.json", None, "extra_ids", text)
    write_value(changeable / "tokenizer_config.json", None, "tokenizer_class", '"T5Tokenizer"')
    with refused_cheaply():
        use(changeable)


def test_a_tokenizer_of_gigabytes_is_not_opened(changeable):
    with (changeable / "tokenizer.json").open("ab") as file:
        file.truncate(3_000_000_000)
    with refused_cheaply():
        use(changeable)


# adapters


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, LONG, '{"r": Infinity}'])
def test_an_adapters_settings_are_bounded(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with refused_cheaply():
        lora.fetch(lora.find(str(tmp_path)))
