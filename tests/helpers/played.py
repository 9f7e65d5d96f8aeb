"""What the player's audio thread played, sample by sample, in any browser."""

from __future__ import annotations

import base64
import json

import numpy as np

# Put behind the audio thread's module: what it plays, from the source's own samples.
_RECORDER = """
const consumed = new Int16Array(1 << 22);
let kept = 0;
const render = Track.prototype.render;
Track.prototype.render = function (out, level, channel, first, at, count) {
  const ratio = this.rate / sampleRate;
  for (let i = Math.ceil(first * ratio); channel === 0 && i < (first + count) * ratio; i++) {
    const block = this.blocks.get(Math.floor(i / BLOCK));
    if (i < this.received) consumed[kept++] = block[(i % BLOCK) * this.channels];
  }
  return render.call(this, out, level, channel, first, at, count);
};
const receive = Player.prototype.receive;
Player.prototype.receive = function (message) {
  if (message.op === 'consumed')
    this.port.postMessage({ consumed: consumed.slice(0, kept) });
  else receive.call(this, message);
};
"""
# Run before the first sound, which loads the audio thread's module.
RECORD = """{
  const add = AudioWorklet.prototype.addModule;
  AudioWorklet.prototype.addModule = async function (url) {
    const text = await (await fetch(url)).text();
    const module = text.replace('registerProcessor(', RECORDER + 'registerProcessor(');
    const blob = new Blob([module], { type: 'text/javascript' });
    return add.call(this, URL.createObjectURL(blob));
  };
}""".replace("RECORDER", json.dumps(_RECORDER))
PLAYED = """async () => {
  const { port } = musicgenPlayer.sound.node;
  const answer = new Promise((done) => {
    setTimeout(() => done(new Int16Array(0)), 10_000);
    port.addEventListener('message', ({ data }) => data.consumed && done(data.consumed));
  });
  port.postMessage({ op: 'consumed' });
  const bytes = new Uint8Array((await answer).buffer);
  let text = '';
  for (let i = 0; i < bytes.length; i += 4096)
    text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return btoa(text);
}"""


def samples(text: str) -> np.ndarray:
    """int16 samples of the left channel, from what `PLAYED` gives."""
    return np.frombuffer(base64.b64decode(text), "<i2")
