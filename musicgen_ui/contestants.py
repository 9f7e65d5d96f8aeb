"""Who runs in the bench, and on which weights: transformers' `generate` and our loop.

Both are read from files by the app's own loading code. A random checkpoint of one of Meta's sizes
is written to a temporary folder first, so no download is needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from musicgen_ui import checkpoints, configuration
from musicgen_ui.checkpoints import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.codec import CodecStream
from musicgen_ui.engine.device import Place
from musicgen_ui.engine.events import Chunk, Event
from musicgen_ui.engine.job import CHUNK_FRAMES
from musicgen_ui.manager import load_batch
from musicgen_ui.request import GenerationRequest, RequestError

PROMPT = "80s pop track with bassy drums and a bright synth lead"
GUIDANCE_SCALE, TOP_K = 3.0, 250
CODEC_S, CODEC_TURNS = 5.0, 5  # of music, decoded alone so many times to time the codec


@dataclass(frozen=True)
class Ran:
    """A run: music for some callers at once."""

    wall_s: float
    first_audio_s: float  # until the last caller heard the first sample
    codec_wait_s: float  # that the decoder's thread spent in the codec
    cache_bytes: int  # keys and values at the end


class Loop(Protocol):
    """A loaded contestant."""

    def run(self, jobs: int, duration_s: float) -> Ran:
        """Makes music for `jobs` callers at once."""
        ...

    def codec_s(self) -> float:
        """Seconds to decode one second of music."""
        ...


class Peer:
    """transformers' own `generate`."""

    def __init__(self, source: Source, place: Place) -> None:
        loaded: Any = checkpoints.load(source, torch.float32, lambda note: None)
        self.model = loaded.model
        self.device, self.dtype = place.device, getattr(torch, place.precision)
        self.model.to(self.device, self.dtype)
        if place.device == "cpu":
            # torch 2.13 computes some bfloat16 convolutions wrongly on CPUs with AMX.
            self.model.audio_encoder.float()
        self.inputs = loaded.tokenizer(PROMPT, return_tensors="pt").to(self.device)

    @torch.inference_mode()
    def run(self, jobs: int, duration_s: float) -> Ran:
        """Makes music for `jobs` callers as one batch, which is heard when all of it is done."""
        torch.set_num_threads(devices.THREADS)
        decoder = self.model.decoder.config
        frames = round(duration_s * self.model.audio_encoder.config.frame_rate)
        steps = frames + decoder.num_codebooks // decoder.audio_channels - 1
        started_s = time.perf_counter()
        with _timed(self.model.audio_encoder, "decode") as spent:
            audio = self.model.generate(
                input_ids=self.inputs.input_ids.repeat(jobs, 1),
                attention_mask=self.inputs.attention_mask.repeat(jobs, 1),
                max_new_tokens=steps,
                do_sample=True,
                guidance_scale=GUIDANCE_SCALE,
                top_k=TOP_K,
                top_p=1.0,
                temperature=1.0,
            ).cpu()
        wall_s = time.perf_counter() - started_s
        hop = math.prod(self.model.audio_encoder.config.upsampling_ratios)
        assert audio.shape == (jobs, decoder.audio_channels, frames * hop), audio.shape
        cached = 2 * jobs * 2 * decoder.num_hidden_layers * decoder.hidden_size * steps
        return Ran(wall_s, wall_s, spent[0], cached * self.dtype.itemsize)

    @torch.inference_mode()
    def codec_s(self) -> float:
        """Seconds to decode one second of music, in one piece."""
        codec, decoder = self.model.audio_encoder, self.model.decoder.config
        # [pieces, rows, codebooks, frames]
        shape = (1, decoder.audio_channels, decoder.num_codebooks // decoder.audio_channels)
        frames = round(CODEC_S * codec.config.frame_rate)
        codes = torch.randint(decoder.vocab_size, (*shape, frames), device=self.device)
        return _repeated_s(lambda: codec.decode(codes, [None]).audio_values.cpu()) / CODEC_S


class Ours:
    """Our loop, loaded and driven as the app does."""

    def __init__(self, source: Source, place: Place, max_jobs: int) -> None:
        self.batch = load_batch(source, place, max_jobs, lambda note: None)

    def run(self, jobs: int, duration_s: float) -> Ran:
        """Makes music for `jobs` callers, each heard as it comes."""
        batch, idle_bytes = self.batch, self.batch.nbytes
        heard_s: dict[int, float] = {}
        errors: list[Exception] = []

        def deliver(job: int, event: Event | Exception) -> None:
            if isinstance(event, Exception):
                errors.append(event)
            elif isinstance(event, Chunk):
                heard_s.setdefault(job, time.perf_counter() - started_s)

        started_s = time.perf_counter()
        with _timed(CodecStream, "push") as spent:
            for job in range(jobs):
                batch.submit(request_of(duration_s, job), None, partial(deliver, job))
            for _ in range(jobs):  # a step admits one
                batch.step()
            cache_bytes = batch.nbytes - idle_bytes
            while batch.step():
                pass
        wall_s = time.perf_counter() - started_s
        if errors:
            raise errors[0]
        return Ran(wall_s, max(heard_s.values()), spent[0], cache_bytes)

    def codec_s(self) -> float:
        """Seconds to decode one second of music, in the pieces that a job streams."""
        codec = self.batch.codec
        frames = round(CODEC_S * codec.frame_rate)
        codes = torch.randint(codec.codebook_size, (codec.channels * codec.codebooks, frames))
        pieces = codes.split(CHUNK_FRAMES, dim=1)

        def decode() -> None:
            stream = codec.stream()
            for piece in pieces:
                stream.push(piece, last=piece is pieces[-1]).cpu()

        return _repeated_s(decode) / CODEC_S


def request_of(duration_s: float, seed: int) -> GenerationRequest:
    """What every contestant is asked for.

    Raises:
        RequestError: a length that cannot be.
    """
    return GenerationRequest(
        PROMPT, duration_s=duration_s, guidance_scale=GUIDANCE_SCALE, top_k=TOP_K, seed=seed
    )


def _repeated_s(work: Callable[[], object]) -> float:
    """The median time of a few turns, after one to warm up."""
    spent = []
    for _ in range(1 + CODEC_TURNS):
        started_s = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started_s)
    return statistics.median(spent[1:])


