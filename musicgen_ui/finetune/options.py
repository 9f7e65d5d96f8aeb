"""The settings of a fine-tuning run, and presets of them by the memory of the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LEARNING_RATE = 5e-4
SAMPLE_S = 8.0  # length of a sample


@dataclass(frozen=True)
class Preset:
    """Settings that suit a device."""

    memory_gb: float  # that may be used; 0 is what is free
    batch: int  # examples a step
    piece_s: float  # longest piece of a song, in seconds
    rank: int  # of the adapter's matrices
    steps: int


PRESETS = {
    "cpu": Preset(0, 4, 10, 16, 300),
    "8": Preset(8, 4, 15, 16, 1000),
    "12": Preset(12, 4, 20, 16, 1000),
    "16": Preset(16, 8, 30, 32, 1000),
    "24": Preset(24, 8, 30, 64, 1500),
}


@dataclass(frozen=True)
class Options:
    """A run: what is trained on what, how, and where its files are."""

    sources: tuple[Path, ...]  # folders and files
    folder: Path  # of the run: cache, state, samples, adapter
    checkpoint: str = "auto"
    activation_word: str = ""  # comes first in every caption
    preset: Preset = PRESETS["cpu"]
    learning_rate: float = LEARNING_RATE
    save_every: int = 50  # steps
    sample_every: int = 100  # steps; 0 is never
    sample_prompt: str = ""  # empty: the first song's caption
    device: str = "auto"
    seed: int = 0

    @property
    def adapter(self) -> Path:
        """The folder of the adapter as it was last saved."""
        return self.folder / "adapter"


def preset_for(memory_bytes: int) -> str:
    """The name of the largest preset for a GPU with so much memory; the smallest where none is."""
    fitting = [
        name
        for name, preset in PRESETS.items()
        if preset.memory_gb and preset.memory_gb * 0.9e9 <= memory_bytes
    ]
    return fitting[-1] if fitting else "8"
