"""A clip to continue, as the model takes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.codec import Codec


@dataclass(frozen=True, eq=False)
class AudioPrompt:
    """A request's audio prompt as the model takes it: made once for all variations."""

    clip: Clip  # at the codec's sampling rate and channel count
    codes: np.ndarray  # int16 [codebooks, frames] of the clip's end, as much as the model reads

    @classmethod
    @torch.inference_mode()
    def of(cls, given: Clip, context_s: float, codec: Codec) -> AudioPrompt:
        """Converts a clip and encodes at most its last `context_s` seconds.

        A clip that carries codes of this codec is not encoded again.
        """
        clip = audio.convert(given, codec.sampling_rate, codec.channels)
        most = int(context_s * codec.frame_rate + 1e-6)
        frames = min(most, clip.samples.shape[1] // codec.hop)
        known = given.codes if given.codec == codec.name else None
        if known is not None and known.shape[1] >= frames:
            return cls(clip, known[:, known.shape[1] - frames :])
        rows = codec.channels * codec.codebooks
        if not frames:
            return cls(clip, np.zeros((rows, 0), np.int16))
        end = torch.from_numpy(clip.samples[:, -frames * codec.hop :])
        return cls(clip, codec.encode(end).to(torch.int16).cpu().numpy())
