"""The bench's rows as a table, and beside each other: ours over the peers', many takes over one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SETTING = ("checkpoint", "jobs", "duration_s")  # what rows must have in common
COLUMNS = {  # of the table: heading, format
    "name": ("", "{}"),
    "checkpoint": ("checkpoint", "{}"),
    "precision": ("precision", "{}"),
    "jobs": ("jobs", "{}"),
    "duration_s": ("length s", "{:g}"),
    "steps_per_s": ("steps/s", "{:.1f}"),
    "real_time_factor": ("× real time", "{:.2f}"),
    "times_peer": ("× best peer", "{:.2f}"),
    "first_audio_s": ("first audio s", "{:.2f}"),
    "codec_s": ("codec s/s", "{:.3f}"),
    "cold_start_s": ("cold start s", "{:.1f}"),
    "peak_mb": ("peak MB", "{:.0f}"),
    "floor_share": ("of floor", "{:.0%}"),
}


def table(rows: list[Row]) -> str:
    """The rows as an aligned table, each beside the best peer of the same jobs and length."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        told = row | {"times_peer": row["real_time_factor"] / _best_peer(rows, row)}
        cells = [(told.get(key, math.nan), form) for key, (_, form) in COLUMNS.items()]
        lines.append([form.format(value) for value, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)
    reads = f"{rows[0]['device']}, reads {rows[0]['bandwidth_gb_per_s']:,.0f} GB a second"
    return "\n".join([rows[0]["machine"], reads, *aligned])


def _best_peer(rows: list[Row], row: Row) -> float:
    """The real-time factor of the fastest peer in the same setting; NaN without one."""
    setting = [row[key] for key in SETTING]
    peers = [r for r in rows if r["peer"] and [r[key] for key in SETTING] == setting]
    return max((peer["real_time_factor"] for peer in peers), default=math.nan)


def ratios(rows: list[Row]) -> list[str]:
    """A sentence for each ratio that the rows of the first checkpoint allow, with what it should
    be at least."""
    rows = [row for row in rows if row.get("checkpoint") == rows[0].get("checkpoint")]
    ours = [row for row in rows if not row["peer"]]
    peers = [row for row in rows if row["peer"]]
    found = [
        *_beside("steps_per_s", ours, peers, ("float32", "float32"), 1.3),
        *_fastest(ours, peers),
        *_codec(ours, peers),
        *_together(ours),
        *_first_audio(ours),
    ]
    return [f"{ratio:6.2f}  {what} (at least {goal:g})" for what, ratio, goal in found]


def _fastest(ours: list[Row], peers: list[Row]) -> Iterable[tuple[str, float, float]]:
    """Our fastest precision of a single take over each of the peers', music a second."""
    goals: dict[tuple[str, str, float], float] = {
        ("cpu", "float32", 10): 3.0,
        ("cpu", "bfloat16", 10): 2.8,
    }
    goals |= {("cpu", "float32", 30): 2.6, ("cuda", "bfloat16", 10): 8.0}
    singles = _single(ours)
    if singles:
        best = max(singles, key=lambda row: row["real_time_factor"])["precision"]
        for peer in ("float32", "bfloat16"):
            yield from (
                (what, ratio, goals[place])
                for what, ratio, place in _each("real_time_factor", ours, peers, (best, peer))
                if place in goals
            )


def _beside(
    figure: str, ours: list[Row], peers: list[Row], precisions: tuple[str, str], goal: float
) -> Iterable[tuple[str, float, float]]:
    for what, ratio, _ in _each(figure, ours, peers, precisions):
        yield what, ratio, goal


def _each(
    figure: str, ours: list[Row], peers: list[Row], precisions: tuple[str, str]
) -> Iterable[tuple[str, float, tuple[str, str, float]]]:
    own = {row["duration_s"]: row for row in _single(ours) if row["precision"] == precisions[0]}
    theirs = {row["duration_s"]: row for row in _single(peers) if row["precision"] == precisions[1]}
    names = {"steps_per_s": "steps a second", "real_time_factor": "music a second"}
    for duration_s in sorted(own.keys() & theirs.keys()):
        what = (
            f"ours {precisions[0]} ÷ transformers {precisions[1]}, {duration_s:g} s, "
            f"{names[figure]}"
        )
        ratio = own[duration_s][figure] / theirs[duration_s][figure]
        yield what, ratio, (_device(own[duration_s]), precisions[1], duration_s)


def _codec(ours: list[Row], peers: list[Row]) -> Iterable[tuple[str, float, float]]:
    """Medians over the rows of a side, since the codec does the same in each of them."""
    own = sorted(row["codec_s"] for row in ours if row["precision"] != "float32")
    theirs = sorted(row["codec_s"] for row in peers)
    if own and theirs:
        ratio = theirs[(len(theirs) - 1) // 2] / own[len(own) // 2]
        yield "codec, audio a second ÷ transformers' decode", ratio, 2.5


def _together(ours: list[Row]) -> Iterable[tuple[str, float, float]]:
    """Several takes at once over a single one of the same length and precision."""
    alone = {(row["precision"], row["duration_s"]): row for row in _single(ours)}
    for row in ours:
        one = alone.get((row["precision"], row["duration_s"]))
        if row["jobs"] == 4 and one:
            ratio = row["real_time_factor"] / one["real_time_factor"]
            yield f"4 takes at once ÷ one, {row['precision']}, frames a second", ratio, 2.5


def _first_audio(ours: list[Row]) -> Iterable[tuple[str, float, float]]:
    heard_s = [row["first_audio_s"] for row in _single(ours) if row["precision"] != "float32"]
    if heard_s:
        yield "1.5 s ÷ first audio after submit", 1.5 / max(heard_s), 1.0


def _single(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["jobs"] == 1]


def _device(row: Row) -> str:
    return "cpu" if row["device"].startswith("CPU") else "cuda"
