"""Gradio imported in half the time, by an internal of it; called before the first import.

Each time it is imported, Gradio parses the source of its components and writes a .pyi beside each
for editors, in its own installation: 1.0 of the 2.3 s that the import took (2 cores, Gradio 6.31).
There is no setting for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

MODULE, WRITER = "gradio.component_meta", "create_or_modify_pyi"


def skip_stubs() -> None:
    """Keeps Gradio from writing .pyi files; without effect where it has been imported."""
    if MODULE not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.origin:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, WRITER):
            setattr(module, WRITER, _write_nothing)


def _write_nothing(*_: object) -> None:
    pass
