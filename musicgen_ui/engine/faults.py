"""Which fault an error is, and whom it concerns.

Memory that is used up costs one variation, which may be tried again beside fewer others. A device
that failed costs the model: nothing on it can be trusted, so it is loaded again. NaN or infinity,
or any other error, costs the variation in which it came up. The audio that was delivered before is
kept as its take.
"""

from __future__ import annotations

import asyncio
import re

from musicgen_ui.errors import Fault, RequestError

# What ends a thread or a task. Everything else ends what it came up in: also what is no Exception,
# as the panics of libraries in Rust (tokenizers, safetensors).
EXITS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
_DEVICE = re.compile(
    r"(CUDA|HIP|cuDNN|cuBLAS|NCCL) error|device-side assert|CU(DNN|BLAS)_STATUS|MPS backend"
)


class NotFiniteError(RequestError):
    """Logits or audio are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(Fault.NUMBERS.sentence)


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


def concerns_all(error: BaseException) -> bool:
    """Whether `error` concerns every job: the device failed, or the thread is to end."""
    return isinstance(error, EXITS) or of_the_device(error)


def fault_of(error: BaseException) -> Fault:
    """Which fault `error` is."""
    if isinstance(error, NotFiniteError):
        return Fault.NUMBERS
    if out_of_memory(error):
        return Fault.MEMORY
    return Fault.DEVICE if of_the_device(error) else Fault.OTHER


def error_of(fault: Fault, cause: BaseException | None = None) -> RequestError:
    """A fault as an error with its sentence."""
    error = RequestError(fault.sentence)
    error.__cause__ = cause
    return error


def sentence(error: BaseException) -> str:
    """What the user reads about `error`."""
    return str(error) if isinstance(error, RequestError) else fault_of(error).sentence


def for_caller(error: BaseException) -> Exception:
    """The error as its caller gets it: with a sentence, or a bug as it is."""
    fault = fault_of(error)
    if isinstance(error, RequestError) or (fault is Fault.OTHER and isinstance(error, Exception)):
        return error
    return error_of(fault, error)
