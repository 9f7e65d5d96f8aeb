"""The player's scripts: their types, their length, and that a page gets all of one version."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from musicgen_ui.audio import spectrogram
from musicgen_ui.audio.clip import Clip
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


def run(tmp_path: Path, script: str, *names: str) -> Any:
    """What a script prints as JSON that imports these modules."""
    if not shutil.which("node"):
        pytest.skip("needs Node.js")
    for name in names:  # as modules, whatever Node takes a .js for
        text = (player.SCRIPTS / f"{name}.js").read_text(encoding="utf-8")
        (tmp_path / f"{name}.mjs").write_text(text.replace(".js'", ".mjs'"), encoding="utf-8")
    (tmp_path / "main.mjs").write_text(script, encoding="utf-8")
    command = ["node", str(tmp_path / "main.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ANALYSE = """
import { readFileSync } from 'node:fs';
import { Analyser, palette } from './spectrum.mjs';
const pcm = new Int16Array(readFileSync(new URL('clip.pcm', import.meta.url)).buffer.slice(0));
const [rate, channels] = [RATE, CHANNELS];
const analyser = new Analyser(rate, channels, pcm.length / channels);
const columns = [];
for (let at = 0; at < pcm.length; at += 997 * channels) { // as it arrives
  analyser.add(pcm.subarray(at, at + 997 * channels));
  for (let levels; (levels = analyser.next());) columns.push([...levels]);
}
console.log(JSON.stringify({ columns, palette: [...palette()] }));
"""


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"),
    [(16_000, 1, 2.0), (8_000, 1, 190.0), (8_000, 2, 3.0)],
)
def test_spectrogram_that_arrives_is_the_servers(
    tmp_path: Path, rate: int, channels: int, seconds: float
) -> None:
    """The other one has to fit into its place unseen; the long clip leaves samples out."""
    t = np.arange(round(seconds * rate)) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (100 + 300 * t / seconds * 4) * t)
    noise = np.random.default_rng(0).normal(0, 0.01, (channels, len(t)))
    pcm = np.rint((noise + np.stack([sweep, sweep[::-1]][:channels])) * 32767).astype("<i2")
    (tmp_path / "clip.pcm").write_bytes(pcm.T.tobytes())
    script = ANALYSE.replace("RATE", str(rate)).replace("CHANNELS", str(channels))
    answer = run(tmp_path, script, "spectrum")
    clip = Clip(pcm.astype(np.float32) / 32768, rate)
    level_db = spectrogram.mel_db(clip)
    arrived = np.array(answer["columns"]).reshape(-1, channels, spectrogram.BANDS)
    arrived = arrived.transpose(1, 2, 0)
    count = arrived.shape[2]
    assert level_db.shape[2] - count <= 3  # the last ones end after the clip
    assert np.abs(arrived - level_db[:, :, :count]).max() < 0.1
    picture = matplotlib.image.imread(io.BytesIO(spectrogram.png(clip)[0]), format="png")
    rows = np.concatenate(arrived[:, ::-1])
    index = np.clip((rows / spectrogram.RANGE_DB + 1) * 256, 0, 255).astype(int)
    colours = np.array(answer["palette"]).reshape(256, 4)[index]
    assert np.abs(colours - 255 * picture[:, :count]).max() < 6


def test_pad_mixes_by_nearness_in_whole_percent(tmp_path: Path) -> None:
    points = [[0, 0], [1, 0], [0.5, 0.5], [0.5, 0], [1, 1], [0.3, 0.9], [-3, 9]]
    script = f"""
      import {{ mix, place, percent }} from './pad.mjs';
      const all = [2, 3, 4].map((count) => {json.dumps(points)}.map((point) => {{
        const weights = mix(count, point);
        const again = mix(count, place(weights));
        return {{ count, point, weights, percent: percent(weights), again }};
      }}));
      console.log(JSON.stringify(all.flat()));"""
    found = {(each["count"], *each["point"]): each for each in run(tmp_path, script, "pad")}
    for each in found.values():
        assert sum(each["percent"]) == 100 and min(each["weights"]) >= 0
        assert each["again"] == pytest.approx(each["weights"])  # the point lies where it says
    assert found[4, 0.5, 0.5]["percent"] == [25, 25, 25, 25]
    assert found[4, 1, 1]["percent"] == [0, 0, 0, 100]
    assert found[3, 0.5, 0]["percent"] == [100, 0, 0] and found[3, 1, 1]["percent"] == [0, 0, 100]
    assert found[2, 0.3, 0.9]["percent"] == [70, 30]
