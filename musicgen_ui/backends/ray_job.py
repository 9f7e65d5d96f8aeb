"""What the front of a cluster has of a job: its variations as far as they are made."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.ray_pool import Placement
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Chunk, Finished
from musicgen_ui.engine.variation import Specification
from musicgen_ui.request import CLIP_FIELDS, GenerationRequest
from musicgen_ui.steering import Steering


class RayJob(LoggedJob):
    """A job whose front is woken when it is to stop, or its listener does something."""

    def __init__(
        self, request: GenerationRequest, client: str, changed: Callable[[], None]
    ) -> None:
        super().__init__(request, client)
        self._changed = changed

    def stop(self) -> None:
        """Ends the job at its replicas' next step, or now where nothing was begun."""
        super().stop()
        self._changed()

    def steer(self, change: Steering) -> None:
        """Changes a live piece, as soon as its replica has it."""
        super().steer(change)
        self._changed()

    def played(self, samples: int, underruns: int = 0) -> None:
        """The listener has heard so many samples of a live piece."""
        super().played(samples, underruns)
        self._changed()

    def record_stretch(self, start_s: float, end_s: float) -> None:
        """Makes a take of a stretch of a live piece."""
        super().record_stretch(start_s, end_s)
        self._changed()


@dataclass(eq=False)
class Made:
    """What the front has of a variation that is not finished."""

    clips: list[Clip] = field(default_factory=list)  # new audio, in order
    samples: int = 0  # in them
    codes: list[np.ndarray] = field(default_factory=list)  # int16 [codebooks, frames] each
    frames: int = 0  # in them; may be ahead of the audio
    lost: int = 0  # replicas, since there was new music
    place: Placement = field(default_factory=Placement)  # of this try
    at_replica: bool = False  # which one has begun
    played: tuple[int, int] = (0, 0)  # what the replica of a live piece knows of its listener
    controlling: bool = False  # it is being told more
    began_s: float = field(default_factory=time.monotonic)

    def known(self) -> np.ndarray | None:
        """The codes so far, int16 [codebooks, frames]."""
        return np.concatenate(self.codes, axis=1) if self.codes else None

    def new_part(self, chunk: Chunk, frames_before: int) -> Clip | None:
        """Keeps what of a chunk was not here yet, and gives its audio.

        Args:
            chunk: of the present replica, which makes the audio from its first sample on.
            frames_before: whose codes came with the chunks of this replica before.
        """
        clip = chunk.clip
        if clip.codes is not None:
            known = max(0, self.frames - frames_before)
            if known < clip.codes.shape[1]:
                self.codes.append(clip.codes[:, known:])
                self.frames += clip.codes.shape[1] - known
        known = max(0, self.samples - chunk.start_sample)
        if known >= clip.samples.shape[1]:
            return None
        new = Clip(clip.samples[:, known:], clip.sampling_rate)
        self.clips.append(new)
        self.samples += new.samples.shape[1]
        return new

    def joined(self, head: np.ndarray | None = None) -> np.ndarray:
        """The new audio after `head`, float32 [channels, samples]."""
        pieces = [] if head is None else [head]
        return np.concatenate([*pieces, *(clip.samples for clip in self.clips)], axis=1)


def with_clips(take: Finished, specification: Specification) -> Finished:
    """A replica's take as this variation's, with the clips of its request."""
    request = specification.request
    clips = {name: getattr(request, name) for name in CLIP_FIELDS}
    request = dataclasses.replace(take.request, **clips)
    return dataclasses.replace(take, variation=specification.index, request=request)


def take_so_far(specification: Specification, made: Made) -> Finished:
    """The take of the audio that arrived, without the end that it was to have."""
    request = specification.request
    rate, channels = made.clips[0].sampling_rate, made.clips[0].channels
    new = Clip(made.joined(), rate)
    prompt = request.audio_prompt if request.include_prompt else None
    prompt = audio.convert(prompt, rate, channels) if prompt else None
    return Finished(
        specification.index,
        audio.join(prompt, new.samples, 0) if prompt else new,
        dataclasses.replace(request, stereo=channels == 2),
        prompt.duration_s if prompt else 0.0,
        new.duration_s / (time.monotonic() - made.began_s),
        stopped=True,
    )
