"""The player's scripts: their types, their length, and that a page gets all of one version."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from musicgen_ui.ui import player

MODULES = sorted(player.SCRIPTS.glob("*.js"))
LONGEST = 400  # lines


@pytest.mark.skipif(
    not shutil.which("tsc"), reason="needs TypeScript: npm install --global typescript@5.9.3"
)
def test_scripts_have_the_types_that_they_say() -> None:
    options = "--noEmit --allowJs --checkJs --strict --module es2022 --target es2022"
    command = ["tsc", *options.split(), "--lib", "es2022,dom,dom.iterable"]
    files = [str(path) for path in (*MODULES, player.SCRIPTS / "globals.d.ts")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_scripts_are_short_and_import_what_is_there(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert text.startswith("// @ts-check") and text.count("\n") <= LONGEST
    imported = re.findall(r"from '([^']+)'", text) + re.findall(r"new URL\('([^']+)'", text)
    assert all((player.SCRIPTS / path).exists() for path in imported)
