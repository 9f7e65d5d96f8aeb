"""The house's rules: which room imports what, how long files are, what lies at the top."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.requirements import ROOT, requirements

PACKAGE = sorted((ROOT / "musicgen_ui").rglob("*.py"))
TORCH = ("engine", "checkpoints", "backends", "benchmark", "finetune")
GRADIO = ("ui", "server")
# Each package may import itself and what stands after it.
ORDER = (
    *("__main__", "server", "cli", "benchmark", "ui", "finetune", "backends", "checkpoints"),
    *("library", "library_index", "remote_folder", "retake", "takes", "sidecar"),
    *("engine", "request", "take_settings", "coercion", "steering", "audio", "environment"),
    *("errors", "files", "heap"),
)
MODULES = {
    ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in PACKAGE
}
# Imports that still point up; none may join them.
POINTING_UP: set[tuple[str, str]] = set()
TOP = {
    *("app.py", "requirements.txt", "requirements-dev.txt", "requirements-mcp.txt"),
    "requirements-ray.txt",
    "pre-requirements.txt",
    *(
        "packages.txt",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "docs",
        "musicgen_ui",
        "tests",
        "assets",
    ),
    "training",
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines
KERNELS = ("engine.cpu", "engine.gpu")  # neither numba nor Triton has types
MOST_ANY = 30  # in all other modules, where a library has no types


def module_of(file: Path) -> str:
    """ "musicgen_ui.engine.scheduler" for its file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(file: Path) -> set[str]:
    """The modules that a file imports anywhere, relative ones aside."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= inner if len(inner) == len(node.names) else {node.module, *inner}
    return found


def third_party(folders: list[str]) -> set[str]:
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    own = {"musicgen_ui", "training", "tests"} | {f.stem for f in files}
    tops = {name.partition(".")[0] for file in files for name in imports(file)}
    return (
        tops - own - set(sys.stdlib_module_names) - {"spaces", "mcp", "moto", "ray", "triton"}
    )  # elsewhere


def loaded_by(module: str) -> set[str]:
    """The top-level modules that importing `module` loads in a fresh process."""
    code = f"import sys, {module}; print(*{{n.partition('.')[0] for n in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def package(module: str) -> str:
    """The first name under `musicgen_ui`."""
    return module.removeprefix("musicgen_ui.").partition(".")[0]


def short(file: Path) -> str:
    return module_of(file).removeprefix("musicgen_ui.")


def test_gradio_is_imported_in_the_web_packages_alone():
    users = {module_of(f) for f in PACKAGE if "gradio" in {n.split(".")[0] for n in imports(f)}}
    assert users and {package(user) for user in users} <= set(GRADIO)


def test_torch_is_imported_where_models_are_alone():
    heavy = {"torch", "transformers"}
    users = {module_of(f) for f in PACKAGE if heavy & {n.split(".")[0] for n in imports(f)}}
    assert {package(user) for user in users} <= set(TORCH)
    assert "musicgen_ui.engine.protocol" not in users


def test_imports_point_down_and_never_round():
    graph = {
        module_of(file): {name for name in imports(file) if name.startswith("musicgen_ui.")}
        for file in PACKAGE
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    up = {
        (module.removeprefix("musicgen_ui."), need.removeprefix("musicgen_ui."))
        for module, needs in graph.items()
        for need in needs
        if module != "musicgen_ui"  # its public names are imported when they are asked for
        and ORDER.index(package(need)) < ORDER.index(package(module))
    }
    assert up == POINTING_UP


def test_the_page_and_the_server_load_without_torch():
    loaded = loaded_by("musicgen_ui.ui.page, musicgen_ui.server.app")
    assert "gradio" in loaded and not {"torch", "transformers"} & loaded


def test_the_bench_imports_nothing_of_the_page():
    todo, seen = ["musicgen_ui.benchmark.run"], set()
    files = {module_of(file): file for file in PACKAGE}
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += imports(files[module]) & files.keys()
    assert len(seen) > 50 and not {package(module) for module in seen} & set(GRADIO)


def test_a_request_needs_numpy_and_audio_libraries_alone():
    loaded = loaded_by("musicgen_ui.request") - loaded_by("numpy, soundfile, soxr")
    assert loaded - set(sys.stdlib_module_names) == {"musicgen_ui"}


@pytest.mark.parametrize("file", PACKAGE, ids=short)
def test_files_and_functions_are_short_and_finished(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if "triton.jit" in map(ast.unparse, node.decorator_list):
                continue  # a kernel's arguments, a line each, are half of it
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_any_stands_only_where_a_library_has_no_types():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in PACKAGE
        if not short(file).startswith(KERNELS)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id == "Any")
        or (isinstance(node, ast.Attribute) and node.attr == "Any")
    ]
    assert len(found) <= MOST_ANY, found


def test_the_top_holds_what_the_house_says():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - ignored <= TOP


def test_requirements_name_what_is_imported_and_nothing_else():
    dists = importlib.metadata.packages_distributions()
    needed = {dists[name][0].lower().replace("_", "-") for name in third_party(["musicgen_ui"])}
    assert needed == set(requirements("requirements.txt"))


def test_the_tests_and_the_training_find_what_they_import():
    dists = importlib.metadata.packages_distributions()
    tops = third_party(["tests", "training"])
    needed = {dists.get(name, [name])[0].lower().replace("_", "-") for name in tops}
    files = ("requirements.txt", "requirements-dev.txt", "training/requirements.txt")
    listed = {name: wanted for file in files for name, wanted in requirements(file).items()}
    of_the_listed = {
        Requirement(line).name.lower().replace("_", "-")
        for name in listed
        for line in importlib.metadata.requires(name) or ()
        if "extra ==" not in line
    }
    assert needed <= set(listed) | of_the_listed


def test_the_installed_releases_are_within_the_requirements():
    for name, wanted in requirements("requirements.txt").items():
        assert wanted.specifier.contains(importlib.metadata.version(name)), name
