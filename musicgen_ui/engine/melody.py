"""A melody or chords as chroma: weights of the twelve pitch classes, eight times a second.

MusicGen's melody checkpoints are conditioned on the chroma of a clip (Copet et al. 2023, "Simple
and Controllable Music Generation", section 2.2): a spectrogram with long windows is summed over the
octaves and only the strongest pitch class of each column is kept, so that the music follows the
tune and not the sound. transformers' `MusicgenMelodyFeatureExtractor` is the reference; it needs
torchaudio for its spectrogram, which is a few lines of torch here. audiocraft first removes drums
and bass from the clip with Demucs; neither transformers' extractor nor this one does.

Chords are columns in which all their pitch classes are set (musicgen-chord). Meta's checkpoints
were trained on one class a column, so they follow chords approximately; fine-tunes on chords do
better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.chords import PITCH_CLASSES
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine.device import moved
from musicgen_ui.engine.lora import NO_LAYER, AppliedAdapter, RowAdapters
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

MAX_COLUMNS = 256  # transformed at once, so that memory does not grow with the clip


@dataclass(frozen=True)
class ChromaExtractor:
    """Clips to pitch classes; the defaults are those of Meta's checkpoints."""

    sampling_rate: int = 32_000  # Hz
    n_fft: int = 16_384  # samples of a window
    hop_length: int = 4_096  # samples from column to column
    num_chroma: int = 12
    chords: bool = False  # the checkpoint was trained on chords, where silence is no class at all

    @classmethod
    def of(cls, config: Mapping[str, object]) -> ChromaExtractor:
        """Takes over the configuration of a checkpoint's feature extractor."""

        def whole(name: str, default: int) -> int:
            value = config.get(name, default)
            return value if isinstance(value, int) else default

        return cls(
            whole("sampling_rate", cls.sampling_rate),
            whole("n_fft", cls.n_fft),
            whole("hop_length", cls.hop_length),
            whole("num_chroma", cls.num_chroma),
            config.get("chords") is True,
        )

    @property
    def column_s(self) -> float:
        """Seconds from column to column."""
        return self.hop_length / self.sampling_rate

    @cached_property
    def _filters(self) -> Tensor:
        """The weight of each frequency in each class, [classes, frequencies]."""
        filters = chroma_filter_bank(self.n_fft, self.num_chroma, self.sampling_rate, tuning=0)
        return torch.from_numpy(filters).float()

    @torch.inference_mode()
    def __call__(self, clip: Clip) -> Tensor:
        """The strongest class of each column, int64 [1 + samples // hop]; 0 is C, or silence.

        Column i is centred on the time i · column_s. A clip shorter than a window is padded with
        silence on both sides.
        """
        samples = torch.from_numpy(audio.convert(clip, self.sampling_rate, 1).samples[0])
        short = max(0, self.n_fft - len(samples))
        samples = F.pad(samples, (short // 2, short - short // 2))
        half = self.n_fft // 2
        padded = F.pad(samples[None], (half, half), mode="reflect")[0]
        windows = padded.unfold(0, self.n_fft, self.hop_length)  # [columns, n_fft]
        return torch.cat([self._classes(some) for some in windows.split(MAX_COLUMNS)])

    def _classes(self, windows: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(windows * torch.hann_window(self.n_fft))
        power = spectrum.abs().square() / torch.hann_window(self.n_fft).square().sum()
        chroma = power @ self._filters.T  # [columns, classes]
        return F.normalize(chroma, p=torch.inf, dim=1, eps=1e-6).argmax(1)


class MelodyEncoder:
    """A melody as a prefix of decoder states, one window at a time.

    Args:
        projection: of the chroma to the decoder's width; None where the widths agree already.
        length: columns of a window, which are 30 s as in training.
        extractor: of the checkpoint.
    """

    def __init__(
        self, projection: nn.Module | None, length: int, extractor: ChromaExtractor
    ) -> None:
        self.projection = projection
        self.length = length
        self.extractor = extractor
        self._classes: WeakKeyDictionary[Clip, Tensor] = WeakKeyDictionary()

    @property
    def silence(self) -> Tensor:
        """The columns of a window without melody and chords, the null condition."""
        silence = torch.zeros(self.length, self.extractor.num_chroma)
        if not self.extractor.chords:
            silence[:, 0] = 1
        return silence

    def prepare(self, request: GenerationRequest) -> None:
        """Analyses the clips that `window` and `chroma` will need, on any thread."""
        if request.melody:
            self._classes_of(request.melody)
        if request.audio_prompt and request.followed:
            self._classes_of(request.audio_prompt)

    def window(self, request: GenerationRequest, start_s: float) -> Tensor:
        """The columns of the window that begins `start_s` into the new music: float32
        [length, classes].

        Melody and chords begin with the new music; columns before it are those of the audio
        prompt. A melody or progression that is shorter than the music is repeated. Where there are
        both, a class has the greater of its two weights.

        Raises:
            RequestError: there are chords, and the checkpoint divides the octave otherwise.
        """
        progression, classes = request.progression, self.extractor.num_chroma
        if request.melody is None and progression is None:
            return self.silence
        if progression and classes != PITCH_CLASSES:
            raise RequestError(
                f"This checkpoint has {classes} pitch classes instead of {PITCH_CLASSES}: choose "
                "another one for chords.",
                "checkpoint",
            )
        first = round(start_s / self.extractor.column_s)
        columns = self._columns(request.melody, request.audio_prompt, first, self.length)
        if progression:
            begin = max(0, -first)
            chroma = progression.chroma(first + begin, self.length - begin, self.extractor.column_s)
            chords = request.chord_strength * torch.from_numpy(chroma)
            columns[begin:] = torch.maximum(columns[begin:], chords) if request.melody else chords
        return columns

    def _columns(self, melody: Clip | None, before: Clip | None, first: int, count: int) -> Tensor:
        """Columns of a melody from `first` on, and of the clip before it: [count, classes]."""
        columns = self.silence[:1].repeat(count, 1)
        if melody:
            classes = self._classes_of(melody)
            columns = self._one_hot(classes[torch.arange(first, first + count) % len(classes)])
        if first < 0 and before:
            lead = self._one_hot(self._classes_of(before)[first:])
            columns[-first - len(lead) : -first] = lead[:count]
        return columns

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.extractor.num_chroma).float()

    def _classes_of(self, clip: Clip) -> Tensor:
        if clip not in self._classes:  # variations and windows share it
            self._classes[clip] = self.extractor(clip)
        return self._classes[clip]

    def chroma(self, request: GenerationRequest) -> Chroma | None:
        """What the whole of the new music follows; None without melody and chords."""
        progression, column_s = request.progression, self.extractor.column_s
        if request.melody is None and progression is None:
            return None
        classes = np.empty(0, np.uint8)
        if request.melody:
            count = math.ceil(request.duration_s / column_s)
            found = self._classes_of(request.melody)
            classes = found[torch.arange(count) % len(found)].numpy().astype(np.uint8)
        chords = progression.placed(request.duration_s) if progression else ()
        return Chroma(classes, column_s, chords)

    @torch.inference_mode()
    def states(self, columns: Tensor, adapter: AppliedAdapter | None = None) -> Tensor:
        """Columns as states: [columns, classes] to [columns, hidden]."""
        if self.projection is None:
            return columns
        weight = next(self.projection.parameters())
        adapters = RowAdapters.of([(adapter, len(columns))])
        chroma = moved(columns, weight.device).to(weight)
        return adapters.product(NO_LAYER, "audio_enc_to_dec_proj", self.projection, chroma)
