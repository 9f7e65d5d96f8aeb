"""Speed and memory of transformers' `generate` and of our engine, on the same weights.

A candidate is one of the two in one precision. Each is loaded from the same files, warmed up, run
with every number of jobs and every length, and freed before the next is loaded. All candidates run
once in a round, so that a slow minute of the machine affects all of them; a figure is the median of
the rounds, and a run of more than a minute is not repeated. On a GPU, where loading takes longer
than running, all rounds use one load, and our engine is loaded again for each number of jobs, so
that the memory measured is what that number needs.

`--published` measures the rows of docs/performance.md (a quarter of an hour on two cores) and
prints their ratios below the table; `--profile` lists the kernels of a step instead. Every run
makes the whole of `duration_s` for each job with guidance 3 and top-k 250; nothing is
extrapolated.

The figures of a row:
  steps_per_s       decoder steps a second over the whole run, on a CPU less the time that the
                    thread of the decoder spent in the codec; a step moves every job one frame on
  real_time_factor  seconds of music of all jobs together in a second, codec included
  first_audio_s     from the request, with a prompt that was not used before, to the first samples
                    of the job that waits longest, the model being loaded and warm; `generate`
                    returns everything at the end
  codec_s           seconds to decode one second of music: transformers' in one piece, ours in
                    the pieces that it streams
  cold_start_s      reading and packing the weights, files in the system's cache; absent where
                    they were made on the device
  peak_mb           the most memory during the run, weights included: CUDA's allocator, or else
                    the whole process (Linux: its peak; elsewhere: at the run's end)
  load_peak_mb      the same during the cold start
  roofline_fraction of the steps a second that memory bandwidth allows: the bytes of the decoder's
                    weights and of half of the final KV cache over the measured bandwidth
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import transformers

from musicgen_ui.benchmark import machine, quantization_error, report, runners, step_profile
from musicgen_ui.benchmark.report import Row
from musicgen_ui.benchmark.runners import RandomWeights, request_of
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.config_types import Configuration, DecoderValues
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.device import Place
from musicgen_ui.errors import RequestError

PRECISIONS = {  # ours, by device; see `runners.place_of`
    "cuda": ["bfloat16", "bfloat16/int8", "float16", "float32"],
    "mps": ["float32"],
    "cpu": ["float32", "int8"],
}
PEER_PRECISIONS = {
    "cuda": ["float32", "bfloat16"],
    "mps": ["float32"],
    "cpu": ["float32", "bfloat16"],
}
BYTES_READ = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # of a weight in a step
BYTES_CACHED = BYTES_READ | {"int8": 1 + 4 / 64}  # of a key or a value: int8 has a scale a head
QUICK = {"checkpoint": "random:tiny", "jobs": [1, 2], "durations": [0.5], "rounds": 1}
QUICK_JOBS = 4  # at most, of published rows
REPEATED_S = 60  # a run that took longer is not repeated in the later rounds
Figures = dict[str, float]
Workload = tuple[int, float]  # jobs, duration_s


class Published(NamedTuple):
    """A row of docs/performance.md, for some candidates."""

    parts: str  # of their names, as `Candidate.called` takes them
    jobs: int
    duration_s: float
    rounds: int = 0  # 0 is all
    checkpoint: str = ""  # "" is the one that the flags name


PUBLISHED = {  # by device; the first first, where the time does not suffice for all
    "cpu": [
        Published("", 1, 10),
        Published("musicgen_ui int8", 4, 10),
        Published("musicgen_ui int8", 16, 10, 1),
        Published("musicgen_ui int8,transformers float32", 1, 30, 1),
    ],
    "cuda": [
        Published("transformers bfloat16", 1, 10, 1),
        Published("musicgen_ui bfloat16", 1, 10),
        Published("musicgen_ui bfloat16", 32, 30, 1),
        Published("musicgen_ui bfloat16/int8", 32, 30, 1),
        Published("musicgen_ui bfloat16", 1, 10, 0, "random:medium"),
        Published("musicgen_ui bfloat16", 1, 10, 0, "random:large"),
        Published("musicgen_ui bfloat16", 8, 10),
        Published("musicgen_ui bfloat16", 1, 30),
    ],
    "mps": [Published("", 1, 10)],
}


@dataclass(frozen=True)
class Candidate:
    """A loop in a precision."""

    peer: bool
    place: Place

    @property
    def name(self) -> str:
        """Whose loop it is."""
        return "transformers" if self.peer else "musicgen_ui"

    def __str__(self) -> str:
        return f"{self.name} {runners.precision_of(self.place)}"

    def called(self, parts: str) -> bool:
        """One of the comma-separated `parts`, which are words, is in its name."""
        return any(f" {part} " in f" {self} " for part in parts.split(",")) or not parts


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The bench's flags."""
    parser.add_argument(
        "--checkpoint",
        default="random:small",
        help="a name, Hub id or folder, or random:small, random:medium, random:large (random "
        "weights of Meta's sizes) or random:tiny (default %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--precision",
        help="ours, such as float32,int8 (default: by the device); "
        "bfloat16/int8 is bfloat16 with the KV cache in int8",
    )
    parser.add_argument("--jobs", type=_numbers(int), default=[1], help="together, as 1,4,16")
    parser.add_argument(
        "--durations", type=_numbers(float), default=[10.0], help="in seconds, as 10,30"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument(
        "--only", default="", help="candidates by parts of their names, as int8,transformers"
    )
    parser.add_argument(
        "--published",
        nargs="?",
        const="",
        choices=["", *PUBLISHED],
        metavar="DEVICE",
        help="the rows of docs/performance.md, by the device, or of another one",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="which kernels a step of ours runs, how long they take and what lies between them, as "
        "text, for each number of jobs",
    )
    parser.add_argument(
        "--distance",
        metavar="PRECISION",
        help="how far a precision, as int8, is from float32 over a minute of music; needs trained "
        "weights, such as --checkpoint bundled, its default then",
    )
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, to see it work")


_Number = TypeVar("_Number", int, float)


def _numbers(kind: Callable[[str], _Number]) -> Callable[[str], list[_Number]]:
    def numbers(text: str) -> list[_Number]:
        return [kind(part) for part in text.split(",")]

    return numbers


def run(flags: argparse.Namespace) -> list[Row]:
    """Measures what the flags ask for, prints a table and writes the JSON after each row.

    Raises:
        RequestError: there is no such checkpoint, device, precision or length.
    """
    if flags.quick:
        vars(flags).update(QUICK)
    if flags.distance:
        return _distance(flags)
    for duration_s in flags.durations:
        request_of(duration_s, 0)
    if min(*flags.jobs, flags.rounds) < 1:
        raise RequestError("There must be at least one job and one round.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = devices.choose(flags.device)
    if flags.profile:
        return _profile(flags, runners.place_of(flags.device, flags.precision or "auto"))
    chosen = _candidates(place, flags.precision, flags.only)
    rows: list[Row] = []
    try:
        for checkpoint in dict.fromkeys(asked.checkpoint for asked in _asked(flags, place)):
            before = list(rows)
            for found in _rounds(flags, checkpoint, chosen):
                rows[:] = before + found
                if flags.json:
                    text = json.dumps(rows, indent=1)
                    flags.json.write_text(text + "\n", encoding="utf-8")
    finally:  # an interrupt too: what was measured is reported
        if rows:
            print(report.table(rows))
            print(*report.ratios(rows), sep="\n")
    return rows


def _rounds(
    flags: argparse.Namespace, checkpoint: str, chosen: list[Candidate]
) -> Iterator[list[Row]]:
    """All rounds on a checkpoint: the rows so far, after each run."""
    seen: dict[tuple[Candidate, Workload], list[Figures]] = {}
    with runners.source(checkpoint, tiny=flags.quick) as source:
        bandwidth = machine.bandwidth(chosen[0].place)
        at_once = flags.rounds if _on_gpu(chosen[0].place) else 1
        for number in range(0, flags.rounds, at_once):
            for candidate in chosen:
                settings = _settings(flags, checkpoint, candidate, number, at_once, seen)
                if not settings:
                    continue
                said = f"round {number + 1} of {flags.rounds}: {candidate}, {source.name}"
                print(said, file=sys.stderr)
                for setting, figures in _measure(candidate, source, settings, bandwidth):
                    seen.setdefault((candidate, setting), []).append(figures)
                    yield _rows(seen, source.name, bandwidth)


def _on_gpu(place: Place) -> bool:
    return place.device.startswith("cuda")


def _profile(flags: argparse.Namespace, place: Place) -> list[Row]:
    """Random weights of whatever size are made where they run: nothing is read."""
    size, text = runners.random_size(flags.checkpoint), ""
    duration_s = max(flags.durations[0], step_profile.LEAST_S)
    weights = (
        contextlib.nullcontext(RandomWeights(size)) if size else runners.source(flags.checkpoint)
    )
    with weights as source:
        bandwidth = machine.bandwidth(place)
        for jobs in flags.jobs:
            runner = runners.EngineRunner(source, place, jobs)
            read = _bytes_read(_config(source), jobs, duration_s / 2, place)
            request = request_of(duration_s, 0)
            text += step_profile.measure(runner.batch, request, jobs, read / bandwidth)
            flags.profile.write_text(text, encoding="utf-8")
            del runner
            devices.give_memory_back()
    print(text)
    return []


def _distance(flags: argparse.Namespace) -> list[Row]:
    name = "bundled" if flags.checkpoint.startswith("random:") else flags.checkpoint
    place = runners.place_of(flags.device, flags.distance)
    found = quantization_error.measure(registry.resolve(name), flags.distance, place.device)
    print(f"{name}, {flags.distance} against float32 on {place.label}: {found}")
    return []


def _asked(flags: argparse.Namespace, place: Place) -> list[Published]:
    """The rows that the flags ask for."""
    if flags.published is None:
        pairs = [(jobs, seconds) for seconds in flags.durations for jobs in flags.jobs]
        return [Published("", *pair, checkpoint=flags.checkpoint) for pair in pairs]
    rows = PUBLISHED[flags.published or place.device.partition(":")[0]]
    asked = [row._replace(checkpoint=row.checkpoint or flags.checkpoint) for row in rows]
    if not flags.quick:
        return asked
    short = [(min(row.jobs, QUICK_JOBS), flags.durations[0] * row.duration_s / 10) for row in rows]
    each = zip(asked, short, strict=True)
    return [row._replace(jobs=jobs, duration_s=seconds) for row, (jobs, seconds) in each]


def _settings(
    flags: argparse.Namespace,
    checkpoint: str,
    candidate: Candidate,
    number: int,
    at_once: int,
    seen: dict[tuple[Candidate, Workload], list[Figures]],
) -> list[Workload]:
    """What a candidate runs in `at_once` rounds from `number` on: a setting for each time."""
    return [
        (row.jobs, row.duration_s)
        for row in _asked(flags, candidate.place)
        if row.checkpoint == checkpoint and candidate.called(row.parts)
        for turn in range(number, number + at_once)
        if turn < (row.rounds or flags.rounds)
        and not _long(seen.get((candidate, (row.jobs, row.duration_s)), []), row)
    ]


def _long(rounds: list[Figures], row: Published) -> bool:
    music_s = row.jobs * row.duration_s
    return any(music_s / figures["real_time_factor"] > REPEATED_S for figures in rounds)


def _candidates(place: Place, precisions: str | None, only: str) -> list[Candidate]:
    kind = place.device.partition(":")[0]
    ours = precisions.split(",") if precisions else PRECISIONS[kind]
    named = [(True, p) for p in PEER_PRECISIONS[kind]] + [(False, p) for p in ours]
    every = [Candidate(peer, runners.place_of(place.device, p)) for peer, p in named]
    chosen = [c for c in every if c.called(only)]
    if not chosen:
        raise RequestError(
            f"No candidate is called {only}: there are {', '.join(map(str, every))}."
        )
    return chosen


def _measure(
    candidate: Candidate, source: Source | RandomWeights, settings: list[Workload], bandwidth: float
) -> Iterator[tuple[Workload, Figures]]:
    """A round of a candidate: loads it, yields the figures of every setting, frees it."""
    if _on_gpu(candidate.place) and not candidate.peer:
        for jobs in dict.fromkeys(jobs for jobs, _ in settings):
            those = [setting for setting in settings if setting[0] == jobs]
            yield from _loaded(candidate, source, those, bandwidth)
    else:
        yield from _loaded(candidate, source, settings, bandwidth)


def _loaded(
    candidate: Candidate, source: Source | RandomWeights, settings: list[Workload], bandwidth: float
) -> Iterator[tuple[Workload, Figures]]:
    place, memory = candidate.place, machine.Memory(candidate.place)
    started_s = time.perf_counter()
    runner: runners.Runner
    if candidate.peer:
        runner = runners.TransformersRunner(source, place)
    else:
        runner = runners.EngineRunner(source, place, max_jobs=max(jobs for jobs, _ in settings))
    devices.synchronize(place.device)
    cold = {"cold_start_s": time.perf_counter() - started_s, "load_peak_mb": memory.peak_mb()}
    cold = {} if isinstance(source, RandomWeights) else cold
    devices.give_memory_back()
    cold["codec_s"] = runner.codec_s()
    warm = None
    for setting in settings:
        if setting != warm:
            runner.warm_up(*setting)
            warm = setting
        memory.reset()
        yield setting, cold | _figures(runner, setting, candidate, source, bandwidth, memory)
    del runner
    devices.give_memory_back()


def _figures(
    runner: runners.Runner,
    setting: Workload,
    candidate: Candidate,
    source: Source | RandomWeights,
    bandwidth: float,
    memory: machine.Memory,
) -> Figures:
    """One run."""
    (jobs, duration_s), config = setting, _config(source)
    ran = runner.run(jobs, duration_s)
    per_s = _steps(config, duration_s) / (ran.wall_s - ran.codec_wait_s)
    mean_s = duration_s / 2  # half of the keys and values, on average
    floor = bandwidth / _bytes_read(config, jobs, mean_s, candidate.place)
    return {
        "steps_per_s": per_s,
        "real_time_factor": jobs * duration_s / ran.wall_s,
        "first_audio_s": ran.first_audio_s,
        "peak_mb": memory.peak_mb(),
        "roofline_steps_per_s": floor,
        "roofline_fraction": per_s / floor,
    }


def _config(source: Source | RandomWeights) -> Configuration:
    return source.config if isinstance(source, RandomWeights) else registry.config_of(source)


def _bytes_read(config: Configuration, jobs: int, at_s: float, place: Place) -> float:
    """What a step at `at_s` of guided takes must read: weights once, keys and values of each."""
    decoder = config["decoder"]
    columns = 2 * jobs * _steps(config, at_s)  # with guidance
    cached = 2 * columns * decoder["num_hidden_layers"] * decoder["hidden_size"]
    of_cache = place.precision if place.kv_cache_dtype == "auto" else place.kv_cache_dtype
    weights: float = _weights_read(decoder) * BYTES_READ[place.precision]
    return weights + cached * BYTES_CACHED[of_cache]


def _steps(config: Configuration, duration_s: float) -> int:
    """Decoder steps for one take: its frames, and the delay of the last codebook."""
    codec, decoder = config["audio_encoder"], config["decoder"]
    frames: float = duration_s * codec["sampling_rate"] / math.prod(codec["upsampling_ratios"])
    delay: int = decoder["num_codebooks"] // decoder["audio_channels"] - 1
    return round(frames) + delay


def _weights_read(decoder: DecoderValues) -> int:
    """The weights that a step reads: all matrices but those of the prompt's keys and values."""
    hidden: int = decoder["hidden_size"]
    layer: int = 6 * hidden**2 + 2 * hidden * decoder["ffn_dim"]
    heads: int = decoder["num_codebooks"] * decoder["vocab_size"] * hidden
    layers: int = decoder["num_hidden_layers"] * layer
    return layers + heads


def _rows(
    seen: dict[tuple[Candidate, Workload], list[Figures]], checkpoint: str, bandwidth: float
) -> list[Row]:
    rows = []
    for (candidate, (jobs, duration_s)), rounds in seen.items():
        medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        rows.append(
            {
                "name": candidate.name,
                "peer": candidate.peer,
                "device": candidate.place.label,
                "precision": runners.precision_of(candidate.place),
                "checkpoint": checkpoint,
                "jobs": jobs,
                "duration_s": duration_s,
                **{key: float(f"{value:.4g}") for key, value in medians.items()},
                "rounds": len(rounds),
                "bandwidth_gb_per_s": float(f"{bandwidth / 1e9:.4g}"),
                "machine": machine.name(),
            }
        )
    return sorted(rows, key=lambda row: (row["duration_s"], row["jobs"]))
