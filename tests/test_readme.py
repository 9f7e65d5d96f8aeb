"""README and docs say what is so: commands, tables, examples, file tree and Space card."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from packaging.specifiers import SpecifierSet
from safetensors.torch import save_file

from musicgen_ui import __main__ as cli
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers import generated_tables as readme
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port
from tests.helpers.requirements import requirements

ROOT = Path(__file__).parents[1]
PAGES = {page: page.read_text(encoding="utf-8") for page in readme.PAGES}
README = PAGES[ROOT / "README.md"]
TEXT = "".join(sorted(PAGES.values(), key=lambda text: text != README))
CARD = yaml.safe_load(README.split("---\n")[1])


OLDEST, NEWEST = map(int, re.search(r"Python 3\.(\d+) to 3\.(\d+)", TEXT).groups())
PYTHONS = [f"3.{minor}" for minor in range(OLDEST, NEWEST + 1)]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", readme.TABLES)
def test_every_table_is_what_the_code_says(name):
    tables = {found[2]: found[3] for found in readme.TABLE.finditer(TEXT)}
    assert tables[name] == readme.TABLES[name](), "run python -m tests.helpers.generated_tables"


def test_the_first_commands_are_one_line_each_and_ci_runs_the_second():
    start, test = (block.strip() for block in blocks("bash")[:2])
    install = "python3 -m venv .venv && .venv/bin/pip install -r "
    run = " && .venv/bin/python "
    assert start == install + "requirements.txt" + run + "app.py"
    assert test == install + "requirements-dev.txt" + run + "-m pytest -n 2"
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 -E '(.*)' README.md", script)[1]
    found = ["grep", "-m", "1", "-E", pattern, "README.md"]
    assert subprocess.check_output(found, text=True, cwd=ROOT).strip() == test
    assert 'eval "$tests"' in script and "pytest" not in script.replace(pattern, "")


def test_the_card_is_a_spaces():
    assert CARD["sdk"] == "gradio" and CARD["app_file"] == "app.py"
    assert CARD["sdk_version"] == importlib.metadata.version("gradio")
    assert ".".join(CARD["python_version"].split(".")[:2]) in PYTHONS
    assert len(CARD["short_description"]) <= 60
    wanted = "title emoji colorFrom colorTo license models tags preload_from_hub suggested_hardware"
    assert all(CARD[key] for key in wanted.split())


def test_what_is_required_runs_on_every_python_that_is_named():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert settings["tool"]["ruff"]["target-version"] == PYTHONS[0].replace("3.", "py3")
    for name in requirements("requirements.txt"):
        needs = SpecifierSet(importlib.metadata.metadata(name).get("Requires-Python") or "")
        assert all(needs.contains(f"{python}.99") for python in PYTHONS), name


def test_the_files_it_names_are_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).is_file(), (page.name, target)


def test_the_readme_is_one_screen_and_names_every_page():
    assert len(README.encode()) <= 8_000
    named = set(re.findall(r"\]\((docs/[^)]+)\)", README))
    assert named == {page.relative_to(ROOT).as_posix() for page in readme.PAGES[1:]}


EXAMPLES = [
    shlex.split(line)[3:]
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("python -m musicgen_ui generate") and "--batch" not in line
]


def test_the_command_lines_examples_run(tmp_path, monkeypatch, tiny_melody, tiny_style):
    """Shortened, in order: the second one continues the first one's file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "assets" / "bundled", "my-finetune")
    write_lora(Path("my-lora"))
    soundfile.write("my-tune.wav", np.sin(np.arange(32_000) / 9) / 5, 16_000)
    soundfile.write("my-song.wav", np.sin(np.arange(256_000) / 9) / 5, 16_000)
    Path("changes.json").write_text('[[0.2, {"top_k": 5}]]')
    for arguments in EXAMPLES:
        tiny = {"melody": str(tiny_melody), "style": str(tiny_style)}
        arguments = [tiny.get(word, word) for word in arguments]
        short = ["--duration", "0.5", "--device", "cpu", "--precision", "float32", "--quiet"]
        short += ["--sections", '[[0, "a"], [0.2, "b"]]'] if "--sections" in arguments else []
        if "--loop-bars" in arguments:
            short += ["--tempo", "300", "--loop-bars", "1", "--duration", "0.9"]
        assert cli.main([*arguments, *short]) == 0, arguments
    made = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.*")}
    made = {name for name in made if not name.startswith("my-")}
    assert {
        "out.wav",
        "longer.flac",
        "long.flac",
        "changing.wav",
        "follows.wav",
        "styled.wav",
        "techno-1.wav",
        "techno-2.wav",
        "techno-3.wav",
        "loop.wav",
        "ending.opus",
        "steered.wav",
    } < made
    assert len(made) == 21  # and changes.json; a WAV, a FLAC and the codes under takes/
    assert soundfile.info("longer.flac").duration == 1.0


def write_lora(folder: Path) -> None:
    """An adapter of one matrix of the bundled checkpoint, as peft lays it out."""
    base = ROOT / "assets" / "bundled"
    hidden = json.loads((base / "config.json").read_text())["decoder"]["hidden_size"]
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.decoder.model.decoder.layers.0.self_attn.q_proj.lora_"
    weights = {name + "A.weight": torch.ones(2, hidden), name + "B.weight": torch.ones(hidden, 2)}
    save_file(weights, folder / "adapter_model.safetensors")


def test_every_command_it_names_is_one():
    assert set(re.findall(r"python -m musicgen_ui (\w+)", TEXT)) == set(cli.COMMANDS)


def test_the_apis_lines_run_against_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, while_it_is_made = blocks("python")[:2]
    assert len([line for line in code.splitlines() if line]) <= 5
    port = free_port()
    demo, temporary = launch(Settings(port=port), FakeBackend())
    try:
        seen: dict = {}
        exec(code.replace("http://127.0.0.1:7860", f"http://127.0.0.1:{port}"), seen)
        assert [Path(file).suffix for file in seen["files"]] == [".wav", ".flac"]
        assert seen["settings"]["seed"] == 7 and soundfile.info(seen["files"][0]).duration == 5
        exec(while_it_is_made, seen)
        assert soundfile.info("piano.opus").duration == 30
    finally:
        close(demo, temporary)


def test_the_lines_of_a_script_make_a_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[2]
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code.replace("duration_s=5", "duration_s=1"), {})
    assert soundfile.info("piano.wav").duration == 1
