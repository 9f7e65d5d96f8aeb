"""Presets and recent prompts: what the browser keeps, and what each button answers."""

from __future__ import annotations

from typing import Any

import pytest

from musicgen_ui.request import FIELDS
from musicgen_ui.ui import presets
from musicgen_ui.ui.presets import Presets
from musicgen_ui.ui.request_form import SETTINGS, Restoring

panel = Presets(Restoring())


def form(**changes: Any) -> list[Any]:
    """The form's values, as the page sends them."""
    return list(({name: FIELDS[name].default for name in SETTINGS} | changes).values())


def saved(*names: str, **changes: Any) -> list[presets.Preset]:
    kept: list[presets.Preset] = []
    for name in names:
        kept = panel.save(kept, name, *form(**changes))["presets"]
    return kept


def test_preset_brings_the_settings_back_and_says_what_changes() -> None:
    sections = [["0:04", "drums"]]
    kept = saved("  my   lo-fi ", prompt="lo-fi", temperature=0.7, sections=sections)
    assert [each["name"] for each in kept] == ["my lo-fi"]
    used = panel.use(kept, "my lo-fi", *form(prompt="rock"))
    assert (used["prompt"], used["temperature"]) == ("lo-fi", 0.7)
    assert used["sections"] == [[4.0, "drums"]]
    said = used["notice"]
    assert "Prompt: “lo-fi” instead of “rock”." in said["items"] and said["undo"] == "settings"


def test_presets_are_replaced_renamed_deleted_and_brought_back() -> None:
    kept = saved("b", "A")
    assert [each["name"] for each in kept] == ["A", "b"]
    replaced = panel.save(kept, "b", *form(top_k=9))
    kept = replaced["presets"]
    assert "replaced" in replaced["notice"]["text"] and kept[1]["settings"]["top_k"] == 9
    renamed = panel.rename(kept, "b", "c")
    assert renamed["preset"]["choices"] == ["A", "c"]
    deleted = panel.delete(renamed["presets"], "c")
    assert len(deleted["presets"]) == 1 and deleted["notice"]["undo"] == "preset"
    back = panel.undelete(deleted["presets"], deleted["deleted"])
    assert back["presets"] == renamed["presets"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda kept: panel.save(kept, " ", *form()), "Write a name"),
        (lambda kept: panel.save(kept, "new", *form(temperature=99)), "Temperature must be"),
        (lambda kept: panel.use(kept, None, *form()), "Choose a preset"),
        (lambda kept: panel.delete(kept, "gone"), "Choose a preset"),
        (lambda kept: panel.rename(kept, "a", "b"), "There is a preset"),
        (lambda kept: panel.save(kept * 50, "new", *form()), "There are 50"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(answer: Any, said: str) -> None:
    kept = saved("a", "b")
    told = answer(kept)
    assert set(told) == {"notice"} and told["notice"]["wrong"] and said in told["notice"]["text"]


def test_recent_prompts_are_the_last_twenty_each_once() -> None:
    kept: list[str] = []
    for number in range(25):
        kept = panel.remember(kept, f" take {number} ")["prompts"]
    assert len(kept) == 20 and kept[0] == "take 24"
    kept = panel.remember(kept, "take 10")["prompts"]
    assert kept[:2] == ["take 10", "take 24"] and len(kept) == 20
    assert panel.remember(kept, "take 10") == panel.remember(kept, " ") == {}
    assert panel.forget()["prompts"] == []


def test_what_another_version_kept_is_left_out() -> None:
    odd = [{"name": "a"}, "b", None, {"name": "c", "settings": {"prompt": "x", "later": 1}}]
    shown = panel.load(odd, {"not": "a list"})
    assert shown["preset"]["choices"] == ["c"] and shown["recent"]["choices"] == []
    assert panel.use(odd, "c", *form())["prompt"] == "x"
