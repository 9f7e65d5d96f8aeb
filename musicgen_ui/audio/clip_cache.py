"""The last clips that were read, so that a file is decoded once for the form and for its jobs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from musicgen_ui.audio import load
from musicgen_ui.audio.load import Reading

KEPT_BYTES = 100_000_000  # of samples
Key = tuple[str, int, int, float]  # path, time of the last change in ns, size, seconds kept

_lock = threading.Lock()
_readings: OrderedDict[Key, Reading] = OrderedDict()  # the one used last is the last


def read(path: Path | str, keep_s: float = 120.0) -> Reading:
    """As `load.read`, whose errors it raises; a file that has not changed is decoded once.

    The samples are shared: nobody may write to them.
    """
    try:
        about = Path(path).stat()
    except (OSError, ValueError):
        return load.read(path, keep_s)  # says what is wrong
    file = (str(path), about.st_mtime_ns, about.st_size)
    key = (*file, keep_s)
    with _lock:
        for other, reading in _readings.items():
            whole_s = min(keep_s, other[3])  # a clip that is shorter is the same for both
            if other == key or (other[:3] == file and reading.clip.duration_s < whole_s):
                _readings.move_to_end(other)
                return reading
    reading = load.read(path, keep_s)
    with _lock:
        _readings[key] = reading
        held = [each.clip.samples.nbytes for each in _readings.values()]
        while len(held) > 1 and sum(held) > KEPT_BYTES:
            del held[0]
            _readings.popitem(last=False)
    return reading
