"""What is measured: transformers' `generate` and our engine, and the weights they run on.

Both are read from files by the app's own loading code. A random checkpoint of musicgen-small's size
is written to a temporary folder first, so no download is needed. Random weights of the larger sizes
are made on the device where they run, as to write and read them takes longer than to time them.
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
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer

from musicgen_ui.backends.local import load_scheduler
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.config_types import Configuration
from musicgen_ui.checkpoints.file_checks import JsonObject
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.codec import CodecStream
from musicgen_ui.engine.device import Place
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.linear import computing_dtype
from musicgen_ui.engine.protocol import Chunk, Failed
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.variation import CHUNK_FRAMES
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

PROMPT = "80s pop track with bassy drums and a bright synth lead"
GUIDANCE_SCALE, TOP_K = 3.0, 250
CODEC_S, CODEC_TURNS = 5.0, 5  # of music, decoded alone so many times to time the codec
WARM_UP_S = 0.5  # of music
WRITTEN = ("small", "tiny")  # sizes of random checkpoints that are files


@dataclass(frozen=True)
class RunTimes:
    """A run: music for some callers at once."""

    wall_s: float
    first_audio_s: float  # until the last caller had its first sample
    codec_wait_s: float  # that the decoder's thread spent in the codec; 0 on a GPU, which does both


def place_of(device: str, named: str) -> Place:
    """Where a precision runs; "bfloat16/int8" is bfloat16 with the KV cache in int8.

    Raises:
        RequestError: there is no such device or precision here.
    """
    precision, _, kv_cache_dtype = named.partition("/")
    return devices.choose(device, precision, kv_cache_dtype or "auto")


def precision_of(place: Place) -> str:
    """What `place_of` takes."""
    named = {"auto": place.precision}
    return named.get(place.kv_cache_dtype, f"{place.precision}/{place.kv_cache_dtype}")


class Runner(Protocol):
    """A loaded candidate."""

    def warm_up(self, jobs: int, duration_s: float) -> None:
        """Prepares a run, so that nothing is compiled, captured or allocated in it."""
        ...

    def run(self, jobs: int, duration_s: float) -> RunTimes:
        """Makes music for `jobs` callers at once."""
        ...

    def codec_s(self) -> float:
        """Seconds to decode one second of music."""
        ...


class TransformersRunner:
    """transformers' own `generate`."""

    def __init__(self, source: Source | RandomWeights, place: Place) -> None:
        loaded = (
            source.loaded(place.device, torch.float32)
            if isinstance(source, RandomWeights)
            else registry.load(source, torch.float32, lambda note: None)
        )
        self.model = loaded.model
        self.device, self.dtype = place.device, getattr(torch, place.precision)
        module: torch.nn.Module = self.model
        module.to(self.device, self.dtype)
        if place.device == "cpu":
            # torch 2.13 computes some bfloat16 convolutions wrongly on CPUs with AMX.
            self.model.audio_encoder.float()
        self.inputs = loaded.tokenizer(PROMPT, return_tensors="pt").to(self.device)

    def warm_up(self, jobs: int, duration_s: float) -> None:
        """Makes a little music."""
        self.run(jobs, WARM_UP_S)

    @torch.inference_mode()
    def run(self, jobs: int, duration_s: float) -> RunTimes:
        """Makes music for `jobs` callers as one batch, delivered when all is done."""
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
        return RunTimes(wall_s, wall_s, spent[0] if self.device == "cpu" else 0.0)

    @torch.inference_mode()
    def codec_s(self) -> float:
        """Seconds to decode one second of music, in one piece."""
        codec: Any = self.model.audio_encoder  # transformers' types are narrower than what it takes
        decoder = self.model.decoder.config
        # [pieces, rows, codebooks, frames]
        shape = (1, decoder.audio_channels, decoder.num_codebooks // decoder.audio_channels)
        frames = round(CODEC_S * codec.config.frame_rate)
        codes = torch.randint(decoder.vocab_size, (*shape, frames), device=self.device)
        return _repeated_s(lambda: codec.decode(codes, [None]).audio_values.cpu()) / CODEC_S  # noqa: PLW0108


class EngineRunner:
    """Our loop, loaded and driven as the app does."""

    def __init__(self, source: Source | RandomWeights, place: Place, max_jobs: int) -> None:
        self.batch = (
            source.batch(place, max_jobs)
            if isinstance(source, RandomWeights)
            else load_scheduler(source, place, max_jobs, lambda note: None)
        )
        self._runs = 0

    def warm_up(self, jobs: int, duration_s: float) -> None:
        """On a GPU all of the run: graphs are captured for each number of jobs and each length."""
        self.run(jobs, WARM_UP_S if self.batch.device.type == "cpu" else duration_s)

    def run(self, jobs: int, duration_s: float) -> RunTimes:
        """Makes music for `jobs` callers, each delivered as it comes."""
        batch, on_cpu = self.batch, self.batch.device.type == "cpu"
        self._runs += 1  # words that were never asked for: the text encoder runs each time

        waiting: list[LoggedJob] = []  # jobs without audio
        devices.synchronize(batch.device)
        started_s = time.perf_counter()
        with _timed(CodecStream, "push") as spent:
            for job in range(jobs):
                request = request_of(duration_s, job, f"{PROMPT} {self._runs}")
                waiting.append(batch.submit(request))
            first_s = 0.0  # until every job had audio
            while batch.step():
                ready = [job for job in waiting if _has_audio(job)]
                if ready:
                    first_s = time.perf_counter() - started_s
                    waiting = [job for job in waiting if job not in ready]
        devices.synchronize(batch.device)
        wall_s = time.perf_counter() - started_s
        return RunTimes(wall_s, first_s, spent[0] if on_cpu else 0.0)

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


def _has_audio(job: LoggedJob) -> bool:
    """Whether its first audio has come.

    Raises:
        Exception: what the job failed with.
    """
    for event in job.log.so_far():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Chunk):
            return True
    return False


