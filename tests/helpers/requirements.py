"""The lists of requirements, parsed."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements(name: str) -> dict[str, Requirement]:
    lines = re.sub(r"#.*", "", (ROOT / name).read_text()).splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("-r")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in wanted}
