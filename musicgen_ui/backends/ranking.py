"""The best of several variations: a backend around the real one that ranks takes.

A request that keeps fewer takes than it has variations gets the best ones, the best first: ranked
by CLAP where that is asked for, and by simple faults (`audio.defects`). Progress and music of
dropped variations are passed on, their takes are not. The bundled checkpoint, a small one,
sometimes falls silent or holds one sound: such a take is drawn again with the next seed, and says
so.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import threading
from collections.abc import Callable

from musicgen_ui.audio import defects
from musicgen_ui.audio.clip import Clip
from musicgen_ui.audio.defects import Defects
from musicgen_ui.backends.clap import Clap
from musicgen_ui.backends.wrapping import WrappingBackend
from musicgen_ui.engine import faults
from musicgen_ui.engine.job import RelayedJob
from musicgen_ui.engine.protocol import (
    Backend,
    Failed,
    Finished,
    Job,
    Progress,
    Stage,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import MAX_SEED, GenerationRequest

REDRAWS = 2  # of a take at most
BUNDLED = ("bundled", "bundled-stereo")
WITHOUT_WORDS = "There are no words to rank by: faults alone rank."

log = logging.getLogger(__name__)


class Ranking(WrappingBackend):
    """A `protocol.Backend` in front of `backend`.

    Args:
        backend: what makes the music.
        clap: by which takes are ranked where a request asks for it.
    """

    def __init__(self, backend: Backend, clap: Clap | None = None) -> None:
        super().__init__(backend)
        self.clap = clap or Clap()

    def submit(self, request: GenerationRequest, client: str = "") -> Job:
        """See `Backend.submit`."""
        redrawn = request.checkpoint in ("auto", *BUNDLED) and not request.steered
        if request.live or not (request.keep or redrawn):
            return self.backend.submit(request, client)
        job = RelayedJob(request, client)
        # Here, so that jobs queue in the order of their calls; CLAP is loaded before the music.
        first = None if request.rank_by_prompt else self._submit(job, job.request)
        # In the context of the caller: ZeroGPU counts by the visitor whom Gradio names there.
        run = contextvars.copy_context().run
        make = self._keep_best if request.keep else self._redraw_unusable
        work = threading.Thread(target=run, args=(self._run, job, make, first), daemon=True)
        work.start()
        return job

    def _run(
        self, job: RelayedJob, make: Callable[[RelayedJob, Job | None], None], first: Job | None
    ) -> None:
        try:
            make(job, first)
        except Exception as error:
            job.log.append(Failed(faults.for_caller(error)))
        finally:
            job.set_behind(None)

    # The best of several

    def _keep_best(self, job: RelayedJob, first: Job | None) -> None:
        clap, note = self._clap_for(job)
        if not job.begin():
            return
        takes: list[Finished] = []
        for event in (first or self._submit(job, job.request)).follow():
            if isinstance(event, Finished):
                takes.append(event)
            else:
                job.log.append(event)
        if job.ended:  # it failed
            return
        matches: list[float] | None = None
        if clap:
            job.log.append(Progress(Stage.LOADING, note="ranking the takes"))
            matches = clap.similarity(job.request.prompt, [_new_part(take) for take in takes])
        for take in ranked(takes, matches)[: job.request.takes]:
            notes = (*take.notes, note) if note else take.notes
            job.log.append(dataclasses.replace(take, notes=notes))

    def _clap_for(self, job: RelayedJob) -> tuple[Clap | None, str]:
        """CLAP, loaded, where the request asks for it; else a note for its takes."""
        if not job.request.rank_by_prompt:
            return None, ""
        if not job.request.prompt:
            return None, WITHOUT_WORDS

        def report(note: str) -> None:
            job.log.append(Progress(Stage.LOADING, note=note))

        try:
            self.clap.load(report)
        except RequestError as error:
            log.warning("Takes are ranked without CLAP: %s", error)
            return None, f"The takes could not be ranked by the prompt, faults alone rank. {error}"
        return self.clap, ""

    # Takes that are drawn again

    def _redraw_unusable(self, job: RelayedJob, first: Job | None) -> None:
        if not job.begin():
            return
        request, unusable = job.request, list[Finished]()
        for event in (first or self._submit(job, request)).follow():
            if isinstance(event, Finished) and _is_unusable(event):
                unusable.append(event)
            else:
                job.log.append(event)
        seed = request.seed + request.variations
        for _ in range(REDRAWS):
            if not unusable or job.ended or job.stopping.is_set():
                break
            again = dataclasses.replace(
                request, seed=seed % (MAX_SEED + 1), variations=len(unusable)
            )
            seed += len(unusable)
            unusable = self._redrawn(job, again, unusable)
        for take in unusable:
            said = f"This take is {_fault(take)}: try another seed or other words."
            job.log.append(dataclasses.replace(take, notes=(*take.notes, said)))

    def _redrawn(
        self, job: RelayedJob, request: GenerationRequest, takes: list[Finished]
    ) -> list[Finished]:
        """Draws each take again; those that are still unusable.

        Its music is not sent while it is made: what was sent is the music of the dropped take.
        """
        left: dict[int, Finished] = dict(enumerate(takes))
        for event in self._submit(job, request).follow():
            if isinstance(event, Progress):
                variation = takes[event.variation].variation
                job.log.append(dataclasses.replace(event, variation=variation))
            elif isinstance(event, Finished) and not (event.stopped or event.fault):
                before = takes[event.variation]
                note = (
                    f"The take of seed {before.request.seed} was {_fault(before)}, so seed "
                    f"{event.request.seed} was drawn instead."
                )
                take = dataclasses.replace(
                    event, variation=before.variation, redrawn=True, notes=(*event.notes, note)
                )
                if _is_unusable(take):
                    left[event.variation] = take
                else:
                    del left[event.variation]
                    job.log.append(take)
        return list(left.values())

    def _submit(self, job: RelayedJob, request: GenerationRequest) -> Job:
        if request.keep:  # chosen here: all variations are made
            request = dataclasses.replace(request, keep=0)
        behind = self.backend.submit(request, job.client)
        job.set_behind(behind)
        return behind

    # As the backend

    def unload(self) -> None:
        """See `Backend.unload`; CLAP is unloaded too."""
        self.clap.unload()
        self.backend.unload()


def ranked(takes: list[Finished], matches: list[float] | None) -> list[Finished]:
    """Takes with their scores, the best first; those that failed or hold no music last.

    Args:
        takes: the variations of a job.
        matches: how well each fits the prompt, -1 to 1; None where faults alone rank. A score is
            this, or 1, less the penalty of the take's faults.
    """
    found = [defects.measure(_new_part(take)) for take in takes]
    scores = [
        (1.0 if matches is None else matches[i]) - each.penalty for i, each in enumerate(found)
    ]
    order = sorted(range(len(takes)), key=lambda i: (bool(takes[i].fault), -scores[i], i))
    result = []
    for place, i in enumerate(order, start=1):
        said = f"Number {place} of {len(takes)} by score, {scores[i]:.2f}"
        parts = [] if matches is None else [f"fit to the prompt {matches[i]:.2f}"]
        parts += [found[i].words] if found[i].words else []
        said += f" ({', '.join(parts)})." if parts else "."
        score = round(scores[i], 4)
        result.append(dataclasses.replace(takes[i], score=score, notes=(*takes[i].notes, said)))
    return result


def _new_part(take: Finished) -> Clip:
    """The take without its audio prompt."""
    start = round(take.prompt_s * take.clip.sampling_rate)
    return Clip(take.clip.samples[:, start:], take.clip.sampling_rate)


def _is_unusable(take: Finished) -> bool:
    """Whether a take of the bundled checkpoint is to be drawn again."""
    request = take.request
    if request.checkpoint not in BUNDLED or not request.do_sample or take.stopped or take.fault:
        return False
    return defects.measure(_new_part(take)).unusable


def _fault(take: Finished) -> str:
    found: Defects = defects.measure(_new_part(take))
    return "silent" if found.silent >= found.stuck else "stuck on one sound"
