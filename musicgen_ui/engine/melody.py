"""A melody as chroma: the loudest of the twelve pitch classes, eight times a second.

MusicGen's melody checkpoints are conditioned on the chroma of a clip (Copet et al. 2023, "Simple
and Controllable Music Generation", section 2.2): a spectrogram with long windows is summed over the
octaves and only the strongest pitch class of each column is kept, so that the music follows the
tune and not the sound. transformers' `MusicgenMelodyFeatureExtractor` is the reference; it needs
torchaudio for its spectrogram, which is a few lines of torch here. audiocraft first removes drums
and bass from the clip with Demucs; neither transformers' extractor nor this one does.
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
from musicgen_ui.engine.lora import NO_LAYER, AppliedAdapter, RowAdapters
from musicgen_ui.request import GenerationRequest

MAX_COLUMNS = 256  # transformed at once, so that memory does not grow with the clip


@dataclass(frozen=True)
class ChromaExtractor:
    """Clips to pitch classes; the defaults are those of Meta's checkpoints."""

    sampling_rate: int = 32_000  # Hz
    n_fft: int = 16_384  # samples of a window
    hop_length: int = 4_096  # samples from column to column
    num_chroma: int = 12

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ChromaExtractor:
        """Takes over the configuration of a checkpoint's feature extractor."""
        return cls(**{name: config[name] for name in cls.__annotations__ if name in config})

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
        """The columns of a window without a melody, the null condition."""
        return torch.zeros(self.length, dtype=torch.int64)

    def window(self, request: GenerationRequest, start_s: float) -> Tensor:
        """The columns of the window that begins `start_s` into the new music, int64 [length].

        The melody begins with the new music; columns before it are those of the audio prompt. A
        melody that is shorter than the music is repeated.
        """
        if request.melody is None:
            return self.silence
        first = round(start_s / self.extractor.column_s)
        return self._columns(request.melody, request.audio_prompt, first, self.length)

    def _columns(self, melody: Clip, before: Clip | None, first: int, count: int) -> Tensor:
        classes, indices = self._classes_of(melody), torch.arange(first, first + count)
        columns = classes[indices % len(classes)]
        if first < 0 and before:
            lead = self._classes_of(before)[first:]
            columns[-first - len(lead) : -first] = lead[:count]
        return columns

    def _classes_of(self, clip: Clip) -> Tensor:
        if clip not in self._classes:  # variations and windows share it
            self._classes[clip] = self.extractor(clip)
        return self._classes[clip]

    def chroma(self, request: GenerationRequest) -> Chroma | None:
        """The columns of the whole of the new music; None without a melody."""
        if request.melody is None:
            return None
        count = math.ceil(request.duration_s / self.extractor.column_s)
        columns = self._columns(request.melody, None, 0, count)
        return Chroma(columns.numpy().astype(np.uint8), self.extractor.column_s)

    @torch.inference_mode()
    def states(self, columns: Tensor, adapter: AppliedAdapter | None = None) -> Tensor:
        """Columns as states: int64 [columns] to [columns, hidden]."""
        chroma = F.one_hot(columns, self.extractor.num_chroma).float()
        if self.projection is None:
            return chroma
        weight = next(self.projection.parameters())
        adapters = RowAdapters.of([(adapter, len(chroma))])
        chroma = chroma.to(weight)
        return adapters.product(NO_LAYER, "audio_enc_to_dec_proj", self.projection, chroma)
