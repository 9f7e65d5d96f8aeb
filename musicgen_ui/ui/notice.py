"""The page's notice: a message that stays in view, wherever the page stands, until it is closed.

For what concerns no field alone, or one in a fold that is closed: a field's own mistakes are said
beside it. `assets/page.js` shows a message of the server, and those of the browser itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from musicgen_ui.files import ASSETS

# Never re-rendered, so the script may write into it: nothing here depends on the value.
SKELETON = """
<div class="notice" hidden>
  <div class="notice-words" role="status" aria-live="polite"></div>
  <button type="button" class="notice-close" aria-label="Close this message">✕</button>
</div>
"""


def component() -> gr.HTML:
    """The component. Its value is a message of `notice`."""
    return gr.HTML(
        value=None,
        html_template=SKELETON,
        js_on_load=(ASSETS / "page.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="notice",
    )


def notice(text: str, items: Sequence[str] = (), wrong: bool = False) -> dict[str, Any]:
    """A message: a sentence, and others below it; `wrong` where something could not be done."""
    return {"text": text, "items": list(items), "wrong": wrong}
