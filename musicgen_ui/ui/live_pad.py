"""Live mode's pad, `assets/player/pad.js`: a point between the prompts is the weight of each."""

from __future__ import annotations

import gradio as gr

from musicgen_ui.steering import MAX_PROMPTS
from musicgen_ui.ui.player import VIEW

EVEN = [1 / MAX_PROMPTS] * MAX_PROMPTS
PAD_ON_LOAD = f"""
import({VIEW}.replace('view.js', 'pad.js')).then(({{ Pad }}) =>
  new Pad(element.querySelector('.pad'), (weights) => {{
    props.value = weights;
    trigger('input');
  }}));
"""
_CORNERS = '<div class="pad-corner" hidden><b dir="auto"></b><span></span></div>' * MAX_PROMPTS
PAD = f"""
<div class="pad">
  <div class="pad-field" role="slider" tabindex="0" aria-label="Mix of the prompts"
    aria-valuemin="0" aria-valuemax="100" aria-valuenow="0" aria-describedby="pad-help">
    <div class="pad-area"><svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">
      <polygon points=""/></svg><i class="pad-point"></i></div>
    {_CORNERS}
  </div>
  <p class="clip-line" id="pad-help">The nearer a prompt, the more of it. Drag, or use the arrow
    keys; 1 to 4 are the prompts alone, Home is all of them.</p>
</div>
"""


def pad() -> gr.HTML:
    """The pad, out of sight. Its value are the weights of all prompts, empty ones too."""
    return gr.HTML(
        value=EVEN,
        html_template=PAD,
        js_on_load=PAD_ON_LOAD,
        apply_default_css=False,
        visible=False,
        elem_id="live_pad",
        render=False,
    )


def weights_of(value: object) -> list[object]:
    """The weights in the pad's value; even ones where it is none."""
    return value if isinstance(value, list) else [*EVEN]
