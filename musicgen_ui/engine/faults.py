"""What can break while music is made, told apart, and what is said about it.

Three kinds are treated alike wherever they come up. Memory that is used up costs one job, which may
be tried again beside fewer others. A device that failed costs the model: nothing on it can be
trusted, so it is loaded again. Numbers that are no numbers, or anything else, cost the job that
they came up in. What was heard of a job before is kept as its take.
"""

from __future__ import annotations

import asyncio
import re

from musicgen_ui.errors import Fault, RequestError

MEMORY = Fault.MEMORY.sentence
DEVICE = Fault.DEVICE.sentence
WORKER = Fault.WORKER.sentence
LOST = Fault.DEVICE_LOST.sentence
NUMBERS = Fault.NUMBERS.sentence
OTHER = Fault.OTHER.sentence
# What ends a thread or a task. Everything else ends what it came up in: also what is no Exception,
# as the panics of libraries in Rust (tokenizers, safetensors).
EXITS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
_DEVICE = re.compile(
    r"(CUDA|HIP|cuDNN|cuBLAS|NCCL) error|device-side assert|CU(DNN|BLAS)_STATUS|MPS backend"
)


class NotFiniteError(RequestError):
    """Logits or audio are no numbers."""

    def __init__(self) -> None:
        super().__init__(NUMBERS)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device's or the computer's memory is used up."""
    names = {kind.__name__ for kind in type(error).__mro__}
    said = str(error).lower()
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError)
        and any(
            words in said for words in ("out of memory", "can't allocate memory", "alloc_failed")
        )
    )


def of_the_device(error: BaseException) -> bool:
    """Whether `error` says that the device failed, so that whatever lies on it is lost.

    torch tells it as `AcceleratorError` since 2.8, and as `RuntimeError` in many words.
    """
    if out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return "AcceleratorError" in names or bool(_DEVICE.search(str(error)))


def of_everybody(error: BaseException) -> bool:
    """Whether `error` concerns every job: the device failed, or the thread is to end."""
    return isinstance(error, EXITS) or of_the_device(error)


def sentence(error: BaseException) -> str:
    """What the user reads about `error`."""
    if isinstance(error, RequestError):
        return str(error)
    if out_of_memory(error):
        return MEMORY
    return DEVICE if of_the_device(error) else OTHER


def told(error: BaseException) -> Exception:
    """The error as its caller should hear it: what is nobody's fault but a bug's stays itself."""
    said = sentence(error)
    if isinstance(error, RequestError) or (said == OTHER and isinstance(error, Exception)):
        return error
    told = RequestError(said)
    told.__cause__ = error
    return told
