"""The codec equals transformers', in one piece and as a stream of any pieces."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import EncodecConfig, EncodecModel, MusicgenForConditionalGeneration

from musicgen_ui.engine import codec_layers
from musicgen_ui.engine.codec import Codec, push_together
from musicgen_ui.engine.cpu import codec_kernels
from musicgen_ui.engine.cpu.codec_kernels import Lstm
from musicgen_ui.errors import RequestError
from tests.helpers import tiny

ASSETS = Path(__file__).parents[2] / "assets"
SIZE = 64
SETTINGS = {
    "sampling_rate": 32_000,
    "normalize": False,
    "num_filters": 4,
    "upsampling_ratios": [8, 5, 4, 4],
    "use_causal_conv": False,
    "codebook_size": SIZE,
    "codebook_dim": 16,
    "hidden_size": 16,
    "target_bandwidths": [1.2],
    "use_conv_shortcut": False,
}
KINDS = {
    "meta's": {},
    "bundled's": {"sampling_rate": 16_000, "upsampling_ratios": [4, 4, 5, 4], "num_lstm_layers": 1},
    "audiocraft's": {"pad_mode": "constant"},
    "causal": {"use_causal_conv": True},
    "causal, trimmed on both sides": {"use_causal_conv": True, "trim_right_ratio": 0.5},
    "deep": {
        "num_residual_layers": 3,
        "dilation_growth_rate": 3,
        "residual_kernel_size": 5,
        "use_conv_shortcut": True,
        "sampling_rate": 1500,
        "upsampling_ratios": [3, 2, 5],
        "kernel_size": 9,
        "last_kernel_size": 4,
    },
}


def encodec(**changes) -> EncodecModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EncodecModel(EncodecConfig(**{**SETTINGS, **changes})).eval()
        tiny._waken_codec(model)
    return model


def draw(codec: Codec, frames: int, seed: int = 0) -> torch.Tensor:
    rows = codec.channels * codec.codebooks
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, codec.codebook_size, (rows, frames), generator=generator)


@torch.no_grad()
def reference(model: EncodecModel, codes: torch.Tensor) -> torch.Tensor:
    return model.decode(codes[None, None], [None]).audio_values[0]


def streamed(codec: Codec, codes: torch.Tensor, sizes) -> torch.Tensor:
    stream, audio, start = codec.stream(), [], 0
    while start < codes.shape[1]:
        size = next(sizes)
        audio.append(stream.push(codes[:, start : start + size]))
        start += size
    audio.append(stream.push(codes[:, :0], last=True))
    return torch.cat(audio, dim=1)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def noise_db(audio: torch.Tensor, exact: torch.Tensor) -> float:
    return 20 * math.log10((audio - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def bundled() -> EncodecModel:
    model = MusicgenForConditionalGeneration.from_pretrained(
        ASSETS / "bundled", dtype=torch.float32
    )
    return model.audio_encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_transformers_at_every_length(kind):
    model = encodec(**KINDS[kind])
    codec = Codec(model, precision="float32")
    for frames in (1, 2, 3, 4, 5, 130):
        codes = draw(codec, frames)
        audio = codec.decode(codes)
        assert audio.shape == (1, frames * codec.hop) and audio.dtype == torch.float32
        assert apart(audio, reference(model, codes)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_pieces_equals_the_one_shot_decode(kind):
    codec = Codec(encodec(**KINDS[kind]))
    codes = draw(codec, 60)
    audio = codec.decode(codes)
    chance = random.Random(1)
    for sizes in ([1], [2], [7], [25], [60], [chance.choice([0, 1, 2, 3, 11]) for _ in range(99)]):
        pieces = (size for _ in range(99) for size in sizes)
        assert apart(streamed(codec, codes, pieces), audio) < 2e-6


def test_bundled_checkpoint_sounds_and_encodes_as_in_transformers(bundled):
    codec = Codec(bundled, precision="float32")
    codes = draw(codec, 50)
    audio = codec.decode(codes)
    assert apart(audio, reference(bundled, codes)) < 1e-5
    with torch.no_grad():
        expected = bundled.encode(audio[None]).audio_codes[0, 0]
    assert codec.encode(audio).equal(expected)


def test_whole_numbers_are_inaudible_in_music(bundled):
    samples, _ = soundfile.read(ASSETS / "example.wav", dtype="float32", frames=320 * 150)
    codec = Codec(bundled)
    codes = codec.encode(torch.from_numpy(samples)[None])
    exact = reference(bundled, codes)
    assert noise_db(codec.decode(codes), exact) < -58
    assert noise_db(Codec(bundled, precision="float32").decode(codes), exact) < -110


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_give_what_float32_does(kind, monkeypatch):
    monkeypatch.setattr(codec_layers, "FEWEST_INPUTS", 1)
    monkeypatch.setattr(
        codec_layers, "_multiplies_int16", lambda: True
    )  # slowly, where it does not
    model = encodec(**KINDS[kind])
    for channels in (1, 2):
        codec = Codec(model, channels)
        codes, exact = draw(codec, 30), Codec(model, channels, precision="float32")
        audio = codec.decode(codes)
        assert -120 < noise_db(audio, exact.decode(codes)) < -50
        # One step of int16 apart where a rounding falls on the edge between two.
        assert apart(streamed(codec, codes, iter(range(1, 30))), audio) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_other_processors_hear_the_same(kind, monkeypatch):
    monkeypatch.setattr(codec_layers, "_packs", lambda weight: False)
    model = encodec(**KINDS[kind])
    codec = Codec(model, precision="float32")
    codes = draw(codec, 30)
    audio = reference(model, codes)
    assert apart(codec.decode(codes), audio) < 1e-5
    assert apart(streamed(codec, codes, iter(range(1, 30))), audio) < 1e-5


def test_stereo_interleaves_left_and_right():
    model = encodec()
    mono, stereo = Codec(model), Codec(model, channels=2)
    left, right = draw(mono, 20, seed=1), draw(mono, 20, seed=2)
    codes = torch.stack([left, right], dim=1).flatten(0, 1)  # rows left 0, right 0, left 1, …
    audio = stereo.decode(codes)
    assert apart(audio, torch.cat([mono.decode(left), mono.decode(right)])) < 2e-6
    encoded = stereo.encode(audio)
    with torch.no_grad():
        for channel in range(2):
            expected = model.encode(audio[None, channel : channel + 1]).audio_codes[0, 0]
            assert encoded[channel::2].equal(expected)


def test_what_numba_compiles_is_compiled_once(monkeypatch):
    monkeypatch.setattr(codec_layers, "FEWEST_INPUTS", 1)
    monkeypatch.setattr(codec_layers, "_multiplies_int16", lambda: True)
    for channels in (1, 2):
        codec = Codec(encodec(), channels)
        streamed(codec, draw(codec, 30), iter(range(1, 30)))
    assert len(codec_kernels._convolve.signatures) == 1


def test_streams_do_not_disturb_each_other():
    codec = Codec(encodec())
    signals = [draw(codec, 30, seed) for seed in range(3)]
    streams = [codec.stream() for _ in signals]
    audio = [[], [], []]
    for start in range(0, 30, 6):
        for i, codes in enumerate(signals):
            audio[i].append(streams[i].push(codes[:, start : start + 6], last=start == 24))
    for pieces, codes in zip(audio, signals, strict=True):
        assert apart(torch.cat(pieces, dim=1), codec.decode(codes)) < 2e-6


def test_first_samples_come_with_the_fourth_frame():
    stream = Codec(encodec()).stream()
    codes = draw(Codec(encodec()), 5)
    assert stream.push(codes[:, :3]).shape[1] == 0
    assert stream.push(codes[:, 3:4]).shape[1] > 0
    assert stream.push(codes[:, 4:]).shape[1] == 640


def test_an_ended_stream_says_so_and_an_empty_one_is_silent():
    codec = Codec(encodec())
    codes = draw(codec, 2)
    stream = codec.stream()
    assert stream.push(codes[:, :0], last=True).shape == (1, 0)
    with pytest.raises(ValueError, match="ended"):
        stream.push(codes)
    assert codec.decode(codes[:, :0]).shape == (1, 0)
    assert codec.encode(torch.zeros(1, 0)).shape == (codec.codebooks, 0)


def test_released_module_leaves_its_weights_to_the_codec():
    model = encodec()
    codes = draw(Codec(model), 6)
    audio = reference(model, codes)
    weights = sum(p.nbytes for p in model.parameters())
    codec = Codec(model, precision="float32", release=True)
    assert not list(model.parameters())
    assert apart(codec.decode(codes), audio) < 1e-4
    assert weights < codec.nbytes < 1.5 * weights  # and the codebooks


def test_a_stream_holds_no_more_than_its_kernels_need():
    codec = Codec(encodec())
    stream = codec.stream()
    stream.push(draw(codec, 100))
    held = [past.inputs for past in stream._pasts if past.inputs is not None]
    assert all(inputs.untyped_storage().nbytes() == inputs.nbytes for inputs in held)
    assert sum(inputs.shape[1] for inputs in held) < 30


def test_encoding_in_pieces_equals_transformers_on_long_audio():
    model = encodec()
    codec = Codec(model)
    audio = codec.decode(draw(codec, 130))
    with torch.no_grad():
        assert codec.encode(audio).equal(model.encode(audio[None]).audio_codes[0, 0])


@pytest.mark.parametrize(
    "changes", [{"norm_type": "time_group_norm"}, {"normalize": True}, {"pad_mode": "replicate"}]
)
def test_other_kinds_of_codec_are_refused(changes):
    with pytest.raises(RequestError, match="codec"):
        Codec(EncodecModel(EncodecConfig(**{**SETTINGS, **changes})))


def unknown(decoder: torch.nn.Module) -> None:
    decoder.layers.insert(2, torch.nn.Conv1d(8, 8, 1))


def without_activation(decoder: torch.nn.Module) -> None:
    del decoder.layers[2]


def activated_twice(decoder: torch.nn.Module) -> None:
    decoder.layers.insert(2, torch.nn.ELU())


def activated_in_the_end(decoder: torch.nn.Module) -> None:
    decoder.layers.append(torch.nn.ELU())


def activated_otherwise(decoder: torch.nn.Module) -> None:
    decoder.layers[2] = torch.nn.ELU(alpha=0.5)


def longer_residual(decoder: torch.nn.Module) -> None:
    block = next(each for each in decoder.layers if hasattr(each, "block"))
    block.block.append(torch.nn.ELU())


@pytest.mark.parametrize(
    "change",
    [
        *(unknown, without_activation, activated_twice),
        *(activated_in_the_end, activated_otherwise, longer_residual),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_codec_with_a_layer_that_is_not_computed_is_refused(change, part):
    small = {"num_filters": 2, "hidden_size": 16, "codebook_dim": 16}
    changed = getattr(EncodecModel(EncodecConfig(**{**SETTINGS, **small})), part)
    codec_layers.assemble(changed.layers, "float32")
    change(changed)
    with pytest.raises(RequestError, match="codec"):
        codec_layers.assemble(changed.layers, "float32")


@pytest.mark.parametrize("batch", [1, 2])
def test_the_lstm_in_int8_is_near_torchs_in_any_pieces_on_any_number_of_threads(batch):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(128, 128, 2).eval()
    x, threads, runs = torch.randn(40, batch, 128), torch.get_num_threads(), []
    with torch.inference_mode():
        expected, (h, c) = lstm(x)
        try:
            for count, sizes in ((1, [40]), (2, [1, 7, 32]), (3, [25, 15])):
                torch.set_num_threads(count)
                run, state, found = Lstm(lstm), None, []
                for piece in x.split(sizes):
                    y, state = run(piece, state)
                    found.append(y)
                runs.append(torch.cat(found))
                assert noise_db(state[0], h) < -40 and noise_db(state[1], c) < -40
        finally:
            torch.set_num_threads(threads)
    assert noise_db(runs[0], expected) < -40
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("kind", ["meta's", "causal", "deep"])
@pytest.mark.parametrize("channels", [1, 2])
def test_streams_that_are_pushed_together_give_what_each_gives_alone(kind, channels):
    codec = Codec(encodec(**KINDS[kind]), channels, precision="float32")
    signals = [draw(codec, 70, seed) for seed in range(3)]
    streams = [codec.stream() for _ in signals]
    audio = [[stream.push(s[:, :20])] for stream, s in zip(streams, signals, strict=True)]
    assert len({stream.phase for stream in streams}) == 1
    for start, end in ((20, 45), (45, 46), (46, 66)):
        pieces = push_together(streams, [s[:, start:end] for s in signals])
        for pushed, piece in zip(audio, pieces, strict=True):
            pushed.append(piece)
        states = [past.hidden for stream in streams for past in stream._pasts if past.hidden]
        assert all(part.is_contiguous() for state in states for part in state)  # cuDNN wants it
    for pushed, stream, signal in zip(audio, streams, signals, strict=True):
        pushed.append(stream.push(signal[:, 66:], last=True))
        assert apart(torch.cat(pushed, dim=1), codec.decode(signal)) < 1e-5


def test_a_stream_that_has_just_begun_is_of_another_phase():
    codec = Codec(encodec(), precision="float32")
    begun, new = codec.stream(), codec.stream()
    begun.push(draw(codec, 20))
    assert begun.phase != new.phase