@contextlib.contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Within it, a method of `owner` adds the seconds that this thread spends in it to the list."""
    method, spent, thread = getattr(owner, name), [0.0], threading.get_ident()

    def timed(*args: Any, **options: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            if threading.get_ident() == thread:
                spent[0] += time.perf_counter() - started_s

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        setattr(owner, name, method)


@contextlib.contextmanager
def source(checkpoint: str) -> Iterator[Source]:
    """The checkpoint's files; a random one's lie in a temporary folder until the end.

    Raises:
        RequestError: there is no such checkpoint.
    """
    kind, _, size = checkpoint.partition(":")
    if kind != "random":
        yield checkpoints.resolve(checkpoint)
        return
    sizes = (*configuration.META_SIZES, "tiny")
    if size not in sizes:
        raise RequestError(f"There is no {checkpoint}: choose random: with {', '.join(sizes)}.")
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), size)
        yield Source(checkpoint, Path(folder))


def write_random(folder: Path, size: str) -> None:
    """Writes a checkpoint with random weights of one of Meta's sizes, or a tiny one."""
    config = random_config(size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = transformers.MusicgenForConditionalGeneration(config)
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()
    start = config.decoder.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=start, bos_token_id=start, decoder_start_token_id=start
    )
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def random_config(size: str) -> Any:
    """transformers' configuration of "small", "medium", "large" or "tiny"."""
    parts = configuration.meta("small" if size == "tiny" else size, stereo=False)
    if size == "tiny":
        _shrink(parts)
    start = parts["decoder"]["vocab_size"]  # one past the codes
    whole: dict[str, Any] = {"normalize": False, "chunk_length_s": None, "use_causal_conv": False}
    return transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(**parts["text_encoder"]),
        audio_encoder=transformers.EncodecConfig(**parts["audio_encoder"], **whole),
        decoder=transformers.MusicgenDecoderConfig(
            **parts["decoder"], pad_token_id=start, bos_token_id=start
        ),
    )


def _shrink(parts: configuration.Configuration) -> None:
    text = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    decoder = {"num_hidden_layers": 2, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2}
    parts["text_encoder"] |= text
    parts["audio_encoder"] |= {"num_filters": 2, "hidden_size": 16}
    parts["decoder"] |= decoder


def _write_tokenizer(folder: Path) -> None:
    """One that knows no words: each is one unknown token, which costs what any other does."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: index for index, word in enumerate(names.values())}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | names), encoding="utf-8")
