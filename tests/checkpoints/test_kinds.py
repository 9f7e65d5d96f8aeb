"""Decoders alone are completed, layers are read as they are packed, and what cannot fit is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MusicgenForCausalLM, MusicgenForConditionalGeneration

from musicgen_ui.backends.local import load_scheduler
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import memory, registry
from musicgen_ui.engine import device as devices
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers import tiny
from tests.helpers.engine import ROCK, generated, make_batch, run_job

CPU = devices.choose("cpu", "float32")
GREEDY = GenerationRequest(ROCK, duration_s=0.5, do_sample=False)


def load(folder: Path, streamed: bool = False) -> registry.Loaded:
    source = registry.resolve(str(folder))
    return registry.load(source, torch.float32, lambda _: None, streamed)


def codes(folder: Path) -> torch.Tensor:
    batch = load_scheduler(registry.resolve(str(folder)), CPU, 4, lambda _: None)
    return run_job(batch, GREEDY)[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("bases") / "base", text_hidden=24, gated_t5=True)


def write_decoder(base: Path, folder: Path, **values) -> Path:
    """The decoder of another checkpoint of the same shape, as its trainer saves it alone."""
    trained = tiny.build(folder.parent / "trained", text_hidden=24, seed=7)
    MusicgenForCausalLM.from_pretrained(trained).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "musicgen_decoder"
    tiny.edit_config(folder, **values)
    return folder


# Layer by layer


@pytest.mark.parametrize("form", ["whole", "half", "shards", "pickle"])
def test_layers_read_one_by_one_are_those_read_at_once(base, form, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "checkpoint"))
    model = MusicgenForConditionalGeneration.from_pretrained(folder)
    if form != "whole":
        (folder / "model.safetensors").unlink()
    if form == "half":
        model.half().save_pretrained(folder)
    elif form == "shards":
        model.save_pretrained(folder, max_shard_size="60KB")
    elif form == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    whole, streamed = load(folder), load(folder, streamed=True)
    expected = whole.model.decoder.model.decoder.layers
    found = list(streamed.model.decoder.model.decoder.layers)
    assert len(found) == len(expected) == 2
    for layer, other in zip(found, expected, strict=True):
        for name, weight in other.state_dict().items():
            assert torch.equal(layer.state_dict()[name].float(), weight), name
    for name, weight in streamed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    assert {p.dtype for p in found[0].parameters()} == {
        torch.float16 if form == "half" else torch.float32
    }


def test_a_batch_made_layer_by_layer_plays_the_same(base):
    assert torch.equal(codes(base), run_job(make_batch(base), GREEDY)[1])


@pytest.mark.parametrize("lost", ["layers.1.fc1.weight", "layers.0.self_attn.q_proj.weight"])
def test_a_layers_missing_or_misshapen_weight_is_a_sentence(base, lost, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(base, tmp_path / "checkpoint"))
    weights = {k: w.clone() for k, w in load_file(folder / "model.safetensors").items()}
    key = f"decoder.model.decoder.{lost}"
    for wrong in ({}, {key: weights[key][:-1].clone()}):
        kept = {k: w for k, w in weights.items() if k != key} | wrong
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RequestError, match="cannot be used"):
            load(folder, streamed=True)


@pytest.mark.parametrize("kept", [7, 1000, -1])
def test_a_file_cut_short_is_a_sentence_before_anything_is_packed(base, kept, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "checkpoint"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(RequestError, match="cannot be used"):
        load(folder, streamed=True)


@pytest.mark.parametrize("gated_t5", [False, True])
@pytest.mark.parametrize("text_hidden", [16, 24])
def test_every_text_encoder_of_the_family_gives_generates_codes(gated_t5, text_hidden, tmp_path):
    folder = tiny.build(tmp_path / "tiny", gated_t5=gated_t5, text_hidden=text_hidden, stereo=True)
    model = MusicgenForConditionalGeneration.from_pretrained(folder)
    expected, _ = generated(model, folder, [ROCK], 25, 3.0)
    assert torch.equal(codes(folder), expected[0])


# A decoder alone


@pytest.mark.parametrize("where", ["config.json", "README.md"])
def test_a_decoder_alone_is_completed_by_the_base_it_names(base, where, tmp_path):
    folder = write_decoder(base, tmp_path / "decoder")
    if where == "config.json":
        tiny.edit_config(folder, base_model=str(base))
    else:
        (folder / "README.md").write_text(f"---\nbase_model:\n- {base}\n---\n# Mine\n")
    description = registry.describe(registry.resolve(str(folder)))
    assert description.sampling_rate == 32_000 and description.stereo == "never"
    assert f"text encoder and codec of {base}" in description.summary
    # By hand: the base with the trained decoder in place of its own.
    whole = MusicgenForConditionalGeneration.from_pretrained(base)
    whole.decoder = MusicgenForCausalLM.from_pretrained(folder)
    by_hand = Path(shutil.copytree(base, tmp_path / "by-hand"))
    whole.save_pretrained(by_hand)
    assert torch.equal(codes(folder), codes(by_hand))
    assert not torch.equal(codes(folder), codes(base))


def test_a_decoder_that_names_no_base_takes_the_published_one_of_its_shape(tmp_path):
    folder = tmp_path / "decoder"
    bundled = MusicgenForCausalLM.from_pretrained(registry.BUNDLED)
    bundled.save_pretrained(folder)
    assert registry.open_checkpoint(registry.resolve(str(folder))).base == "bundled"
    assert load(folder).sampling_rate == 16_000
    config = configuration.meta("stereo-melody".removeprefix("stereo-"), True)["decoder"]
    values = {**config, "model_type": "musicgen_melody_decoder"}
    (folder / "config.json").write_text(json.dumps(values))
    base = registry.open_checkpoint(registry.resolve(str(folder))).base
    assert base == "facebook/musicgen-stereo-melody"
    assert registry.describe(registry.resolve(str(folder))).melody


def test_a_decoder_without_a_base_or_with_one_that_does_not_fit_is_refused(base, tmp_path):
    folder = write_decoder(base, tmp_path / "decoder")
    with pytest.raises(RequestError, match=r"decoder alone.* write .* under base_model"):
        load(folder)
    tiny.edit_config(folder, base_model="bundled")
    with pytest.raises(RequestError, match="decoder chooses among 64 codes and its codec has 512"):
        load(folder)
    tiny.edit_config(folder, base_model=str(folder))  # round and round
    with pytest.raises(RequestError, match="holds a musicgen_decoder model"):
        load(folder)
    melody = tiny.build(tmp_path / "melody", melody=True)
    tiny.edit_config(folder, base_model=str(melody))
    with pytest.raises(RequestError, match="only one follows melodies"):
        load(folder)


# What fits


def test_what_cannot_fit_is_refused_with_a_precision_or_checkpoints_that_do():
    large, others = configuration.meta("large", False), registry.known_configs()
    with pytest.raises(RequestError) as error:
        memory.require_fits("large", large, CPU, 6_000_000_000, others)
    assert "large needs 13.7 GB of memory in float32" in str(error.value)
    assert "--precision int8, which needs 5.1 GB" in str(error.value)
    assert "such as small (2." in str(error.value) or "stereo-small (2." in str(error.value)
    int8 = devices.choose("cpu", "int8")
    memory.require_fits("large", large, int8, 6_000_000_000, others)
    with pytest.raises(RequestError, match="--memory-gb"):
        memory.require_fits("large", large, CPU, 1000, others)


def test_the_command_line_lists_every_published_checkpoint():
    command = [sys.executable, "-m", "musicgen_ui", "checkpoints", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "Memory: bfloat16" in lines[0] and "Fits in int8" in lines[0]
    assert [line.split()[0] for line in lines[1:-2]] == list(registry.known())
    assert "models may use" in lines[-1]
    assert sum("melodies" in line for line in lines) == 4
