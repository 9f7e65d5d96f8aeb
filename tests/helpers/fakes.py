"""A fake backend: the real protocol, tones instead of music, as fast or slow as a test wants.

A tone's pitch depends on the seed alone, so takes are deterministic and differ by seed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import (
    CheckpointInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Health,
    Progress,
    Recorded,
    Stage,
    Status,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import Steering

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
class FakeBackend:
    """Implements `musicgen_ui.engine.protocol.Backend` with tones."""

    speed: float = 0.0  # seconds of music a second; 0 is at once
    chunk_s: float = 0.25
    sampling_rate: int = 16_000
    max_jobs: int = 4
    load_s: float = 0.0
    failure: Exception | None = None  # raised while composing
    requests: list[GenerationRequest] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    closed: int = 0  # jobs that ended, finished or not
    running: int = 0
    unloads: int = 0
    changes: list[tuple[float, Steering]] = field(default_factory=list)  # of live pieces
    trouble: Trouble | None = None  # of its health
    ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: GenerationRequest, client: str = "") -> LoggedJob:
        job = LoggedJob(request, client)
        self.clients.append(client)
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def _run(self, job: LoggedJob) -> None:
        try:
            self.describe(job.request.checkpoint)
            self.requests.append(job.request)
            with self._counted(job):
                if self.load_s:
                    job.log.append(Progress(Stage.LOADING, note="reading 17 MB"))
                    job.log.wait(self.load_s)
                events = self._compose(job) if job.begin() else []
                for event in events:
                    last = event
                    if not isinstance(event, Finished) or job.log.unfinished > 1:
                        job.log.append(event)
            if not job.ended:
                job.log.append(last)
        except Exception as error:
            job.log.append(Failed(error))

    @contextlib.contextmanager
    def _counted(self, job: LoggedJob) -> Iterator[None]:
        """The job counts as running; it waits while there are too many."""
        try:
            with self._lock:
                place = self.running - self.max_jobs + 1
                self.running += 1
            if place > 0:
                job.log.append(Progress(Stage.WAITING, place=place))
            while self.running > self.max_jobs and not job.log.wait(0.01):
                pass
            yield
        finally:
            with self._lock:
                self.running -= 1
                self.closed += 1

    def _compose(self, job: LoggedJob) -> Iterator[Event]:
        request = job.request
        if request.live:
            yield from self._play_live(job)
            return
        total_s, speed = request.duration_s, self.speed or 20.0
        made_s = 0.0
        yield Progress(Stage.COMPOSING, total_s=total_s)
        while made_s < total_s - 1e-9 and not job.stopping.is_set():
            until_s = min(total_s, made_s + self.chunk_s)
            if self.speed and job.stopping.wait((until_s - made_s) / self.speed):
                break
            if self.failure:
                raise self.failure
            for index in range(request.variations):
                begin, end = (round(s * self.sampling_rate) for s in (made_s, until_s))
                samples = self._music(request.variation(index))[:, begin:end]
                yield Chunk(index, Clip(samples, self.sampling_rate), begin)
                yield Progress(Stage.COMPOSING, index, done_s=until_s, total_s=total_s, speed=speed)
            made_s = until_s
        for index in range(request.variations):
            yield self._finished(request, index, made_s, speed)

    def _play_live(self, job: LoggedJob) -> Iterator[Event]:
        """Tones whose pitch is that of the heaviest prompt, no further than 0.9 s ahead."""
        request, listener, rate = job.request, job.listener, self.sampling_rate
        prompts = ((request.prompt, 1.0),)
        rows = list(request.automation)
        made, pieces = 0, []
        while not job.stopping.wait(0.01):
            changes = [change for _, change in rows[:1] if made == 0]
            changes += [listener.changes.popleft() for _ in range(len(listener.changes))]
            for change in changes:
                prompts = change.prompts or prompts
                self.changes.append((made / rate, change))
            while listener.recordings:
                start_s, end_s = listener.recordings.popleft()
                samples = np.concatenate(pieces, axis=1)
                samples = samples[:, round(start_s * rate) : round(end_s * rate)]
                automation = (*request.automation[:1], *self.changes[1:])
                mine = replace(
                    request,
                    checkpoint="fake",
                    live=False,
                    duration_s=end_s - start_s,
                    skip_s=start_s,
                    automation=automation,
                )
                yield Recorded(Finished(0, Clip(samples, rate), mine, 0.0, 4.0))
            if made / rate - listener.at_s(rate) >= 0.9:
                continue
            heaviest = max(prompts, key=lambda prompt: prompt[1])[0]
            seed = len(heaviest) % 24
            count = round(self.chunk_s * rate)
            piece = tone(seed, self.chunk_s, rate, 1)
            pieces.append(piece)
            yield Chunk(0, Clip(piece, rate), made)
            made += count
            yield Progress(
                Stage.COMPOSING,
                done_s=made / rate,
                speed=self.speed or 4.0,
                ahead_s=made / rate - listener.at_s(rate),
                underruns=listener.underruns,
            )
        nothing = Clip(np.zeros((1, 0), np.float32), rate)
        yield Finished(0, nothing, request, 0.0, 4.0, stopped=True)

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

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        if checkpoint not in (*STEREO, "fake"):  # as its takes name it
            raise RequestError(
                f"There is no checkpoint “{checkpoint}”: choose one from the list.", "checkpoint"
            )
        return CheckpointInfo(
            checkpoint,
            STEREO.get(checkpoint, "choice"),
            self.sampling_rate,
            "Tones for testing, 0 MB",
            melody=checkpoint == "wide",
            defaults=OWN.get(checkpoint, {}),
        )

    def status(self) -> Status:
        return Status(("fake",), device="CPU", precision="float32", nbytes=1_000_000)

    def health(self) -> Health:
        return Health(self.trouble, {"fake": 1_000_000}, jobs=self.running)

    def unload(self) -> None:
        self.unloads += 1

    def close(self) -> None:
        self.ended = True
