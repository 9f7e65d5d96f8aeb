"""Several prompts at once, and settings that change between two frames, against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from musicgen_ui.engine import code_window, sampling
from musicgen_ui.engine.conditioning import Conditions
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.transformer import Decoder
from musicgen_ui.engine.variation import Variation
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import normalised
from tests.helpers.by_hand import steered, written
from tests.helpers.engine import (
    CPU,
    PIANO,
    ROCK,
    codes_of,
    load,
    make_batch,
    noise,
    run,
    run_job,
    submit,
    whole,
)
from tests.helpers.melody import SCALE, melody_batch

MIX = ((ROCK, 0.7), (PIANO, 0.3))
GREEDY = {"duration_s": 0.6, "do_sample": False}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (((ROCK, 3), (PIANO, 1)), ((ROCK, 0.75), (PIANO, 0.25))),
        (((ROCK, 0.1),), ((ROCK, 1.0),)),
        (((PIANO, 0), (ROCK, 7)), ((ROCK, 1.0),)),
        (((ROCK, 1), (PIANO, 2), (ROCK, 1)), ((ROCK, 0.5), (PIANO, 0.5))),
    ],
)
def test_weights_are_normalised(prompts, expected):
    assert normalised(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([(ROCK, -1)], "0 or more, not -1"),
        ([(ROCK, float("nan"))], "0 or more, not nan"),
        ([(ROCK, float("inf"))], "0 or more, not inf"),
        ([(ROCK, 0)], "a weight above 0"),
        ([], "a weight above 0"),
        ([(str(i), 1) for i in range(5)], "at most 4"),
    ],
)
def test_wrong_weights_are_refused(prompts, says):
    with pytest.raises(RequestError, match=says) as caught:
        normalised(prompts)
    assert caught.value.field == "prompt"


def mixing(batch: Scheduler, monkeypatch: pytest.MonkeyPatch, prompts=MIX) -> Scheduler:
    """A batch whose jobs mix these prompts from their first frame on."""
    conditions = batch.conditioner.conditions

    def mixed(*positions: object, **values: object) -> Conditions:
        return conditions(*positions, **values | {"prompts": prompts})

    monkeypatch.setattr(batch.conditioner, "conditions", mixed)
    return batch


@torch.no_grad()
def likeliest(reference, columns: Tensor, conditions: Conditions, scale: float) -> Tensor:
    """transformers' likeliest codes behind every column, its logits mixed and guided by hand."""
    logits = []
    for states in (*conditions.states, None):
        if states is None:
            states = torch.zeros(1, reference.decoder.config.hidden_size)
        found = reference.decoder(columns[:, :-1], encoder_hidden_states=states[None]).logits
        logits.append(
            found[:, -columns.shape[1] + 1 :]
        )  # of a melody checkpoint without the prefix
    cond = sum(w * each for w, each in zip(conditions.weights, logits, strict=False))
    uncond = logits[len(conditions.weights)] if conditions.guided else cond
    return (uncond + scale * (cond - uncond)).argmax(-1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_mix_equals_transformers_logits_mixed(batch, reference, monkeypatch, guidance_scale):
    request = GenerationRequest(guidance_scale=guidance_scale, **GREEDY)
    mixed, _, _ = run_job(mixing(batch, monkeypatch), request)
    conditions = batch.conditioner.conditions(request)
    expected = likeliest(reference, mixed.window.columns, conditions, guidance_scale)
    inside = written(mixed.window.columns, 30, batch.codec.channels)
    assert torch.equal(mixed.window.columns[:, 1:][inside], expected[inside])
    monkeypatch.undo()
    for prompt in (ROCK, PIANO):  # it is neither of the two
        alone, _, _ = run_job(batch, dataclasses.replace(request, prompt=prompt))
        assert not torch.equal(alone.window.columns, mixed.window.columns)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
def test_mix_follows_a_melody_too(tiny_melody, monkeypatch, graphs):
    from transformers import MusicgenMelodyForConditionalGeneration

    batch = mixing(melody_batch(tiny_melody, graphs=graphs), monkeypatch)
    request = GenerationRequest(melody=SCALE, **GREEDY)
    columns = run_job(batch, request)[0].window.columns
    reference = MusicgenMelodyForConditionalGeneration.from_pretrained(tiny_melody).eval()
    conditions = batch.conditioner.conditions(request)
    assert [len(states) for states in conditions.states] == [len(conditions.states[0])] * 3
    expected = likeliest(reference, columns, conditions, 3.0)
    inside = written(columns, 30, 1)
    assert torch.equal(columns[:, 1:][inside], expected[inside])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_one_prompt_of_any_weight_is_the_plain_request(tiny_mono, monkeypatch, precision):
    batch = make_batch(tiny_mono, precision=precision)
    request = GenerationRequest(ROCK, duration_s=0.6, seed=3)
    plain = run_job(batch, request)[2].clip.samples
    mixing(batch, monkeypatch, normalised([(ROCK, 0.2), (PIANO, 0)]))
    assert (run_job(batch, request)[2].clip.samples == plain).all()


# Changes between two frames

Change = Callable[[Scheduler, Variation], None]


def changed(batch: Scheduler, request: GenerationRequest, changes: dict[int, Change]) -> Tensor:
    """The columns of a job, changed once so many of them are written."""
    submit(batch, request, lambda event: None)
    batch.step()
    (made,) = batch.running
    while batch.running:
        if change := changes.get(made.window.written):
            change(batch, made)
        batch.step()
    return made.window.columns


def steer(prompts, guidance_scale: float) -> Change:
    """As a scheduler does it: other rows, then other sampling parameters."""

    def change(batch: Scheduler, made: Variation) -> None:
        conditions = batch.conditioner.conditions(
            made.request, prompts=normalised(prompts), guidance_scale=guidance_scale
        )
        params = sampling.SamplingParams.of(made.request)
        params = dataclasses.replace(params, guidance_scale=guidance_scale)
        batch.stepper.set_conditions(made, conditions)
        batch.stepper.set_sampling(made, params)

    return change


SCRIPT = {
    0: (((ROCK, 1.0),), 3.0),
    6: (((ROCK, 0.25), (PIANO, 0.75)), 3.0),  # a row more
    9: (((ROCK, 0.5), (PIANO, 0.5)), 5.0),  # other weights alone
    13: (((PIANO, 0.5), ("fast drums", 0.5)), 1.0),  # one leaves, one comes, no guidance
    17: ((("fast drums", 1.0),), 1.0),  # one row
    20: (((ROCK, 1.0),), 4.0),  # and guided again
}


def test_changes_equal_transformers_stepped_by_hand(folder, batch):
    changes = {step: steer(*change) for step, change in SCRIPT.items() if step}
    columns = changed(batch, GenerationRequest(ROCK, **GREEDY), changes)
    assert torch.equal(columns, steered(folder, batch, SCRIPT, 30))
    plain = run_job(batch, GenerationRequest(ROCK, **GREEDY))[0].window.columns
    assert torch.equal(columns[:, :7], plain[:, :7])
    assert not torch.equal(columns[:, 7:10], plain[:, 7:10])


def test_sampling_changes_from_the_next_frame_on(batch, reference):
    """Drawn at first, then the likeliest of a temperature near 0, then the likeliest of top-k 1."""

    def of(**values: float) -> Change:
        def change(batch: Scheduler, made: Variation) -> None:
            params = sampling.SamplingParams.of(made.request)
            batch.stepper.set_sampling(made, dataclasses.replace(params, **values))

        return change

    request = GenerationRequest(ROCK, duration_s=0.6, seed=7, temperature=3.0)
    columns = changed(batch, request, {10: of(temperature=1e-4), 20: of(top_k=1, temperature=3.0)})
    expected = likeliest(reference, columns, batch.conditioner.conditions(request), 3.0)
    inside = written(columns, 30, batch.codec.channels)
    same = (columns[:, 1:] == expected) & inside
    assert torch.equal(same[:, 10:], inside[:, 10:])
    assert same[:, :10].sum() < inside[:, :10].sum() / 2
    plain = run_job(batch, request)[0].window.columns
    assert torch.equal(columns[:, :11], plain[:, :11])


def test_a_mix_beside_other_jobs_is_what_it_is_alone(batch, monkeypatch):
    """In a piece of several windows with an audio prompt; the other job mixes nothing."""
    monkeypatch.setattr(code_window, "WINDOW_S", 1.6)
    clip = noise(0.5, batch.codec.channels)
    plain = GenerationRequest(PIANO, audio_prompt=clip, duration_s=1.0, seed=5)
    mixed = GenerationRequest("", duration_s=2.8, overlap_s=1, seed=4)
    expected = run_job(batch, plain)[1]
    conditions = batch.conditioner.conditions

    def by_request(request: GenerationRequest, *more: float, **values: object) -> Conditions:
        prompts = MIX if request.seed == 4 else None
        return conditions(request, *more, **values | {"prompts": prompts})

    monkeypatch.setattr(batch.conditioner, "conditions", by_request)
    alone = whole(run(batch, mixed)[0])
    takes: list = []
    submit(batch, mixed, takes.append)
    batch.step()
    submit(batch, plain, takes.append)
    batch.step()
    jobs, windows = {each.request.seed: each for each in batch.running}, {}
    while batch.running:
        batch.step()
        windows[jobs[4].window.start] = codes_of(jobs[4])
    assert torch.equal(whole(windows), alone)
    assert torch.equal(codes_of(jobs[5]), expected)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_that_change_keep_their_own_past(tiny_mono, precision):
    decoder = Decoder(load(tiny_mono).decoder, CPU, precision)
    generator = torch.Generator().manual_seed(0)
    rock, piano = (torch.randn(n, 16, generator=generator) for n in (3, 5))
    columns = torch.randint(64, (4, 150), generator=generator)
    plain, changing = (decoder.sequence([rock, None], 152) for _ in range(2))
    for sequence in (plain, changing):
        decoder.prefill(sequence, columns, 150)
    decoder.change_conditions(changing, [piano, rock, None], [0, 0, 1])
    plain_logits = decoder.step(columns[None, :, 0], [plain])
    logits = decoder.step(columns[None, :, 0], [changing])
    assert torch.equal(logits[1:], plain_logits)
    assert not torch.equal(logits[0], logits[1])
    decoder.change_conditions(changing, [rock, None], [1, 2])
    plain_logits = decoder.step(columns[None, :, 1], [plain])
    assert torch.equal(decoder.step(columns[None, :, 1], [changing]), plain_logits)
