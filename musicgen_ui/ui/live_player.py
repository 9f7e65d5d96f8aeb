"""The live player: music in the browser while it is being made, without loss and without ffmpeg.

The server sends small messages; `assets/live_player.js` decodes and schedules them on a Web Audio
clock. A message carries the last three chunks, because the browser may merge updates: one that
was missed comes again with the next. Samples travel as interleaved 16-bit PCM in base64. The
script decides when to start: at once when the music is made faster than it plays, else as soon
as the buffer covers what the server will fall behind.
"""

from __future__ import annotations

import base64
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.files import ASSETS

RESENT = 3  # chunks in a message: as many as one update may swallow
IDLE = "Press Generate: the music plays here while it is being made."

# Never re-rendered, so the script may write into it: nothing here depends on the value.
SKELETON = f"""
<div class="live" data-stage="idle">
  <div class="live-head"><span class="live-dot" aria-hidden="true"></span>
    <span class="live-text">{IDLE}</span></div>
  <div class="live-bar" role="progressbar" aria-label="Composed"
    aria-valuemin="0" aria-valuemax="100" aria-valuenow="0">
    <i class="live-made"></i><i class="live-heard"></i></div>
  <div class="live-foot">
    <button type="button" class="live-mute" aria-pressed="false" aria-label="Mute">
      <svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true" fill="none"
        stroke="currentColor" stroke-width="1.8" stroke-linecap="round">
        <path d="M4 9v6h4l5 4V5L8 9z" fill="currentColor" stroke="none"/>
        <path class="live-waves" d="M16 8.5a5 5 0 0 1 0 7M18.5 6a8.5 8.5 0 0 1 0 12"/>
      </svg></button>
    <input type="range" class="live-volume" min="0" max="1" step="0.01" value="0.9"
      aria-label="Volume of the live music">
    <span class="live-meter" aria-hidden="true"><i></i></span>
    <span class="live-clock"></span>
  </div>
  <span class="sr-only live-said" role="status" aria-live="polite"></span>
</div>
"""


def live_player() -> gr.HTML:
    """The component. Its value is a message of `LiveStream`; None leaves it idle."""
    return gr.HTML(
        value=None,
        html_template=SKELETON,
        js_on_load=(ASSETS / "live_player.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="live",
        render=False,  # `page` places it
    )


@dataclass
class LiveStream:
    """One take's messages to the live player."""

    total_s: float  # seconds of new music that will come
    take: str = field(default_factory=lambda: secrets.token_hex(4))
    _recent: deque[list[Any]] = field(default_factory=lambda: deque(maxlen=RESENT))
    _count: int = 0
    _format: dict[str, int] = field(default_factory=dict)

    def add(self, clip: Clip) -> None:
        """Appends a chunk."""
        self._format = {"rate": clip.sampling_rate, "channels": clip.channels}
        self._recent.append([self._count, pcm16(clip)])
        self._count += 1

    def message(self, stage: str, text: str, done_s: float = 0.0, speed: float = 0.0) -> dict:
        """What the player should show and play now. A stage other than the first three ends it."""
        return {
            "take": self.take,
            "stage": stage,
            "text": text,
            "done_s": round(done_s, 2),
            "total_s": self.total_s,
            "speed": round(speed, 3),
            "last": stage not in ("waiting", "loading", "composing"),
            "chunks": list(self._recent),
            **self._format,
        }


def pcm16(clip: Clip) -> str:
    """Samples as base64 of little-endian int16, interleaved; beyond ±1 they are clipped."""
    scaled = np.rint(np.clip(np.nan_to_num(clip.samples), -1, 1) * 32767)
    return base64.b64encode(scaled.astype("<i2").T.tobytes()).decode("ascii")
