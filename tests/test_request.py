import dataclasses
import json

import numpy as np
import pytest

from musicgen_ui import request as request_module
from musicgen_ui.audio.clip import Clip
from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS, MAX_SEED, GenerationRequest


def clip(seconds=1.0, rate=100):
    return Clip(np.zeros((1, round(seconds * rate)), np.float32), rate)


def ones(seconds):
    return Clip(np.ones((1, round(seconds * 100)), np.float32), 100)


def refusal(**settings):
    with pytest.raises(RequestError) as caught:
        GenerationRequest.parse(settings)
    return caught.value


def test_parse_takes_none_as_the_default():
    nothing = GenerationRequest.parse(dict.fromkeys(FIELDS))
    assert nothing == GenerationRequest()


def test_fields_have_label_help_and_limits():
    labels = [spec.metadata["label"] for spec in FIELDS.values()]
    assert len(set(labels)) == len(labels)
    for spec in FIELDS.values():
        assert spec.metadata["help"]
        if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
            assert spec.metadata["min"] <= spec.default <= spec.metadata["max"]


@pytest.mark.parametrize(
    ("settings", "field", "sentence"),
    [
        ({"style": ones(1.2)}, "style", "is 1.20 s long: choose one of at least 1.5 s"),
        ({"style": ones(2)}, "style_length_s", "3 s long and the style clip only 2.00 s"),
        ({"style_length_s": 5}, "style_length_s", "must be between 1.5 and 4.5 s"),
        ({"style": clip(9)}, "style_start_s", "is silent: let it start where there is music"),
        (
            {"style": ones(9), "style_start_s": 7},
            "style_start_s",
            "not within the style clip, which ends at 9.00 s: let it start at 6 s or earlier",
        ),
    ],
)
def test_parse_refuses_an_excerpt_that_cannot_be(settings, field, sentence):
    error = refusal(**settings)
    assert sentence in str(error) and error.field == field
    GenerationRequest.parse({"style": ones(9), "style_start_s": 6})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"duration_s": 0.2}, "Length must be between 0.5 and 300 s, not 0.2."),
        ({"duration_s": -3}, "Length must be between 0.5 and 300 s, not -3."),
        ({"duration_s": float("nan")}, "Length must be between 0.5 and 300 s, not nan."),
        ({"duration_s": 1e999}, "Length must be between 0.5 and 300 s, not inf."),
        ({"duration_s": "long"}, "Length must be a number, not “long”."),
        ({"seed": 1.5}, "Seed must be a whole number, not 1.5."),
        ({"seed": 2**40}, f"Seed must be between -1 and {MAX_SEED}, not 1099511627776."),
        ({"temperature": 0}, "Temperature must be between 0.01 and 5, not 0."),
        ({"top_k": []}, "Top-k must be a number, not “[]”."),
        ({"stereo": "maybe"}, "Stereo must be on or off, not “maybe”."),
        ({"stereo": np.array([0, 1])}, "Stereo must be on or off, not “array([0, 1])”."),
        ({"prompt": 3}, "Prompt must be text."),
        ({"prompt": "x" * 2001}, "Prompt has 2,001 characters: shorten it to 2,000."),
        ({"audio_prompt": "song.wav"}, "Audio prompt must be audio, or left empty."),
        ({"melody": clip()}, "The melody is silent: choose a clip with a tune in it."),
        ({"time_signature": "4"}, "Time signature must be like 4/4, 3/4 or 6/8, not “4”."),
        ({"melody": clip(0.25)}, "The melody is 0.25 s short: choose a clip of at least 0.5 s."),
    ],
)
def test_parse_names_the_setting_that_is_wrong(settings, sentence):
    error = refusal(**settings)
    assert str(error) == sentence
    assert error.field == next(iter(settings))


def test_parse_shortens_a_long_wrong_value():
    assert len(str(refusal(seed="x" * 10_000))) < 100


def test_parse_coerces_text_numbers_and_switches():
    typed = {"duration_s": "8", "seed": "7", "top_k": 50.0}
    switched = {"stereo": "on", "do_sample": 0, "normalize": np.True_}
    request = GenerationRequest.parse(typed | switched)
    assert (request.duration_s, request.seed, request.top_k) == (8.0, 7, 50)
    assert isinstance(request.top_k, int)
    assert (request.stereo, request.do_sample, request.normalize) == (True, False, True)


def test_parse_removes_unprintable_characters():
    assert GenerationRequest.parse({"prompt": " a\x00b\ud800\u202ec \n"}).prompt == "abc"
    assert GenerationRequest.parse({"checkpoint": "  "}).checkpoint == "auto"


@pytest.mark.parametrize(
    ("seconds", "context_s", "duration_s", "used"),
    [
        (42, 0, 15, 15),
        (42, 0, 20, 12),
        (42, 5, 20, 5),
        (3, 0, 20, 3),
        (3, 5, 20, 3),
        (42, 15, 20, 15),
    ],
)
def test_context_used_is_at_most_what_fits(seconds, context_s, duration_s, used):
    request = GenerationRequest(
        audio_prompt=clip(seconds), context_s=context_s, duration_s=duration_s
    )
    assert request.context_used_s() == used


def test_context_used_is_zero_without_a_clip():
    assert GenerationRequest(context_s=5).context_used_s() == 0


def test_variations_count_up_from_the_seed():
    seeded = GenerationRequest(variations=3).with_seed()
    assert seeded.seed >= 0
    assert seeded.with_seed() is seeded
    assert [seeded.variation(i).seed - seeded.seed for i in range(3)] == [0, 1, 2]
    assert seeded.variation(2).variations == 1
    assert GenerationRequest(seed=MAX_SEED).variation(1).seed == 0


def test_settings_come_back_from_json():
    request = GenerationRequest(prompt="café", audio_prompt=clip(), seed=7)
    restored = GenerationRequest.parse(json.loads(json.dumps(request.settings())))
    assert restored == dataclasses.replace(request, audio_prompt=None)


def test_parse_refuses_an_unknown_setting():
    with pytest.raises(RequestError, match="“promt” is not a setting: choose among prompt, "):
        GenerationRequest.parse({"promt": "rock"})


def test_replacing_a_field_validates_nothing(monkeypatch):
    parsed = GenerationRequest.parse({"melody": Clip(np.ones((1, 100), np.float32), 100)})
    monkeypatch.setattr(request_module, "coerce", lambda *_: pytest.fail("validated again"))
    for index in range(4):
        assert parsed.with_seed().variation(index).variations == 1
    assert dataclasses.replace(parsed, checkpoint="small").melody is parsed.melody


def test_chords_set_a_tempo_where_none_is_given():
    request = GenerationRequest.parse({"chords": " C   G ", "time_signature": "3 / 4"})
    assert (request.chords, request.tempo_bpm, request.time_signature) == ("C G", 120, "3/4")
    assert request.progression.bar_s == 1.5 and "bpm: 120" in request.words()
    slower = GenerationRequest.parse({"chords": "C", "tempo_bpm": 60})
    assert slower.tempo_bpm == 60 and slower.progression.bar_s == 4
    assert GenerationRequest.parse({}).progression is None


def test_chords_refusal_names_the_chord():
    error = refusal(chords="C H:min F")
    assert error.field == "chords"
    assert str(error).startswith("“H:min” is no chord: write a root from A to G")


def test_followed_is_what_a_melody_checkpoint_is_needed_for():
    tune = Clip(np.ones((1, 100), np.float32), 100)
    assert GenerationRequest().followed == ""
    assert GenerationRequest(chords="C").followed == "chords"
    assert GenerationRequest(chords="C", melody=tune).followed == "a melody and chords"
