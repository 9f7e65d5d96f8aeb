"""The house's rules: which room imports what, how long files are, what lies at the top."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "musicgen_ui").rglob("*.py"))
TORCH_ROOMS = {"checkpoints", "convert", "manager", "bench", "contestants", "gauges"}
TORCH_ROOMS |= {"weights", "exported", "parts", "zero", "distance", "step_profile"}
TOP = {
    *("app.py", "requirements.txt", "requirements-dev.txt", "requirements-mcp.txt"),
    "pre-requirements.txt",
    *("packages.txt", "pyproject.toml", "README.md", "docs", "musicgen_ui", "tests", "assets"),
    "training",
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines


def module_of(file: Path) -> str:
    """ "musicgen_ui.engine.batch" for its file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, relative ones aside."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {module_of(f) for f in PACKAGE}
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in submodules else node.module


def third_party(folders: list[str]) -> set[str]:
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    own = {"musicgen_ui", "training"} | {f.stem for f in files}
    tops = {name.partition(".")[0] for file in files for name in imports(file)}
    return tops - own - set(sys.stdlib_module_names) - {"spaces", "mcp", "triton"}  # elsewhere


def requirements(name: str) -> dict[str, Requirement]:
    lines = re.sub(r"#.*", "", (ROOT / name).read_text()).splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("-r")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in wanted}


def loaded_by(module: str) -> set[str]:
    """The top-level modules that importing `module` loads in a fresh process."""
    code = f"import sys, {module}; print(*{{n.partition('.')[0] for n in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def room(file: Path) -> str:
    return module_of(file).removeprefix("musicgen_ui.")


def test_gradio_is_imported_in_ui_alone():
    users = {room(f) for f in PACKAGE if any(n.split(".")[0] == "gradio" for n in imports(f))}
    assert users and all(user.startswith("ui.") for user in users)


def test_torch_is_imported_where_models_are_alone():
    heavy = {"torch", "transformers"}
    users = {room(f) for f in PACKAGE if any(n.split(".")[0] in heavy for n in imports(f))}
    assert {user for user in users if not user.startswith("engine.")} <= TORCH_ROOMS
    assert "engine.events" not in users


def test_imports_point_down_and_never_round():
    graph = {
        module_of(file): {name for name in imports(file) if name.startswith("musicgen_ui.")}
        for file in PACKAGE
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    for module, needs in graph.items():
        inside = module.removeprefix("musicgen_ui.")
        above = {need for need in needs if need.startswith("musicgen_ui.ui")}
        assert inside.startswith(("ui", "__main__")) or not above, (module, above)
        if inside.startswith("ui.") and inside != "ui.server":
            engine = {n for n in needs if n.startswith(("musicgen_ui.engine", "musicgen_ui.man"))}
            assert engine <= {"musicgen_ui.engine.events"}, (module, engine)
        if inside.startswith("engine."):
            rooms = {n.removeprefix("musicgen_ui.").split(".")[0] for n in needs}
            assert rooms <= {"engine", "audio", "request"}, (module, rooms)


def test_the_page_loads_without_torch():
    assert not {"torch", "transformers"} & loaded_by("musicgen_ui.ui.page")


def test_the_bench_loads_without_gradio():
    assert "gradio" not in loaded_by("musicgen_ui.bench")


def test_a_request_needs_numpy_alone():
    loaded = loaded_by("musicgen_ui.request") - loaded_by("numpy")
    assert loaded - set(sys.stdlib_module_names) == {"musicgen_ui"}


@pytest.mark.parametrize("file", PACKAGE, ids=room)
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
