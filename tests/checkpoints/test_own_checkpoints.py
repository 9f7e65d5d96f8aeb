"""Checkpoints as people bring them: what works as it is, and what is told by its cause."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MusicgenForCausalLM

from musicgen_ui.checkpoints import loading, lora, registry
from musicgen_ui.checkpoints.loading import Stored
from musicgen_ui.errors import RequestError
from tests.helpers import tiny

PROMPTS = ["80s pop with the warm piano", "slow techno", "bright guitar and drums"]
WEIGHTS = "model.safetensors"


def quiet(_: str) -> None:
    pass


def load(folder: Path | str) -> registry.Loaded:
    return registry.load(registry.resolve(str(folder)), torch.float32, quiet)


def refused(folder: Path, told: str) -> str:
    """The sentence that a folder is refused with; it is never to be deleted, the user made it."""
    with pytest.raises(RequestError, match=told) as error:
        load(folder)
    assert error.value.field == "checkpoint"
    assert "delete" not in str(error.value).lower() and "fetch it again" not in str(error.value)
    return str(error.value)


@pytest.fixture
def own(tiny_mono: Path, tmp_path: Path) -> Path:
    """A checkpoint that a user trained."""
    return Path(shutil.copytree(tiny_mono, tmp_path / "own"))


def without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("*token*.json"):
        file.unlink()
    return folder


def store(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def set_vocabulary(folder: Path, size: int) -> None:
    """Gives the text encoder another number of tokens."""
    weights = load_file(folder / WEIGHTS)
    name = "text_encoder.shared.weight"
    weights[name] = torch.randn(size, weights[name].shape[1])
    store(folder, weights)
    tiny.edit_config(folder, "text_encoder", vocab_size=size)


# Tokenizers: without one, every prompt would sound alike


def test_a_checkpoint_without_a_tokenizer_is_refused(own):
    refused(without_tokenizer(own), "tokenizer")


@pytest.mark.parametrize("part", ["checkpoint", "decoder", "text_encoder"])
def test_no_part_makes_up_a_tokenizer(own, tmp_path, part):
    without_tokenizer(own)
    if part == "decoder":
        folder = tmp_path / "decoder"
        MusicgenForCausalLM.from_pretrained(own).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"base_model": str(own)}))
    elif part == "text_encoder":
        golden = Path(__file__).parents[1] / "golden"
        folder = Path(shutil.copytree(golden / "mono", tmp_path / "exported"))
        without_tokenizer(Path(shutil.copytree(golden / "text_encoder", folder / "text_encoder")))
    else:
        folder = own
    refused(folder, "tokenizer")


def test_the_tokenizer_of_the_base_is_taken_if_it_fits(own, tiny_mono):
    tiny.edit_config(without_tokenizer(own), base_model=str(tiny_mono))
    theirs = AutoTokenizer.from_pretrained(tiny_mono)
    assert load(own).tokenizer(PROMPTS).input_ids == theirs(PROMPTS).input_ids
    set_vocabulary(own, 300)
    refused(own, "tokenizer")


def test_a_text_encoder_with_t5s_vocabulary_takes_t5s_tokenizer(own, tmp_path, monkeypatch):
    cached = tmp_path / "t5"
    cached.mkdir()
    shutil.copy(own / "tokenizer.json", cached)
    set_vocabulary(without_tokenizer(own), loading.T5_VOCABULARY)
    refused(own, r"t5-base.*HF_HUB_OFFLINE")
    monkeypatch.setattr(
        loading.hub, "cached_with", lambda name, file: cached if name == "t5-base" else None
    )
    assert len({tuple(ids) for ids in load(own).tokenizer(PROMPTS).input_ids}) == 3


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(own):
    set_vocabulary(own, 20)
    refused(own, r"tokenizer.*20")


def test_a_sentencepiece_model_alone_is_a_tokenizer(own):
    sentencepiece = pytest.importorskip("sentencepiece")
    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 50),
        model_writer=written,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},  # T5's
    )
    set_vocabulary(without_tokenizer(own), 200)
    (own / "spiece.model").write_bytes(written.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    made = loading.tokenizer(own, 200)
    for prompt, ids in zip(PROMPTS, made(PROMPTS).input_ids, strict=True):
        assert ids == [*theirs.encode(prompt), 1]
    (own / "spiece.model").write_bytes(written.getvalue()[:-9])
    refused(own, r"spiece\.model")


# Names of weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: "_orig_mod." + name,  # torch.compile
        lambda name: "module." + name,  # DDP
        lambda name: "model.module._orig_mod." + name,
        lambda name: "musicgen." + name,
        lambda name: "base_model.model." + name,  # peft, after a merge
        lambda name: name.replace("decoder.layers.", "decoder.layers._orig_mod."),
        lambda name: name.replace("text_encoder.", "text_encoder._fsdp_wrapped_module."),
    ],
)
def test_names_that_training_wraps_are_unwrapped(own, wrap):
    weights = load_file(own / WEIGHTS)
    store(own, {wrap(name): weight for name, weight in weights.items()})
    found = Stored([own / WEIGHTS]).get(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_unknown_names_of_weights_are_named(own):
    weights = load_file(own / WEIGHTS)
    store(own, {f"ema.{name}": weight for name, weight in weights.items()})
    refused(own, r"unknown names, such as ema\.")


def test_a_compiled_model_loads(own):
    expected = load(own).model.state_dict()
    store(own, {f"_orig_mod.{k}": weight for k, weight in load_file(own / WEIGHTS).items()})
    for name, weight in load(own).model.state_dict().items():
        assert torch.equal(weight, expected[name])


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.", "module.model."])
def test_a_decoder_alone_may_be_wrapped_too(own, prefix):
    weights = load_file(own / WEIGHTS)
    inner = {k: w for k, w in weights.items() if k.startswith("decoder.")}
    store(own, {prefix + name.removeprefix("decoder."): w for name, w in inner.items()})
    found = Stored([own / WEIGHTS], "decoder.").get(inner)
    assert all(torch.equal(found[name], weight) for name, weight in inner.items())


def test_two_weights_of_one_name_are_refused(own):
    weights = load_file(own / WEIGHTS)
    name = "decoder.lm_heads.0.weight"
    store(own, weights | {f"_orig_mod.{name}": weights[name] + 1})
    refused(own, name)


@pytest.mark.parametrize("ending", ["lora_A.default.weight", "lora_B.weight"])
def test_a_lora_that_is_not_merged_is_told(own, ending):
    """By all of its names, as peft has them, or with the base's as they were."""
    weights = load_file(own / WEIGHTS)
    module = "decoder.model.decoder.layers.0.self_attn.q_proj."
    if "default" in ending:
        weights[f"{module}base_layer.weight"] = weights.pop(f"{module}weight")
        weights = {f"base_model.model.{name}": weight for name, weight in weights.items()}
        module = f"base_model.model.{module}"
    store(own, weights | {module + ending: torch.zeros(2, 16)})
    refused(own, r"(?i)lora.*merge")


