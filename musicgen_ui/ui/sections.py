"""The sections of a piece as rows: a time, words, and a button that removes them.

The component's value is the request's own list of rows, [[start, words], …]. A start is a number of
seconds, or what was typed: the request reads "0:20" as well.
"""

from __future__ import annotations

import gradio as gr

from musicgen_ui.request import FIELDS
from musicgen_ui.ui.player import address

LABEL = FIELDS["sections"].metadata["label"]
# Never rendered again, so that the script may write into it: nothing here depends on the value.
ROWS = f"""
<div class="sections" role="group" aria-label="{LABEL}">
  <div class="section-heads" aria-hidden="true"><span>From</span><span>these words join</span></div>
  <ol class="section-rows"></ol>
  <button type="button" class="section-add">Add a section</button>
  <span class="sr-only section-said" role="status"></span>
</div>
"""
ON_LOAD = f"""
import({address("sections.js")}).then(({{ SectionRows }}) => {{
  const most = {FIELDS["sections"].metadata["max"]};
  const changed = (rows) => {{ props.value = rows; }};
  const rows = new SectionRows(element.querySelector('.sections'), most, changed);
  const show = () => rows.show(props.value);
  watch('value', show);
  show();
}});
"""


def rows() -> gr.HTML:
    """The component of `GenerationRequest.sections`."""
    return gr.HTML(
        value=[],
        html_template=ROWS,
        js_on_load=ON_LOAD,
        label=LABEL,
        apply_default_css=False,
        elem_id="sections",
        render=False,
    )
