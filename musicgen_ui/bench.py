"""Speed beside its peer: transformers' `generate` and our loop, on the same weights.

Every contestant, a loop in a precision, is read from the same files, warmed up, run over all
numbers of jobs and lengths, and freed before the next one is read. Then the next round begins, so
that a slow minute of the machine falls on all of them. A figure is the median of the rounds; what
takes longer than a minute is run once. `--published` makes the rows of README's table, all of
which fit into a quarter of an hour on two cores, and their ratios are printed below the table.
Every run makes the whole of `duration_s` for each job with guidance 3 and top-k 250, from the
first step to the last sample; nothing is extrapolated.

The figures of a row:
  steps_per_s       decoder steps a second over the whole run, less the time that the thread of
                    the decoder spent in the codec; a step moves every job one frame on
  real_time_factor  seconds of music of all jobs together in a second, codec included
  first_audio_s     from the request to the first samples of the job that waits longest;
                    `generate` hands over everything at the end
  codec_s           seconds to decode one second of music: transformers' in one piece, ours in
                    the pieces that it streams
  cold_start_s      reading and packing the weights, files in the system's cache
  peak_mb           the most memory during the run, weights included: CUDA's allocator, or else
                    the whole process (Linux: its peak; elsewhere: at the run's end)
  load_peak_mb      the same during the cold start
  floor_share       of the steps a second that reading alone would allow: the decoder's weights
                    and half of the final keys and values over the measured bandwidth
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from musicgen_ui import checkpoints, contestants, distance, gauges, scoreboard
from musicgen_ui.checkpoints import Source
from musicgen_ui.contestants import request_of
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.device import Place
from musicgen_ui.request import RequestError
from musicgen_ui.scoreboard import Row

WARM_UP_S = 0.5
PRECISIONS = {  # ours, by device
    "cuda": ["bfloat16", "float16", "float32"],
    "mps": ["float32"],
    "cpu": ["float32", "int8"],
}
PEER_PRECISIONS = {
    "cuda": ["float32", "bfloat16"],
    "mps": ["float32"],
    "cpu": ["float32", "bfloat16"],
}
BYTES_READ = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # of a weight in a step
QUICK = {"checkpoint": "random:tiny", "jobs": [1, 2], "durations": [0.5], "rounds": 1}
REPEATED_S = 60  # a run that took longer is not repeated in the later rounds
PUBLISHED = {  # by device: parts of contestants' names, jobs, seconds, rounds or 0 for all
    "cpu": [
        ("", 1, 10, 0),
        ("musicgen_ui int8", 4, 10, 0),
        ("musicgen_ui int8", 16, 10, 1),
        ("musicgen_ui int8,transformers float32", 1, 30, 1),
    ],
    "cuda": [
        ("", 1, 10, 0),
        ("bfloat16", 1, 30, 0),
        ("bfloat16", 4, 10, 0),
        ("bfloat16", 16, 10, 0),
        ("musicgen_ui bfloat16", 32, 10, 0),
    ],
    "mps": [("", 1, 10, 0)],
}
Figures = dict[str, float]
Setting = tuple[int, float]  # jobs, duration_s


@dataclass(frozen=True)
class Contestant:
    """A loop in a precision."""

    peer: bool
    place: Place

    @property
    def name(self) -> str:
        """Whose loop it is."""
        return "transformers" if self.peer else "musicgen_ui"

    def __str__(self) -> str:
        return f"{self.name} {self.place.precision}"

    def called(self, parts: str) -> bool:
        """One of the comma-separated `parts` is in its name."""
        return any(part in str(self) for part in parts.split(","))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The bench's flags."""
    parser.add_argument(
        "--checkpoint",
        default="random:small",
        help="a name, Hub id or folder, or random:small, random:medium, random:large (random "
        "weights of Meta's sizes) or random:tiny (default %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", help="ours, such as float32,int8 (default: by the device)")
    parser.add_argument("--jobs", type=_numbers(int), default=[1], help="together, as 1,4,16")
    parser.add_argument(
        "--durations", type=_numbers(float), default=[10.0], help="in seconds, as 10,30"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument(
        "--only", default="", help="contestants by parts of their names, as int8,transformers"
    )
    parser.add_argument(
        "--published", action="store_true", help="the rows of README's table, by the device"
    )
    parser.add_argument(
        "--distance",
        metavar="PRECISION",
        help="how far a precision, as int8, is from float32 over a minute of music; needs trained "
        "weights, such as --checkpoint bundled, its default then",
    )
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, to see it work")


def _numbers(kind: Callable[[str], float]) -> Callable[[str], list]:
    def numbers(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    return numbers


def run(flags: argparse.Namespace) -> list[Row]:
    """Measures what the flags ask for, prints a table and writes the JSON after each contestant.

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
    chosen = _contestants(devices.choose(flags.device), flags.precision, flags.only)
    rows: list[Row] = []
    seen: dict[tuple[Contestant, Setting], list[Figures]] = {}
    with contestants.source(flags.checkpoint) as source:
        bandwidth = gauges.bandwidth(chosen[0].place)
        for number, contestant in ((n, c) for n in range(flags.rounds) for c in chosen):
            settings = _settings(flags, contestant, number, seen)
            if not settings:
                continue
            print(f"round {number + 1} of {flags.rounds}: {contestant}", file=sys.stderr)
            for setting, figures in _measure(contestant, source, settings, bandwidth):
                seen.setdefault((contestant, setting), []).append(figures)
            rows = _rows(seen, flags.checkpoint, bandwidth)
            if flags.json:
                flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(scoreboard.table(rows))
    print(*scoreboard.ratios(rows), sep="\n")
    return rows


def _distance(flags: argparse.Namespace) -> list[Row]:
    name = "bundled" if flags.checkpoint.startswith("random:") else flags.checkpoint
    place = devices.choose(flags.device, flags.distance)
    found = distance.measure(checkpoints.resolve(name), flags.distance, place.device)
    print(f"{name}, {flags.distance} against float32 on {place.label}: {found}")
    return []


def _settings(
    flags: argparse.Namespace,
    contestant: Contestant,
    number: int,
    seen: dict[tuple[Contestant, Setting], list[Figures]],
) -> list[Setting]:
    """What a contestant runs in a round."""
    asked = [("", jobs, seconds, 0) for seconds in flags.durations for jobs in flags.jobs]
    if flags.published:
        asked = PUBLISHED[contestant.place.device.partition(":")[0]]
    return [
        (jobs, seconds)
        for parts, jobs, seconds, rounds in asked
        if contestant.called(parts)
        and number < (rounds or flags.rounds)
        and not _long(seen.get((contestant, (jobs, seconds)), []), jobs * seconds)
    ]


def _long(rounds: list[Figures], music_s: float) -> bool:
    return any(music_s / figures["real_time_factor"] > REPEATED_S for figures in rounds)


def _contestants(place: Place, precisions: str | None, only: str) -> list[Contestant]:
    kind = place.device.partition(":")[0]
    ours = precisions.split(",") if precisions else PRECISIONS[kind]
    named = [(True, p) for p in PEER_PRECISIONS[kind]] + [(False, p) for p in ours]
    every = [Contestant(peer, devices.choose(place.device, p)) for peer, p in named]
    chosen = [c for c in every if c.called(only)]
    if not chosen:
        raise RequestError(
            f"No contestant is called {only}: there are {', '.join(map(str, every))}."
        )
    return chosen


def _measure(
    contestant: Contestant, source: Source, settings: list[Setting], bandwidth: float
) -> Iterator[tuple[Setting, Figures]]:
    """A round of a contestant: loads it, yields the figures of every setting, frees it."""
    config = checkpoints.config_of(source)
    place, memory = contestant.place, gauges.Memory(contestant.place)
    weight_bytes = _weights_read(config["decoder"]) * BYTES_READ[place.precision]
    started_s = time.perf_counter()
    loop: contestants.Loop
    if contestant.peer:
        loop = contestants.Peer(source, place)
    else:
        loop = contestants.Ours(source, place, max_jobs=max(jobs for jobs, _ in settings))
    cold = {"cold_start_s": time.perf_counter() - started_s, "load_peak_mb": memory.peak_mb()}
    devices.give_memory_back()
    cold["codec_s"] = loop.codec_s()
    for jobs, duration_s in settings:
        loop.run(jobs, WARM_UP_S)
        memory.reset()
        ran = loop.run(jobs, duration_s)
        per_s = _steps(config, duration_s) / (ran.wall_s - ran.codec_wait_s)
        floor = bandwidth / (weight_bytes + ran.cache_bytes / 2)
        yield (
            (jobs, duration_s),
            cold
            | {
                "steps_per_s": per_s,
                "real_time_factor": jobs * duration_s / ran.wall_s,
                "first_audio_s": ran.first_audio_s,
                "peak_mb": memory.peak_mb(),
                "floor_steps_per_s": floor,
                "floor_share": per_s / floor,
            },
        )
    del loop
    devices.give_memory_back()


def _steps(config: dict[str, Any], duration_s: float) -> int:
    """Decoder steps for one take: its frames, and the delay of the last codebook."""
    codec, decoder = config["audio_encoder"], config["decoder"]
    frames = duration_s * codec["sampling_rate"] / math.prod(codec["upsampling_ratios"])
    return round(frames) + decoder["num_codebooks"] // decoder["audio_channels"] - 1


def _weights_read(decoder: dict[str, Any]) -> int:
    """The weights that a step reads: all matrices but those of the prompt's keys and values."""
    hidden = decoder["hidden_size"]
    layer = 6 * hidden**2 + 2 * hidden * decoder["ffn_dim"]
    heads = decoder["num_codebooks"] * decoder["vocab_size"] * hidden
    return decoder["num_hidden_layers"] * layer + heads


def _rows(
    seen: dict[tuple[Contestant, Setting], list[Figures]], checkpoint: str, bandwidth: float
) -> list[Row]:
    rows = []
    for (contestant, (jobs, duration_s)), rounds in seen.items():
        medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        rows.append(
            {
                "name": contestant.name,
                "peer": contestant.peer,
                "device": contestant.place.label,
                "precision": contestant.place.precision,
                "checkpoint": checkpoint,
                "jobs": jobs,
                "duration_s": duration_s,
                **{key: float(f"{value:.4g}") for key, value in medians.items()},
                "rounds": len(rounds),
                "bandwidth_gb_per_s": float(f"{bandwidth / 1e9:.4g}"),
                "machine": gauges.machine(),
            }
        )
    return sorted(rows, key=lambda row: (row["duration_s"], row["jobs"]))
