"""MusicGen-Style: a clip's style, words or both, against audiocraft's formulas."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.checkpoints import hub, memory, registry
from musicgen_ui.checkpoints.audiocraft import convert
from musicgen_ui.engine import sampling
from musicgen_ui.engine.protocol import Chunk
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import Steering
from tests.helpers import style
from tests.helpers.engine import PIANO, ROCK, beside, codes_of, noise, run_job, stream

CLIP = noise(6.0, seed=5)
BOTH = GenerationRequest(ROCK, style=CLIP, style_start_s=1.0, duration_s=0.5, do_sample=False)
WORDS = dataclasses.replace(BOTH, style=None)
STYLE = dataclasses.replace(BOTH, prompt="")


@pytest.fixture(scope="module")
def folder(tiny_style: Path) -> Path:
    return tiny_style


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "style"
    convert.convert(folder, out, None, lambda _: None)
    return out


@pytest.fixture(scope="module")
def reference(folder: Path) -> style.Reference:
    return style.Reference(folder)


@pytest.fixture(scope="module")
def batch(folder: Path) -> Scheduler:
    return style.style_batch(folder)


def prefix_of(batch: Scheduler, reference: style.Reference, request: GenerationRequest) -> Any:
    """What audiocraft prepends; T5 is transformers' in both."""
    conditioner = batch.conditioner

    def text(words: str) -> torch.Tensor:
        tokens = conditioner.tokenizer(words, return_tensors="pt").input_ids
        return conditioner.text_encoder(tokens)[0]

    with torch.no_grad():
        heard = None
        if request.style:
            excerpt = request.style_excerpt
            samples = torch.from_numpy(audio.convert(excerpt, 24_000, 1).samples[0])
            heard = reference.style(samples, request.style_codebooks)
        words = text(request.prompt) if request.prompt else None
        return reference.conditions(heard, words, text(""))


@pytest.mark.parametrize("codebooks", [1, 3, 6])
def test_style_layers_equal_audiocrafts(batch, reference, codebooks):
    request = dataclasses.replace(BOTH, style_codebooks=codebooks, style_length_s=1.7)
    encoder, seen = batch.conditioner.style.encoder, {}

    def keep(name: str) -> Any:
        return lambda _, __, out: seen.update({name: getattr(out, "last_hidden_state", out)})

    watched = {"mert": encoder.mert, "batch_norm": encoder.batch_norm}
    for i, layer in enumerate(encoder.transformer.layers):
        watched[f"{style.SELF_WAV}transformer.{i}"] = layer
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    states = batch.conditioner.style.states(request)
    for hook in hooks:
        hook.remove()
    prefix = prefix_of(batch, reference, request)
    assert len(seen) == 2 + style.LAYERS
    for name, made in seen.items():
        assert made.std() > 0.3  # it says something
        assert torch.allclose(made, reference.layers[name], atol=2e-4), name
    tokens = batch.conditioner.style.tokens(request)
    assert tokens.shape == (9, style.HIDDEN)  # 127 features, every 15th
    assert torch.allclose(tokens, reference.layers["tokens"][0], atol=1e-5)
    assert torch.allclose(states, prefix[0, :9], atol=1e-4)


@pytest.mark.parametrize("request_", [BOTH, WORDS, STYLE], ids=["both", "words", "style"])
def test_style_logits_and_codes_equal_audiocrafts(batch, reference, request_):
    """Double guidance with both, plain guidance with one of them, as audiocraft advises."""
    request = request_
    beta = request.text_guidance if request.prompt and request.style else None
    prefix = prefix_of(batch, reference, request)
    conditions = batch.conditioner.conditions(request)
    rows = [0, 1, 2] if beta else [0, 2]
    assert torch.allclose(torch.stack(conditions.states), prefix[rows], atol=1e-4)
    sequence = batch.decoder.sequence(conditions.states, 1)
    batch.decoder.prefill(sequence, torch.zeros(4, 0), 10_000)
    start = torch.full((4, 1), batch.decoder.start_token)
    logits = batch.decoder.step(start.T, [sequence])
    assert torch.allclose(logits, reference.logits(prefix[rows], start), atol=1e-3)
    cond = sampling.mix(logits[:-1], conditions.weights)
    guided = sampling.guide(cond, logits[-1], torch.tensor(3.0))
    expected = reference.guided(prefix, start, 3.0, beta)
    assert torch.allclose(guided, expected, atol=1e-2) and expected.std() > 1
    _, codes, _ = run_job(batch, request)
    assert len(codes.unique()) > 10
    assert torch.equal(codes, reference.greedy(prefix, 25, 3.0, beta))


