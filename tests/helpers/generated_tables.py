"""The generated tables of README and docs; `python -m tests.helpers.generated_tables` writes them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test holds the pages to them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from musicgen_ui.cli import checkpoints, generate
from musicgen_ui.request import CLIP_FIELDS, FIELDS
from musicgen_ui.server import settings as server_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = ROOT / "assets" / "bench"  # a file of the bench's rows for each machine
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def settings() -> str:
    """What each setting of a take does."""
    rows = []
    for name, spec in FIELDS.items():
        about = spec.metadata
        flag = "PROMPT" if name == "prompt" else generate.flag(name)
        limits, default = "", spec.default or ""
        if name in CLIP_FIELDS:
            limits = "an audio file"
        elif isinstance(spec.default, bool):
            default = "on" if spec.default else "off"
            flag = flag.replace("--", "--no-") if spec.default else flag
        elif isinstance(spec.default, str):
            limits = f"up to {about['max']:,} characters"
        elif isinstance(spec.default, tuple):
            limits, default = f"up to {about['max']} rows", ""
        else:
            default = f"{spec.default:g}"
            limits = f"{about['min']:.15g} to {about['max']:,.15g} {about['unit']}".rstrip()
        rows.append([about["label"], about["help"], limits, default, f"`{name}`", f"`{flag}`"])
    return table(["Setting", "What it does", "Limits", "Default", "In the API", "Flag"], rows)


def models() -> str:
    """The checkpoints that have a name."""
    rows = []
    for entry in checkpoints.entries():
        name, *rest = entry.row()
        rows.append([name.replace(entry.word, f"`{entry.word}`", 1), *rest])
    return table(checkpoints.HEADS, rows)


def server() -> str:
    """How a server is set up."""
    rows = [
        [f"`{variable}`", f"`{flag}`", f"`{default}`" if default else "", what]
        for variable, flag, default, what in server_settings.table()
    ]
    return table(["Environment variable", "Flag", "Default", "What it sets"], rows)


def speed() -> str:
    """What the bench measured, a table for each machine."""
    return "\n".join(_measured(file) for file in sorted(MEASURED.glob("*.json")))


def _measured(file: Path) -> str:
    rows = json.loads(file.read_text(encoding="utf-8"))
    heads = [
        *("Loop", "Precision", "Takes at once", "Length", "Steps a second", "× real time"),
        *("First audio", "A second of codec", "Peak memory", "Roofline fraction"),
    ]
    cells = [
        [
            "transformers `generate`" if row["peer"] else "**MusicGen UI**",
            row["precision"],
            str(row["jobs"]),
            f"{row['duration_s']:g} s",
            f"{row['steps_per_s']:.1f}",
            f"{row['real_time_factor']:.2f}",
            f"{row['first_audio_s']:.2f} s",
            f"{row['codec_s']:.3f} s",
            f"{row['peak_mb']:,.0f} MB",
            f"{row['roofline_fraction']:.0%}",
        ]
        for row in rows
    ]
    first = rows[0]
    machine = f"{first['device']}; {first['machine']}. Weights: `{first['checkpoint']}`;"
    most, fewest = (pick(row["rounds"] for row in rows) for pick in (max, min))
    rounds = f"medians of {most} rounds" if most > 1 else "one round"
    if fewest < most:
        rounds += "; one of the long rows"
    return f"{machine} {rounds}.\n\n{table(heads, cells)}"


def summary() -> str:
    """One take of 10 s on each machine: transformers' loop and ours, in the fastest precision."""
    lines = []
    for file in sorted(MEASURED.glob("*.json")):
        every = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in every if (row["jobs"], row["duration_s"]) == (1, 10)]
        peer, ours = (
            max((row for row in rows if row["peer"] == is_peer), key=lambda r: r["steps_per_s"])
            for is_peer in (True, False)
        )
        processor = re.sub(r", Linux.*", "", ours["machine"])
        lines.append(
            [
                processor if ours["device"].startswith("CPU") else ours["device"],
                ours["precision"],
                f"{peer['real_time_factor']:.2f}",
                f"{ours['real_time_factor']:.2f}",
                f"{ours['first_audio_s']:.2f} s",
            ]
        )
    heads = ["Machine", "Precision", "transformers, × real time", "MusicGen UI", "First audio"]
    return table(heads, lines)


def tree() -> str:
    """The package's files, each with the first sentence of its docstring."""
    lines = _folder(ROOT / "musicgen_ui", "")
    width = max(len(name) for name, _ in lines)
    rows = (f"{name:<{width}}  {what}".rstrip() for name, what in lines)
    return "```\n" + "\n".join(rows) + "\n```\n"


def _folder(folder: Path, indent: str) -> list[tuple[str, str]]:
    lines = [(f"{indent}{folder.name}/", _sentence(folder / "__init__.py"))]
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            lines.append((f"{indent}  {path.name}", _sentence(path)))
        elif (path / "__init__.py").is_file():
            lines += _folder(path, indent + "  ")
    return lines


def _sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "settings": settings,
    "models": models,
    "server": server,
    "speed": speed,
    "tree": tree,
}


def written(text: str) -> str:
    """A page with every table as it should be."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
