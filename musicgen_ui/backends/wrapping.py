"""What a backend in front of another one hands on unchanged."""

from __future__ import annotations

from collections.abc import Callable

from musicgen_ui.engine.protocol import Backend, CheckpointInfo, Health, Preloads, Status


class WrappingBackend:
    """A `protocol.Backend` but for `submit`, which is what its subclasses are for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def checkpoints(self) -> list[str]:
        """See `Backend.checkpoints`."""
        return self.backend.checkpoints()

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """See `Backend.describe`."""
        return self.backend.describe(checkpoint, adapter)

    def status(self) -> Status:
        """See `Backend.status`."""
        return self.backend.status()

    def health(self) -> Health:
        """See `Backend.health`."""
        return self.backend.health()

    def preload(
        self, checkpoint: str = "auto", report: Callable[[str], object] | None = None
    ) -> None:
        """See `Preloads.preload`; a backend that cannot does nothing."""
        if isinstance(self.backend, Preloads):
            self.backend.preload(checkpoint, report)

    def unload(self) -> None:
        """See `Backend.unload`."""
        self.backend.unload()

    def close(self) -> None:
        """See `Backend.close`."""
        self.backend.close()
