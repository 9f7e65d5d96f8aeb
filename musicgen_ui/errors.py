"""Errors for the user, and the faults that code compares."""

from __future__ import annotations

from enum import StrEnum


class RequestError(ValueError):
    """Something the user can correct. Its text is shown to the user and says what to do.

    `field` names the setting at fault, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Fault(StrEnum):
    """What failed while music was made. Code compares these; users read the `sentence`."""

    MEMORY = "memory"  # used up: costs one job
    NUMBERS = "numbers"  # NaN or infinity in logits or audio: costs one job
    DEVICE = "device"  # failed; the model is loaded again
    DEVICE_LOST = "device_lost"  # failed; only a restart of the app helps
    WORKER = "worker"  # the thread that makes music ended and was started again
    OTHER = "other"

    @property
    def sentence(self) -> str:
        """What the user reads about it."""
        return _SENTENCES[self]


_SENTENCES = {
    Fault.MEMORY: "The memory of this machine is full: try a shorter length, fewer variations or "
    "a smaller checkpoint.",
    Fault.NUMBERS: "The model's numbers overflowed, so it was ended before there was noise: try "
    "another seed, a lower guidance or another precision.",
    Fault.DEVICE: "The device failed while this was made, and the model is loaded again: try once "
    "more soon.",
    Fault.DEVICE_LOST: "The device of this server failed, so the app must be started again: try in "
    "a few minutes.",
    Fault.WORKER: "The server's engine failed while this was made, and was started again: try once "
    "more.",
    Fault.OTHER: "Something broke on the server while this was made: try once more.",
}