def test_style_converted_and_as_it_is_are_the_same(batch, converted, reference):
    again = style.style_batch(converted)
    for one, other in zip(
        batch.conditioner.conditions(BOTH).states,
        again.conditioner.conditions(BOTH).states,
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(run_job(again, BOTH)[1], run_job(batch, BOTH)[1])
    info = registry.describe(registry.resolve(str(converted)))
    assert info.style and not info.melody
    config = registry.config_of(registry.resolve(str(converted)))
    model = registry.load(registry.resolve(str(converted)), torch.float32, lambda _: None).model
    assert memory.count_parameters(config) == sum(w.numel() for w in model.parameters())


def test_mert_comes_from_the_hub_or_where_one_says(batch, folder, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    elsewhere = (copy / "mert").rename(tmp_path / "elsewhere")
    convert.convert(copy, tmp_path / "out", None, lambda _: None, str(elsewhere))
    asked = []

    def download(name: str, _: object) -> Path:
        asked.append(name)
        return elsewhere

    with pytest.raises(RequestError, match=r"needs m-a-p/MERT-v1-95M, and .* by --mert"):
        registry.fetch(registry.resolve(str(copy)), lambda _: None)
    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "config_file", lambda name: elsewhere / "config.json")
    registry.fetch(registry.resolve(str(copy)), lambda _: None)
    assert asked == ["m-a-p/MERT-v1-95M"]
    expected = batch.conditioner.style.states(BOTH)
    for found in (copy, tmp_path / "out"):
        assert torch.equal(style.style_batch(found).conditioner.style.states(BOTH), expected)


@pytest.mark.parametrize("options", [{}, {"graphs": True}, {"precision": "int8"}], ids=str)
def test_style_takes_do_not_depend_on_others(batch, folder, options):
    """Beside takes of words, of a style, and of a clip that is continued; on every stepper."""
    batch = style.style_batch(folder, **options) if options else batch
    drawn = dataclasses.replace(BOTH, do_sample=True, seed=7)
    others = [
        dataclasses.replace(WORDS, prompt=PIANO, do_sample=True, seed=1, guidance_scale=1.0),
        dataclasses.replace(STYLE, do_sample=True, seed=2),
        dataclasses.replace(WORDS, seed=3, audio_prompt=noise(0.4)),
    ]
    alone = run_job(batch, drawn)[1]
    assert len(alone.unique()) > 10
    assert torch.equal(codes_of(beside(batch, drawn, others)), alone)
    assert torch.equal(run_job(batch, drawn)[1], alone)


def test_style_settings_change_the_music(batch):
    changes: list[dict[str, Any]] = [{}, {"style_start_s": 2.5}, {"style_length_s": 4.0}]
    changes += [{"style_codebooks": 1}, {"text_guidance": 1.0}, {"text_guidance": 2.5}]
    takes = [run_job(batch, dataclasses.replace(BOTH, **each))[1] for each in changes]
    assert len({codes.numpy().tobytes() for codes in takes}) == len(changes)
    assert not batch.conditioner.conditions(dataclasses.replace(BOTH, text_guidance=1.0)).mixed


def test_style_is_that_of_the_excerpt_alone(batch):
    """What is outside of it, its sampling rate and stereo make no difference."""
    samples = CLIP.samples.copy()
    samples[:, :32_000], samples[:, 4 * 32_000 :] = 0, 0
    other = dataclasses.replace(BOTH, style=Clip(np.repeat(samples, 2, axis=0), 32_000))
    styles = [batch.conditioner.style.states(each) for each in (BOTH, other)]
    assert torch.equal(*styles) and len(styles[0]) == 15


def test_style_goes_on_in_the_next_window(batch):
    """A piece of two windows is one of the style in both, and streams as it ends."""
    request = dataclasses.replace(BOTH, duration_s=3.0, style_length_s=1.5)
    events = list(stream(batch, request))
    *_, take = events
    chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
    assert take.clip.duration_s == 3 and not take.stopped
    assert np.array_equal(np.concatenate(chunks, 1), take.clip.samples)


def test_style_take_can_be_stopped(batch):
    stop = threading.Event()
    events = []
    for event in stream(batch, dataclasses.replace(BOTH, duration_s=10.0), stop):
        events.append(event)
        if isinstance(event, Chunk):
            stop.set()
    assert events[-1].stopped and 0 < events[-1].clip.duration_s < 5


# What cannot be


def test_style_checkpoint_needs_something_to_go_by(folder, tiny_mono):
    source = registry.resolve(str(folder))
    registry.require_able(source, BOTH)
    with pytest.raises(RequestError, match="from the style of a clip, or from both"):
        registry.require_able(source, dataclasses.replace(WORDS, prompt=""))
    steered = ((0.0, Steering(prompts=(("", 0.5), (ROCK, 0.5)))),)
    registry.require_able(source, GenerationRequest(automation=steered, live=True))
    with pytest.raises(RequestError, match="cannot follow chords"):
        registry.require_able(source, dataclasses.replace(WORDS, chords="C G"))
    with pytest.raises(RequestError, match="cannot take on the style of a clip: choose style"):
        registry.require_able(registry.resolve(str(tiny_mono)), BOTH)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"feature_extractor_cqt": True}, "its feature_extractor_cqt is True"),
        ({"attention_relax": 32.0}, "its attention_relax is 32.0"),
        ({"conv_dim": [8] * 6}, "style's values do not fit"),
        ({"hidden_size": 24}, "MERT is 24 wide, and .* trained with one of 16"),
    ],
    ids=str,
)
def test_style_refuses_another_mert(folder, tmp_path, changes, sentence):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "mert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(RequestError, match=sentence):
        registry.load(registry.resolve(str(copy)), torch.float32, lambda _: None)


def test_style_settings_that_audiocraft_has_otherwise(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    package = torch.load(copy / "state_dict.bin", weights_only=True)
    for name, value in (("model_name", "encodec"), ("transformer_scale", "none")):
        settings = yaml.safe_load(package["xp.cfg"])
        settings["conditioners"]["self_wav"]["style"][name] = value
        torch.save(package | {"xp.cfg": yaml.safe_dump(settings)}, copy / "state_dict.bin")
        with pytest.raises(RequestError, match=f"{name} is '{value}'"):
            registry.load(registry.resolve(str(copy)), torch.float32, lambda _: None)
