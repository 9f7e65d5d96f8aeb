"""Songs → sound: TinySoundFont with a General MIDI soundfont, or plain sines where there is none.

The rendered set is `audio_<part>.npy` (int16 [clips, 2, samples]) and `meta_<part>.json` in one
folder; a part that is complete is not rendered again. No reverb, no chorus, no normalisation: the
same bar must give the same samples.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from training.composer import FRAME_S, SPEEDS, Meta, Song, compose
from training.sketch import DRUM_CHANNEL
from training.styles import STYLES

SYNTH_RATE_HZ = 32_000
SOUNDFONTS = (
    Path("/usr/share/sounds/sf3/FluidR3Mono_GM.sf3"),  # Debian's fluidr3mono-gm-soundfont
    Path("/usr/share/soundfonts/FluidR3Mono_GM.sf3"),
)
SINES = "sines"  # as a soundfont's name: the renderer that needs none
KNEE = 0.7  # where the soft limiter starts


def find_soundfont() -> str:
    """The installed FluidR3Mono soundfont, or `SINES`."""
    found = next((str(path) for path in SOUNDFONTS if path.exists()), SINES)
    return found if importlib.util.find_spec("tinysoundfont") else SINES


class SoundfontRenderer:
    """One synthesiser; notes start and end at exact samples. Reads .sf2 and .sf3."""

    def __init__(self, soundfont: str):
        if not Path(soundfont).is_file():
            raise FileNotFoundError(f"There is no soundfont {soundfont}.")
        # Not among the requirements: it asks for pyaudio, which only plays and has to be compiled.
        tinysoundfont = importlib.import_module("tinysoundfont")
        self.synth = tinysoundfont.Synth(samplerate=SYNTH_RATE_HZ)
        self.font = self.synth.sfload(soundfont, gain=-9.0, max_voices=192)

    def __call__(self, song: Song, seconds: float) -> np.ndarray:
        """float32 [2, samples] at 32 kHz, before gain."""
        synth, position = self.synth, 0
        out = np.zeros((round(seconds * SYNTH_RATE_HZ), 2), np.float32)
        for channel, program in song.programs.items():
            bank = 128 if channel == DRUM_CHANNEL else 0
            synth.program_select(channel, self.font, bank, program, channel == DRUM_CHANNEL)
            synth.control_change(channel, 10, song.pans[channel])
        for frame, on, note in _events(song):
            start = round(frame * FRAME_S * SYNTH_RATE_HZ)
            if start >= len(out):
                break
            if start > position:
                synth.generate(start - position, memoryview(out[position:start]).cast("B"))
                position = start
            if on:
                synth.noteon(note.channel, note.key, note.velocity)
            else:
                synth.noteoff(note.channel, note.key)
        synth.generate(len(out) - position, memoryview(out[position:]).cast("B"))
        for channel in song.programs:
            synth.sounds_off(channel)
        synth.generate(SYNTH_RATE_HZ // 20)  # lets the cut notes fade before the next song
        return np.ascontiguousarray(out.T)


def render_sines(song: Song, seconds: float) -> np.ndarray:
    """Decaying sines and noise bursts, panned: enough to exercise the recipe."""
    out = np.zeros((2, round(seconds * SYNTH_RATE_HZ)), np.float32)
    noise = np.random.default_rng(0)
    for note in song.notes:
        start = round(note.frame * FRAME_S * SYNTH_RATE_HZ)
        time = np.arange(min(round(note.frames * FRAME_S * SYNTH_RATE_HZ), out.shape[1] - start))
        if note.channel == DRUM_CHANNEL:
            wave = noise.standard_normal(len(time)) * np.exp(-time / (0.03 * SYNTH_RATE_HZ))
        else:
            pitch = 440 * 2 ** ((note.key - 69) / 12) / SYNTH_RATE_HZ
            wave = np.sin(2 * np.pi * pitch * time) * np.exp(-time / (0.4 * SYNTH_RATE_HZ))
        right = song.pans[note.channel] / 127
        level = 0.1 * note.velocity / 127 / song.gain
        out[:, start : start + len(time)] += level * np.outer(np.sqrt((1 - right, right)), wave)
    return out


def _events(song: Song) -> list:
    """(frame, on, note) in time order, ends before starts."""
    ends = [(n.frame + n.frames, False, n) for n in song.notes]
    return sorted([*ends, *((n.frame, True, n) for n in song.notes)], key=lambda e: e[:2])


def to_clip(stereo: np.ndarray, gain: float, sampling_rate: int) -> np.ndarray:
    """Gain, soft limiter and resampling: [2, samples] at 32 kHz → int16 [2, samples]."""
    loud = stereo * gain
    over = np.abs(loud) > KNEE
    room = 0.98 - KNEE
    loud[over] = np.sign(loud[over]) * (KNEE + room * np.tanh((np.abs(loud[over]) - KNEE) / room))
    shared = gcd(SYNTH_RATE_HZ, sampling_rate)
    loud = resample_poly(loud, sampling_rate // shared, SYNTH_RATE_HZ // shared, axis=1)
    return np.clip(np.round(loud * 32767), -32767, 32767).astype(np.int16)


@dataclass(frozen=True)
class RenderJob:
    folder: Path
    part: int
    clips: range
    seconds: float
    sampling_rate: int
    soundfont: str
    keys: int


def render_part(job: RenderJob) -> None:
    """One part of the set; written under its final name only when complete.

    Styles come in turn, and each song at all of its tempi: were there one, the first notes could
    give the song away and with it its tempo, whatever the caption says of it.
    """
    done = job.folder / f"meta_{job.part}.json"
    if done.exists():
        return
    renderer = render_sines if job.soundfont == SINES else SoundfontRenderer(job.soundfont)
    samples = round(job.seconds * job.sampling_rate)
    shape = (len(job.clips), 2, samples)
    path = job.folder / f"audio_{job.part}.npy"
    audio = np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape)
    metas, names = [], list(STYLES)
    for i, number in enumerate(job.clips):
        turn, style = divmod(number, len(names))
        seed, tempo = turn // len(SPEEDS) * len(names) + style, turn % len(SPEEDS)
        song = compose(seed, names[style], job.seconds, keys=job.keys, tempo=tempo)
        audio[i] = to_clip(renderer(song, job.seconds), song.gain, job.sampling_rate)[:, :samples]
        metas.append(song.meta.as_dict())
    audio.flush()
    done.write_text(json.dumps(metas))


def render(
    folder: Path,
    clips: int,
    seconds: float,
    sampling_rate: int,
    soundfont: str,
    keys: int,
    clips_a_part: int = 300,
    workers: int = 2,
) -> None:
    """The whole set, parts side by side; resumes where it was left."""
    folder.mkdir(parents=True, exist_ok=True)
    ranges = (range(s, min(s + clips_a_part, clips)) for s in range(0, clips, clips_a_part))
    jobs = [
        RenderJob(folder, part, numbers, seconds, sampling_rate, soundfont, keys)
        for part, numbers in enumerate(ranges)
    ]
    with ProcessPoolExecutor(workers) as pool:
        for job, _ in zip(jobs, pool.map(render_part, jobs), strict=True):
            print(f"rendered part {job.part + 1} of {len(jobs)}", flush=True)


def load_metas(folder: Path) -> list[Meta]:
    """The Meta of every rendered clip, in the order of the parts."""
    metas = []
    for part in range(len(list(folder.glob("meta_*.json")))):
        entries = json.loads((folder / f"meta_{part}.json").read_text())
        metas += [Meta(**{**e, "instruments": tuple(e["instruments"])}) for e in entries]
    return metas


def load_audio(folder: Path) -> list[np.ndarray]:
    """The parts as memory maps, int16 [clips, 2, samples]."""
    count = len(list(folder.glob("meta_*.json")))
    return [np.load(folder / f"audio_{part}.npy", mmap_mode="r") for part in range(count)]
