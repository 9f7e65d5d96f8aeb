"""The measured rows as a table, and the ratios between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from musicgen_ui.checkpoints.file_checks import JsonObject

Row = JsonObject
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
    "roofline_fraction": ("of roofline", "{:.0%}"),
}


def table(rows: list[Row]) -> str:
    """The rows as an aligned table, each beside the best peer of the same jobs and length."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        shown = row | {"times_peer": row["real_time_factor"] / _best_peer(rows, row)}
        cells = [(shown.get(key, math.nan), form) for key, (_, form) in COLUMNS.items()]
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
    """A line for each ratio that the rows of the first checkpoint allow."""
    rows = [row for row in rows if row.get("checkpoint") == rows[0].get("checkpoint")]
    ours = [row for row in rows if not row["peer"]]
    peers = [row for row in rows if row["peer"]]
    found = [*_over_transformers(ours, peers), *_codec(ours, peers), *_together(ours)]
    return [f"{ratio:6.2f}  {what}" for what, ratio in found]


Ratio = tuple[str, float]  # what it is of, and its value


def _over_transformers(ours: list[Row], peers: list[Row]) -> Iterator[Ratio]:
    """Each of our precisions over each of transformers', for a single take of the same length."""
    for row in _single(ours):
        for peer in _single(peers):
            if row["duration_s"] == peer["duration_s"]:
                what = (
                    f"ours {row['precision']} ÷ transformers {peer['precision']}, "
                    f"{row['duration_s']:g} s, music a second"
                )
                yield what, row["real_time_factor"] / peer["real_time_factor"]


def _codec(ours: list[Row], peers: list[Row]) -> Iterator[Ratio]:
    """Medians over the rows of a side, since the codec does the same in each of them."""
    own = [row["codec_s"] for row in ours if row["precision"] != "float32"]
    theirs = [row["codec_s"] for row in peers]
    if own and theirs:
        ratio = statistics.median_low(theirs) / statistics.median_high(own)
        yield "codec, audio a second ÷ transformers' decode", ratio


def _together(ours: list[Row]) -> Iterator[Ratio]:
    """Several takes at once over a single one of the same length and precision."""
    alone = {(row["precision"], row["duration_s"]): row for row in _single(ours)}
    for row in ours:
        one = alone.get((row["precision"], row["duration_s"]))
        if row["jobs"] > 1 and one:
            what = f"{row['jobs']} takes at once ÷ one, {row['precision']}, {row['duration_s']:g} s"
            yield f"{what}, music a second", row["real_time_factor"] / one["real_time_factor"]


def _single(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["jobs"] == 1]