def request_of(duration_s: float, seed: int, prompt: str = PROMPT) -> GenerationRequest:
    """What every candidate is asked for.

    Raises:
        RequestError: a length that cannot be.
    """
    return GenerationRequest.parse(
        {
            "prompt": prompt,
            "duration_s": duration_s,
            "guidance_scale": GUIDANCE_SCALE,
            "top_k": TOP_K,
            "seed": seed,
        }
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
def _timed(owner: object, name: str) -> Iterator[list[float]]:
    """Within it, a method of `owner` adds the seconds that this thread spends in it to the list."""
    method, spent, thread = getattr(owner, name), [0.0], threading.get_ident()

    def timed(*args: object, **options: object) -> object:
        started_s = time.perf_counter()
        try:
            result: object = method(*args, **options)
            return result
        finally:
            if threading.get_ident() == thread:
                spent[0] += time.perf_counter() - started_s

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        setattr(owner, name, method)


@contextlib.contextmanager
def source(checkpoint: str, tiny: bool = False) -> Iterator[Source | RandomWeights]:
    """The checkpoint's files, which for a random one lie in a temporary folder until the end; or
    that its weights are made where they run. With `tiny` a random one is tiny.

    Raises:
        RequestError: there is no such checkpoint.
    """
    if not (size := random_size(checkpoint)):
        yield registry.resolve(checkpoint)
        return
    made = size not in WRITTEN
    size = "tiny" if tiny else size
    if made:
        yield RandomWeights(size)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), size)
        yield Source(f"random:{size}", Path(folder))


def random_size(checkpoint: str) -> str:
    """The size of a random checkpoint, such as "small"; "" for any other.

    Raises:
        RequestError: there is no such size.
    """
    kind, _, size = checkpoint.partition(":")
    sizes = (*configuration.META_SIZES, "tiny")
    if kind == "random" and size not in sizes:
        raise RequestError(f"There is no {checkpoint}: choose random: with {', '.join(sizes)}.")
    return size if kind == "random" else ""