def test_weights_that_the_configuration_does_not_describe_are_named(own):
    tiny.edit_config(own, "text_encoder", d_ff=48)
    refused(own, r"config\.json.*text_encoder.*\[32.*\[48")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("module", ["decoder.model.decoder.layers.1.fc1", "enc_to_dec_proj"])
@pytest.mark.parametrize("pickled", [False, True])
def test_quantized_weights_are_refused_by_name(own, module, dtype, pickled):
    weights = load_file(own / WEIGHTS)
    weights[f"{module}.weight"] = torch.zeros(32, 16).to(dtype)
    if pickled and dtype == torch.int8:
        (own / WEIGHTS).unlink()
        torch.save(weights, own / "pytorch_model.bin")
    else:
        store(own, weights)
    refused(own, f"{module}.*float16")


# Files that are none


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs"),
        (WEIGHTS, b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (WEIGHTS, b"", "empty"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
        ("generation_config.json", b"{broken", r"generation_config\.json"),
        ("generation_config.json", b"[1]", r"generation_config\.json"),
        ("processor_config.json", b"{broken", r"processor_config\.json"),
        ("processor_config.json", b"[]", r"processor_config\.json"),
    ],
)
def test_a_file_that_is_none_is_named(own, name, content, told):
    (own / name).write_bytes(content)
    assert name in refused(own, told)


def test_adapters_and_exported_files_are_looked_at_as_well(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    golden = Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "mono", tmp_path / "mono"))
    (golden / "compression_state_dict.bin").write_bytes(pointer)
    refused(golden, "git lfs")
    (tmp_path / lora.CONFIG).write_text("{}")
    (tmp_path / lora.WEIGHTS).write_bytes(pointer)
    with pytest.raises(RequestError, match="git lfs"):
        lora.fetch(lora.find(str(tmp_path)))


# Where it lies


def test_a_folder_that_is_called_like_a_published_checkpoint_is_meant(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("musicgen-small", "facebook/musicgen-small", "small"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        assert registry.resolve(name).name == "facebook/musicgen-small"  # nothing is in it
        shutil.copytree(own, folder, dirs_exist_ok=True)
        assert registry.resolve(name).folder == folder
    shutil.copytree(own, tmp_path / "bundled")
    assert registry.resolve("auto").folder == registry.BUNDLED  # nobody named a folder


def test_the_path_of_a_file_is_that_of_its_folder(own):
    for name in (WEIGHTS, "config.json"):
        assert registry.resolve(str(own / name)).folder == own
    shutil.copy(own / WEIGHTS, own / "step-500.safetensors")
    with pytest.raises(RequestError, match=r"step-500\.safetensors.*model\.safetensors"):
        registry.resolve(str(own / "step-500.safetensors"))


def test_a_stereo_checkpoint_with_a_mono_processor_plays(tiny_stereo, tiny_mono, tmp_path):
    folder = Path(shutil.copytree(tiny_stereo, tmp_path / "stereo"))
    shutil.copy(tiny_mono / "processor_config.json", folder)
    assert load(folder).channels == 2


def test_a_checkpoint_named_as_an_adapter_is_told(own):
    with pytest.raises(RequestError, match="is a checkpoint") as error:
        lora.fetch(lora.find(str(own)))
    assert error.value.field == "adapter"
