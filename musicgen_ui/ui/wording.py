"""What users read of progress, status and failures: values become sentences here."""

from __future__ import annotations

import logging

from musicgen_ui.backends.admission import Saved, about_time
from musicgen_ui.backends.job_log import Outcome
from musicgen_ui.checkpoints.memory import size_in_words
from musicgen_ui.engine.protocol import Progress, Stage, Status
from musicgen_ui.errors import RequestError

log = logging.getLogger(__name__)

SORRY = "Something went wrong on the server; your settings are kept. Try again in a moment."


def error_text(error: Exception) -> str:
    """What the user reads about an error; a bug is logged."""
    if isinstance(error, RequestError):
        return str(error)
    log.error("A job failed", exc_info=error)
    return SORRY


def progress_text(progress: Progress) -> str:
    """One line: where a job stands."""
    if progress.stage is Stage.WAITING:
        if not progress.place:
            return "Waiting"
        place = f" at place {progress.place}" if progress.place > 1 else ": you are next"
        return f"Waiting{place}" + (f", {about_time(progress.wait_s)}" if progress.wait_s else "")
    if progress.stage is Stage.LOADING:
        return "Loading the model" + (f": {progress.note}" if progress.note else " …")
    text = f"Composing {progress.done_s:.1f} of {progress.total_s:.1f} s"
    if not progress.speed or not progress.done_s:
        return text
    left_s = (progress.total_s - progress.done_s) / progress.speed
    return f"{text} at {progress.speed:.1f}× real time, {about_time(left_s)} left"


def status_text(status: Status) -> str:
    """One line: what is loaded, where and how large: "bundled · CPU (…) · int8 · 34 MB"."""
    if status.starting:
        return "starting …"
    if not status.device:
        return "engine failed, see the log"
    parts = list(status.loading)
    if status.loaded or not parts:
        parts.append(" + ".join(status.loaded) or "nothing loaded")
    reason = f" ({status.reason})" if status.reason else ""
    parts += [status.device, status.precision + reason]
    if status.loaded and status.nbytes:
        parts.append(size_in_words(status.nbytes))
    return " · ".join(parts)


def ending(takes: list[Saved]) -> tuple[Outcome, str]:
    """How a job ended that did not fail, and what the player says of it."""
    if lost := next((take.error for take in takes if take.error), None):
        return Outcome.FINISHED, str(lost)
    saved = [take for take in takes if take.take]
    if not saved or saved[0].take is None:
        return Outcome.STOPPED, "Stopped before the first sound: there is nothing to keep"
    made_s = saved[0].take.settings["made_s"]
    if fault := next((take.fault for take in saved if take.fault), ""):
        return Outcome.STOPPED, f"Broken off, what was made is kept. {fault}"
    if saved[0].stopped:
        return Outcome.STOPPED, f"Stopped: {made_s:.1f} s are kept as a take"
    count = f"{len(saved)} takes of " if len(saved) > 1 else ""
    return Outcome.FINISHED, f"Finished: {count}{made_s:.1f} s at {saved[0].speed:.1f}× real time"
