"""The package as others install it: built, installed, started; and the oldest releases it names.

Both take minutes and need a package index: `python -m pytest -m long tests/test_package.py`.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import soundfile

import musicgen_ui
from tests.helpers.requirements import ROOT, requirements

TAKE = ("generate", "calm piano", "--duration", "1", "--device", "cpu", "--quiet", "-o", "out.wav")
OLDEST_TESTS = ("engine/test_delay_pattern.py", "engine/test_codec.py", "engine/test_scheduler.py")


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([*map(str, command)], check=True, cwd=cwd, timeout=1800)


def test_package_offers_its_names_without_loading_torch():
    code = (
        "import sys, musicgen_ui as m; m.GenerationRequest, m.Clip; print('torch' in sys.modules)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert told == "False\n"
    for name in musicgen_ui.__all__:
        assert getattr(musicgen_ui, name)
    with pytest.raises(AttributeError):
        musicgen_ui.Nothing  # noqa: B018


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_package_installed_elsewhere_makes_a_take(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"musicgen_ui/assets/bundled/model.safetensors", "musicgen_ui/assets/style.css"} < set(
        zipfile.ZipFile(wheel).namelist()
    )
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    run("venv/bin/pip", "install", "-q", wheel, cwd=tmp_path)
    run("venv/bin/musicgen-ui", *TAKE, cwd=tmp_path)
    assert soundfile.info(tmp_path / "out.wav").duration == 1.0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_oldest_releases_make_a_take_and_pass_tests(tmp_path: Path) -> None:
    """The lowest release of each line of requirements.txt, all together."""
    python = tmp_path / "venv" / "bin" / "python"
    run("uv", "venv", "-q", "-p", sys.executable, "venv", cwd=tmp_path)
    install = ("uv", "pip", "install", "-q", "--python", python, "--resolution", "lowest-direct")
    dev = requirements("requirements-dev.txt").values()
    tools = [str(each) for each in dev if each.name.startswith("pytest")]
    run(*install, "-r", ROOT / "requirements.txt", *tools, cwd=tmp_path)
    run(python, "-m", "musicgen_ui", *TAKE[:-1], tmp_path / "out.wav", cwd=ROOT)
    assert soundfile.info(tmp_path / "out.wav").duration == 1.0
    tests = [ROOT / "tests" / name for name in OLDEST_TESTS]
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT)