@dataclass(frozen=True)
class RandomWeights:
    """Random weights of one of Meta's sizes, or tiny, made where they run: no file is read."""

    size: str

    @property
    def name(self) -> str:
        """As `--checkpoint` has it."""
        return f"random:{self.size}"

    @property
    def config(self) -> Configuration:
        """As a checkpoint's file would have it."""
        return _parts(self.size)

    def batch(self, place: Place, max_jobs: int) -> Scheduler:
        """A batch; the decoder's layers are made one by one, as files are read."""
        loaded = self.loaded(place.device, computing_dtype(place.precision), True)
        return Scheduler(
            loaded.model,
            loaded.tokenizer,
            checkpoint=self.name,
            device=place.device,
            precision=place.precision,
            codec_device=place.codec_device,
            max_jobs=max_jobs,
            kv_cache_dtype=place.kv_cache_dtype,
        )

    def loaded(self, device: str, dtype: torch.dtype, streamed: bool = False) -> registry.Loaded:
        """transformers' model on `device`. What is streamed, the layers, is made as `dtype`."""
        config = random_config(self.size)
        count = config.decoder.num_hidden_layers
        config.decoder.num_hidden_layers = 0 if streamed else count
        with torch.random.fork_rng(), torch.device(device), torch.no_grad():
            torch.manual_seed(0)
            model = _random_model(config)
        if streamed:
            config.decoder.num_hidden_layers = model.decoder.config.num_hidden_layers = count
            model.decoder.model.decoder.layers = RandomLayers(config.decoder, device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            _write_tokenizer(Path(folder))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rate, channels = config.audio_encoder.sampling_rate, config.decoder.audio_channels
        return registry.Loaded(model.eval(), tokenizer, self.name, rate, channels, {})


class RandomLayers(torch.nn.Module):
    """A decoder's layers with random weights, each made when its turn comes."""

    def __init__(
        self, config: transformers.MusicgenDecoderConfig, device: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._of = config, device, dtype

    def __len__(self) -> int:
        return int(self._of[0].num_hidden_layers)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        config, device, dtype = self._of
        for _ in range(len(self)):
            with torch.device(device):
                layer = MusicgenDecoderLayer(config)
            yield layer.to(dtype).eval()


def write_random(folder: Path, size: str) -> None:
    """Writes a checkpoint with random weights of one of Meta's sizes, or a tiny one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _random_model(random_config(size)).save_pretrained(folder)
    _write_tokenizer(folder)


def _random_model(
    config: transformers.MusicgenConfig,
) -> transformers.MusicgenForConditionalGeneration:
    model = transformers.MusicgenForConditionalGeneration(config)
    codec: Any = model.audio_encoder  # torch's stubs know nothing of a module's parts
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    start = model.decoder.config.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=start, bos_token_id=start, decoder_start_token_id=start
    )
    return model


def _parts(size: str) -> Configuration:
    parts = configuration.meta("small" if size == "tiny" else size, stereo=False)
    if size == "tiny":
        _shrink(parts)
    return parts


def random_config(size: str) -> Any:
    """transformers' configuration of "small", "medium", "large" or "tiny"."""
    parts = _parts(size)
    start = parts["decoder"]["vocab_size"]  # one past the codes
    text: JsonObject = {**parts["text_encoder"]}
    codec: JsonObject = {**parts["audio_encoder"]}
    return transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(**text),
        audio_encoder=transformers.EncodecConfig(
            **codec, normalize=False, chunk_length_s=None, use_causal_conv=False
        ),
        decoder=transformers.MusicgenDecoderConfig(
            **parts["decoder"], pad_token_id=start, bos_token_id=start
        ),
    )


def _shrink(parts: Configuration) -> None:
    parts["text_encoder"] |= {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
    }
    parts["audio_encoder"] |= {"num_filters": 2, "hidden_size": 16}
    parts["decoder"] |= {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_attention_heads": 2,
    }


def _write_tokenizer(folder: Path) -> None:
    """One of two words: all others are one unknown token each, which costs what any other does."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: index for index, word in enumerate([*names.values(), "drums", "bass"])}
    content: dict[str, object] = {
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
