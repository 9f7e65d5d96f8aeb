"""A melody as chroma: the loudest of the twelve pitch classes, eight times a second.

MusicGen's melody checkpoints do not hear a clip but its chroma (Copet et al. 2023, "Simple and
Controllable Music Generation", section 2.2): a spectrogram with long windows is summed over the
octaves and only the strongest pitch class of each column is kept, so that the tune is followed and
not the sound. transformers' `MusicgenMelodyFeatureExtractor` is the reference; it needs torchaudio
for its spectrogram, which `torch.stft` gives as well. audiocraft first takes drums and bass out of
the clip with Demucs; neither the extractor nor this does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import chroma_filter_bank

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine.lora import OUTSIDE, Rows, Worn
from musicgen_ui.request import GenerationRequest

PIECE_COLUMNS = 256  # transformed at once, so that memory does not grow with the clip


@dataclass(frozen=True)
class Extractor:
    """Clips to pitch classes; the defaults are those of Meta's checkpoints."""

    sampling_rate: int = 32_000  # Hz
    n_fft: int = 16_384  # samples of a window
    hop_length: int = 4_096  # samples from column to column
    num_chroma: int = 12

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Extractor:
        """The extractor that a checkpoint's feature extractor, as JSON, describes."""
        return cls(**{name: values[name] for name in cls.__annotations__ if name in values})

    @property
    def column_s(self) -> float:
        """Seconds from column to column."""
        return self.hop_length / self.sampling_rate

    @cached_property
    def _filters(self) -> Tensor:
        """How much each frequency belongs to each class, [classes, frequencies]."""
        filters = chroma_filter_bank(self.n_fft, self.num_chroma, self.sampling_rate, tuning=0)
        return torch.from_numpy(filters).float()

    @torch.inference_mode()
    def __call__(self, clip: Clip) -> Tensor:
        """The strongest class of each column, int64 [1 + samples // hop]; 0 is C, or silence.

        Column i is about the time i · column_s. A clip shorter than a window stands in the middle
        of a silent one.
        """
        samples = torch.from_numpy(audio.convert(clip, self.sampling_rate, 1).samples[0])
        short = max(0, self.n_fft - len(samples))
        samples = F.pad(samples, (short // 2, short - short // 2))
        reach = self.n_fft // 2
        padded = F.pad(samples[None], (reach, reach), mode="reflect")[0]
        windows = padded.unfold(0, self.n_fft, self.hop_length)  # [columns, n_fft]
        return torch.cat([self._classes(piece) for piece in windows.split(PIECE_COLUMNS)])

    def _classes(self, windows: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(windows * torch.hann_window(self.n_fft))
        power = spectrum.abs().square() / torch.hann_window(self.n_fft).square().sum()
        chroma = power @ self._filters.T  # [columns, classes]
        return F.normalize(chroma, p=torch.inf, dim=1, eps=1e-6).argmax(1)


class MelodyEncoder:
    """A melody as states of the decoder, a window at a time.

    Args:
        projection: of the chroma to the decoder's width; None where the widths agree already.
        length: columns of a window: those of the training's 30 s.
        extractor: of the checkpoint.
    """

    def __init__(self, projection: nn.Module | None, length: int, extractor: Extractor) -> None:
        self.projection = projection
        self.length = length
        self.extractor = extractor
        self._classes: WeakKeyDictionary[Clip, Tensor] = WeakKeyDictionary()

    @property
    def silence(self) -> Tensor:
        """The columns of a window in which nothing is to be followed."""
        return torch.zeros(self.length, dtype=torch.int64)

    def window(self, request: GenerationRequest, start_s: float) -> Tensor:
        """The columns of the window that begins `start_s` into the new music, int64 [length].

        The melody begins with the new music, whatever comes before it: there the columns are those
        of the audio prompt itself. A melody that is shorter than the music begins again.
        """
        if request.melody is None:
            return self.silence
        first = round(start_s / self.extractor.column_s)
        return self._columns(request.melody, request.audio_prompt, first, self.length)

    def _columns(self, melody: Clip, before: Clip | None, first: int, count: int) -> Tensor:
        classes, places = self._of(melody), torch.arange(first, first + count)
        columns = classes[places % len(classes)]
        if first < 0 and before:
            lead = self._of(before)[first:]
            columns[-first - len(lead) : -first] = lead[:count]
        return columns

    def _of(self, clip: Clip) -> Tensor:
        if clip not in self._classes:  # variations and windows share it
            self._classes[clip] = self.extractor(clip)
        return self._classes[clip]

    def followed(self, request: GenerationRequest) -> Chroma | None:
        """What the whole of the new music follows; None without a melody."""
        if request.melody is None:
            return None
        count = math.ceil(request.duration_s / self.extractor.column_s)
        columns = self._columns(request.melody, None, 0, count)
        return Chroma(columns.numpy().astype(np.uint8), self.extractor.column_s)

    @torch.inference_mode()
    def states(self, columns: Tensor, worn: Worn | None = None) -> Tensor:
        """Columns as states: int64 [columns] to [columns, hidden]; `worn` is an adapter."""
        chroma = F.one_hot(columns, self.extractor.num_chroma).float()
        if self.projection is None:
            return chroma
        weight = next(self.projection.parameters())
        rows = Rows.of([(worn, len(chroma))])
        return rows.product(OUTSIDE, "audio_enc_to_dec_proj", self.projection, chroma.to(weight))
