"""A fake engine: the real protocol, tones instead of music, as fast or slow as a test wants.

A tone's pitch depends on the seed alone, so takes are deterministic and differ by seed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import (
    Chroma,
    Chunk,
    Description,
    Event,
    Finished,
    Health,
    Progress,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

STEREO = {"auto": "choice", "mono": "never", "wide": "always"}
OWN = {"wide": {"temperature": 0.7, "top_k": 50}}  # what a checkpoint states of its sampling


def tone(seed: int, duration_s: float, sampling_rate: int, channels: int) -> np.ndarray:
    """A chord that starts softly: float32 [channels, samples] at about -14 dB."""
    t = np.arange(round(duration_s * sampling_rate)) / sampling_rate
    root = 110 * 2 ** ((seed % 24) / 12)
    voices = [np.sin(2 * np.pi * root * ratio * t) for ratio in (1, 1.25, 1.5)]
    mono = 0.1 * np.minimum(1, t / 0.05) * np.sum(voices, axis=0)
    return np.stack([mono, mono[::-1]][:channels]).astype(np.float32)


@dataclass
class FakeEngine:
    """Implements `musicgen_ui.engine.protocol.Engine` with tones."""

    speed: float = 0.0  # seconds of music a second; 0 is at once
    chunk_s: float = 0.25
    sampling_rate: int = 16_000
    max_jobs: int = 4
    load_s: float = 0.0
    failure: Exception | None = None  # raised while composing
    requests: list[GenerationRequest] = field(default_factory=list)
    visitors: list[str] = field(default_factory=list)
    closed: int = 0  # iterators closed, finished or not
    running: int = 0
    unloads: int = 0
    trouble: str = ""  # of its health
    ended: bool = False

    async def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        stop = stop or threading.Event()
        self.describe(request.checkpoint)
        request = request.with_seed()
        self.requests.append(request)
        self.visitors.append(visitor)
        try:
            place = self.running - self.max_jobs + 1
            self.running += 1
            if place > 0:
                yield Progress("waiting", place=place)
            while self.running > self.max_jobs and not stop.is_set():
                await asyncio.sleep(0.01)
            if self.load_s:
                yield Progress("loading", note="reading 17 MB")
                await asyncio.sleep(self.load_s)
            async for event in self._compose(request, stop):
                yield event
        finally:
            self.running -= 1
            self.closed += 1

    async def _compose(
        self, request: GenerationRequest, stop: threading.Event
    ) -> AsyncIterator[Event]:
        total_s, speed = request.duration_s, self.speed or 20.0
        made_s = 0.0
        yield Progress("composing", total_s=total_s)
        while made_s < total_s - 1e-9 and not stop.is_set():
            until_s = min(total_s, made_s + self.chunk_s)
            if self.speed:
                await asyncio.sleep((until_s - made_s) / self.speed)
            if self.failure:
                raise self.failure
            for index in range(request.variations):
                part = slice(*(round(s * self.sampling_rate) for s in (made_s, until_s)))
                samples = self._music(request.variation(index))[:, part]
                yield Chunk(index, Clip(samples, self.sampling_rate))
                yield Progress("composing", index, done_s=until_s, total_s=total_s, speed=speed)
            made_s = until_s
        for index in range(request.variations):
            yield self._finished(request, index, made_s, speed)

    def _music(self, request: GenerationRequest) -> np.ndarray:
        return tone(
            request.seed, request.duration_s, self.sampling_rate, 2 if request.stereo else 1
        )

    def _finished(
        self, request: GenerationRequest, index: int, made_s: float, speed: float
    ) -> Finished:
        mine = replace(request.variation(index), checkpoint="fake")
        new = self._music(mine)[:, : round(made_s * self.sampling_rate)]
        prompt_s, notes = 0.0, ()
        if mine.audio_prompt is not None and mine.include_prompt:
            prompt_s = mine.audio_prompt.duration_s
            lead = tone(1, prompt_s, self.sampling_rate, new.shape[0])
            new = np.concatenate([lead, new], axis=1)
        if "cut" in mine.prompt:
            notes = ("The prompt was cut after “cut”.",)
        stopped = made_s < mine.duration_s - 1e-9
        clip = Clip(new, self.sampling_rate)
        melody = None
        if mine.melody:  # up and down, whatever the clip
            melody = Chroma(np.arange(round(mine.duration_s / 0.125), dtype=np.uint8) % 12, 0.125)
        return Finished(index, clip, mine, prompt_s, speed, stopped, notes, melody=melody)

    def checkpoints(self) -> list[str]:
        return list(STEREO)

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        if checkpoint not in STEREO:
            raise RequestError(
                f"There is no checkpoint “{checkpoint}”: choose one from the list.", "checkpoint"
            )
        return Description(
            checkpoint,
            STEREO[checkpoint],
            self.sampling_rate,
            "Tones for testing, 0 MB",
            melody=checkpoint == "wide",
            defaults=OWN.get(checkpoint, {}),
        )

    def status(self) -> str:
        return "fake · CPU · float32"

    def health(self) -> Health:
        return Health(self.trouble, {"fake": 1_000_000}, jobs=self.running)

    def unload(self) -> None:
        self.unloads += 1

    def close(self) -> None:
        self.ended = True
