"""The file beside a take's sound that keeps what the sound cannot: its codes, waveform and title.

It is a safetensors file: `codes` int16 [codebooks, frames], and `waveform.N` int8 [points, 2], the
extremes of every N samples. Its metadata holds text. The codes end with the sound. Nothing here is
needed to play a take, so a file that is missing, damaged or of another program counts as none.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

from musicgen_ui import files
from musicgen_ui.audio import clip as audio
from musicgen_ui.audio import waveform
from musicgen_ui.audio.clip import Clip
from musicgen_ui.take_settings import TakeSettings

ENDING = ".safetensors"
FORMAT = "MusicGen UI take"
WAVEFORM = "waveform."
DAMAGED = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of a sound, which end with it."""

    values: np.ndarray  # int16 [codebooks, frames]
    codec: str  # whose they are
    context_frames: int  # at the head: what the new music goes on from
    frame_samples: int  # samples a frame


@dataclass(frozen=True, eq=False)
class Sidecar:
    """What is kept of a take beside its sound."""

    id: str  # of the sound, see `sound_id`
    settings: Mapping[str, object]  # as in the sound's tags
    lufs: float  # -inf for silence
    made_at: float = 0.0  # seconds since 1970
    title: str = ""  # as the user edited it; empty is the prompt
    starred: bool = False
    codes: Codes | None = None
    waveform: dict[int, np.ndarray] = field(default_factory=dict)  # as `waveform.levels`

    def content(self) -> bytes:
        """The file."""
        arrays = {f"{WAVEFORM}{size}": points for size, points in self.waveform.items()}
        texts = {
            "format": FORMAT,
            "id": self.id,
            "settings": json.dumps(self.settings, ensure_ascii=False),
            "lufs": f"{self.lufs:.2f}",
            "made_at": f"{self.made_at:.3f}",
            "title": self.title,
            "starred": "yes" if self.starred else "",
        }
        if self.codes:
            arrays["codes"] = np.ascontiguousarray(self.codes.values, np.int16)
            texts |= {
                "codec": self.codes.codec,
                "context_frames": str(self.codes.context_frames),
                "frame_samples": str(self.codes.frame_samples),
            }
        return safetensors.save(arrays, texts)

    @property
    def overview(self) -> np.ndarray:
        """The coarsest waveform, int8 [points, 2]."""
        return self.waveform[max(self.waveform)] if self.waveform else np.zeros((0, 2), np.int8)


def of_clip(
    clip: Clip, settings: TakeSettings, codes: Codes | None, made_at: float | None = None
) -> Sidecar:
    """A take's sidecar, with its loudness and waveform measured; made now unless it is said."""
    return Sidecar(
        settings["id"],
        settings,
        audio.loudness_lufs(clip),
        time.time_ns() / 1e9 if made_at is None else made_at,
        codes=codes,
        waveform=waveform.levels(clip),
    )


def beside(sound: Path) -> Path:
    """Where the sidecar of a sound is."""
    return sound.with_suffix(ENDING)


def read(path: Path, whole: bool = True) -> Sidecar | None:
    """The sidecar at `path`; without `whole` only the coarsest waveform and no codes are read."""
    try:
        with safe_open(path, "numpy") as file:
            texts = file.metadata() or {}
            if texts["format"] != FORMAT:
                return None
            names = set(file.keys())
            sizes = sorted(int(n.removeprefix(WAVEFORM)) for n in names if n.startswith(WAVEFORM))
            points = {
                size: file.get_tensor(f"{WAVEFORM}{size}") for size in sizes[0 if whole else -1 :]
            }
            codes = _codes(file.get_tensor("codes"), texts) if whole and "codes" in names else None
        settings = json.loads(texts["settings"])
        lufs = float(texts["lufs"])
        made_at = float(texts["made_at"])
        if not isinstance(settings, dict) or math.isnan(lufs) or not math.isfinite(made_at):
            return None
        if any(p.dtype != np.int8 or p.shape[1:] != (2,) for p in points.values()):
            return None
        return Sidecar(
            texts["id"],
            settings,
            lufs,
            made_at,
            texts["title"],
            bool(texts["starred"]),
            codes,
            points,
        )
    except DAMAGED:
        return None


def _codes(values: np.ndarray, texts: dict[str, str]) -> Codes | None:
    context_frames, frame_samples = int(texts["context_frames"]), int(texts["frame_samples"])
    if values.dtype != np.int16 or values.ndim != 2 or frame_samples < 1:
        return None
    return Codes(values, texts["codec"], context_frames, frame_samples)


def write(path: Path, sidecar: Sidecar) -> None:
    """Replaces the sidecar at `path` in one step.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    files.replace(path, sidecar.content())


def sound_id(clip: Clip) -> str:
    """A name for a sound: 16 hexadecimal digits, equal for equal 16-bit samples and rate."""
    digest = hashlib.blake2b(f"{clip.sampling_rate} {clip.channels} ".encode(), digest_size=8)
    digest.update(audio.to_int16(clip.samples).tobytes())
    return digest.hexdigest()
