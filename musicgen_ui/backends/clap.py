"""CLAP: how well music fits words, as the cosine between their embeddings.

Wu et al. 2023, "Large-scale contrastive language-audio pretraining". AudioLDM 2 ranks its
candidates this way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.checkpoints import file_checks, hub
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    from transformers import ClapFeatureExtractor, ClapModel, PreTrainedTokenizerBase

    Parts = tuple[ClapModel, PreTrainedTokenizerBase, ClapFeatureExtractor]

CHECKPOINT = "laion/larger_clap_music"  # 194 M parameters, Apache 2.0
MOST_WINDOWS = 6  # of a long take, evenly spaced
WORDS_TOKENS = 77  # what it was trained on


class Clap:
    """A CLAP checkpoint on the CPU, loaded when it is first needed. Any thread may use it.

    Args:
        checkpoint: a folder in transformers' format, or an id on the Hub.
        may_download: whether it may be fetched, or only be used where it is already.
    """

    def __init__(self, checkpoint: str | Path = CHECKPOINT, may_download: bool = True) -> None:
        self._checkpoint = checkpoint
        self._may_download = may_download
        self._lock = threading.Lock()
        self._loaded: Parts | None = None

    def load(self, report: Callable[[str], None]) -> None:
        """Reads the checkpoint, and downloads it first where that is allowed.

        Raises:
            RequestError: it cannot be had or read.
        """
        with self._lock:
            if self._loaded is None:
                folder = self._folder(report)
                report("preparing CLAP")
                self._loaded = _read(folder)

    def _folder(self, report: Callable[[str], None]) -> Path:
        if Path(self._checkpoint).is_dir():
            return Path(self._checkpoint)
        repo_id = str(self._checkpoint)
        if folder := hub.cached(repo_id):
            return folder
        if not self._may_download:
            raise RequestError(f"{repo_id} is not on this server.", "rank_by_prompt")
        return hub.download(repo_id, report)

    @torch.inference_mode()
    def similarity(self, words: str, clips: list[Clip]) -> list[float]:
        """The cosine between `words` and each clip, -1 to 1; see `load`.

        A clip is heard in windows of the checkpoint's length (10 s), and their embeddings' mean
        counts; one without samples fits nothing. Windows are cut here, since the feature extractor
        would cut a long clip at random.
        """
        assert self._loaded is not None, "load it first"
        model, tokenizer, extractor = self._loaded
        tokens = tokenizer(words, truncation=True, max_length=WORDS_TOKENS, return_tensors="pt")
        text = model.get_text_features(**tokens).pooler_output[0]
        return [
            float(text @ _embedding(model, extractor, clip)) if clip.samples.size else -1.0
            for clip in clips
        ]

    def unload(self) -> None:
        """Frees its memory; does nothing while it is being loaded."""
        if self._lock.acquire(blocking=False):
            self._loaded = None
            self._lock.release()


def _read(folder: Path) -> Parts:
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    try:
        for file in hub.weights_in(folder):
            file_checks.require_weights(file)
        model = ClapModel.from_pretrained(folder, local_files_only=True, weights_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RequestError(
            f"CLAP in {folder} cannot be read: fetch it again.", "rank_by_prompt"
        ) from error
    return model, tokenizer, extractor


def _embedding(model: ClapModel, extractor: ClapFeatureExtractor, clip: Clip) -> torch.Tensor:
    samples = audio.convert(clip, extractor.sampling_rate, 1).samples[0]
    size = extractor.nb_max_samples
    last = max(0, len(samples) - size)
    count = min(MOST_WINDOWS, 1 + -(-last // size))
    starts = np.linspace(0, last, count).round().astype(int)
    windows = [samples[start : start + size] for start in starts]
    inputs = extractor(windows, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    found = model.get_audio_features(**inputs).pooler_output  # [windows, width], of length 1
    return F.normalize(found.mean(0), dim=0)
