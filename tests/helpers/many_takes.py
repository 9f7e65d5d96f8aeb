"""A folder with thousands of takes, as after years: each with settings, codes and waveform.

`python -m tests.helpers.many_takes FOLDER [COUNT]` writes them.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from musicgen_ui import sidecar, takes
from tests.helpers.takes import finished, with_codes

DAY_S = 86_400.0


def write(folder: Path, count: int = 5000, seconds: float = 10.0) -> None:
    """Takes that differ by id, title, star and date; their sound is one file under many names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = with_codes(finished(seconds=seconds, prompt="piece 0000 warm keys with drums and bass"))
    first = takes.save(made, folder)
    data = sidecar.read(sidecar.beside(first.wav))
    assert data
    for number in range(count):
        id = f"{number:016x}"
        settings = {**data.settings, "id": id, "prompt": f"piece {number:04} warm keys with drums"}
        if number % 5 == 4:  # gone on from the one before
            settings |= {"parent": f"{number - 1:016x}", "operation": "extend", "parent_at_s": 10.0}
        one = dataclasses.replace(
            data,
            id=id,
            settings=settings,
            starred=number % 9 == 0,
            made_at=1.7e9 + number * DAY_S / 10,
        )
        sidecar.write(folder / f"piece-{number:04}{sidecar.ENDING}", one)
        for sound in (first.wav, first.flac):
            (folder / f"piece-{number:04}{sound.suffix}").hardlink_to(sound)
    for path in folder.glob(f"{first.wav.stem}.*"):
        path.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]), int((sys.argv[2:] or ["5000"])[0]))
