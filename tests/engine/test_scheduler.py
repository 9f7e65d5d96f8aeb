"""The loop against transformers' `generate`, and what callers may count on."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from musicgen_ui.engine import delay_pattern, job_queue, sampling
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Chunk, Event, Finished, Progress, Stage
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.variation import TakeRecorder
from musicgen_ui.engine.worker import Worker
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import (
    PIANO,
    ROCK,
    beside,
    generated,
    listen,
    make_batch,
    noise,
    run_job,
    stream,
    submit,
)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("with_clip", [False, True])
def test_greedy_equals_generate(folder, batch, reference, guidance_scale, with_clip):
    clip = noise(0.4, batch.codec.channels) if with_clip else None
    request = GenerationRequest(
        ROCK,
        audio_prompt=clip,
        include_prompt=False,
        duration_s=0.6,
        guidance_scale=guidance_scale,
        do_sample=False,
    )
    _, codes, finished = run_job(batch, request)
    samples = clip.samples if clip else None
    expected, audio = generated(reference, folder, [ROCK], 30, guidance_scale, samples)
    assert len(expected[0].unique()) > 10  # a sequence that says something
    assert torch.equal(codes, expected[0])
    new = audio[0, :, -finished.clip.samples.shape[1] :]
    assert np.abs(finished.clip.samples - new.numpy()).max() < 1e-5


def test_greedy_equals_generate_for_a_padded_batch_of_prompts(folder, batch, reference):
    prompts = [PIANO, ROCK + " and warm guitar, the bright fast techno"]
    expected, _ = generated(reference, folder, prompts, 30, 3.0)
    for prompt, codes in zip(prompts, expected, strict=True):
        request = GenerationRequest(prompt, duration_s=0.6, do_sample=False)
        assert torch.equal(run_job(batch, request)[1], codes)


def test_long_audio_prompt_is_taken_in_by_pieces_without_a_difference(folder, batch, reference):
    clip = noise(6.0, batch.codec.channels)  # 300 columns
    request = GenerationRequest(
        ROCK, audio_prompt=clip, include_prompt=False, duration_s=0.5, do_sample=False
    )
    _, codes, _ = run_job(batch, request)
    expected, _ = generated(reference, folder, [ROCK], 25, 3.0, clip.samples)
    assert torch.equal(codes, expected[0])


def test_negative_prompt_takes_the_place_of_the_null_condition(folder, batch, reference):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([ROCK, PIANO], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = reference.text_encoder(**tokens)[0]
        columns = torch.full((2 * batch.decoder.codebooks, 1), batch.decoder.start_token)
        logits = reference(
            encoder_outputs=(states,),
            attention_mask=tokens.attention_mask,
            decoder_input_ids=columns,
        ).logits
    wanted, unwanted = logits[:, 0].view(2, batch.decoder.codebooks, -1)
    expected = (unwanted + 3 * (wanted - unwanted)).argmax(-1)
    request = GenerationRequest(ROCK, negative_prompt=PIANO, duration_s=0.5, do_sample=False)
    job, _, _ = run_job(batch, request)
    assert job.window.columns[0, 1] == expected[0]
    plain, _, _ = run_job(batch, dataclasses.replace(request, negative_prompt=""))
    assert not torch.equal(job.window.columns, plain.window.columns)


def test_step_sees_the_logits_of_transformers(folder, batch, reference):
    job, _, _ = run_job(batch, GenerationRequest(ROCK, duration_s=0.5, seed=3))
    tokens = AutoTokenizer.from_pretrained(folder)([ROCK], return_tensors="pt")
    with torch.no_grad():
        expected = reference(**tokens, decoder_input_ids=job.window.columns[:, :-1]).logits
    states = batch.conditioner.states(ROCK)
    sequence = batch.decoder.sequence([states], job.window.positions)
    for step in range(job.window.positions):
        logits = batch.decoder.step(job.window.columns[None, :, step], [sequence])
        assert torch.allclose(logits[0], expected[:, step], atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 250},
        {"top_k": 7},
        {"top_k": 0, "top_p": 0.6},
        {"top_k": 20, "top_p": 0.9, "temperature": 0.7},
        {"top_k": 0, "temperature": 3.0},
        {"top_p": 0.001},
    ],
)
def test_probabilities_are_those_of_transformers(settings):
    request = GenerationRequest(**settings)
    logits = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(request.temperature)(None, logits[0])
    if request.top_k:
        expected = TopKLogitsWarper(request.top_k)(None, expected)
    if request.top_p:
        expected = TopPLogitsWarper(request.top_p)(None, expected)
    # beside a neighbour of other settings
    others = [GenerationRequest(top_k=3, top_p=0.5), request, GenerationRequest(top_k=0)]
    params = [sampling.SamplingParams.of(each) for each in others]
    gathered = sampling.SamplingTensors.of(params, 64, torch.device("cpu"))
    found = sampling.probabilities(logits.repeat(3, 1, 1), gathered)[1]
    assert torch.allclose(found, expected.softmax(-1), atol=1e-6)


def test_draws_follow_the_distribution():
    logits = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    count = 20_000
    params = [sampling.SamplingParams.of(GenerationRequest(top_k=10))]
    settings = sampling.SamplingTensors.of(params, 16, torch.device("cpu"))
    uniform = sampling.uniforms(5, count, 1)
    drawn = sampling.draw(logits.expand(1, count, 16), settings, uniform.T)[0]
    shares = torch.bincount(drawn, minlength=16) / count
    expected = sampling.probabilities(logits, settings)[0, 0]
    assert (shares - expected).abs().max() < 0.01
    assert shares[expected == 0].sum() == 0
    edges = torch.tensor([[0.0, 1 - 2**-24]])  # the least and the greatest that can be drawn
    ends = sampling.draw(logits.expand(1, 2, 16), settings, edges)[0]
    assert (expected[ends] > 0).all()


def test_same_seed_gives_the_same_take_and_another_seed_another(batch):
    request = GenerationRequest(ROCK, duration_s=0.5, seed=7)
    first, second = (run_job(batch, request)[2].clip.samples for _ in range(2))
    assert np.array_equal(first, second)
    other = run_job(batch, dataclasses.replace(request, seed=8))[2].clip.samples
    assert not np.array_equal(first, other)


def test_neighbours_change_neither_draws_nor_codes(batch):
    """Jobs of other lengths, settings and positions beside it; one of them is admitted late."""
    request = GenerationRequest(ROCK, duration_s=0.6, seed=7, top_p=0.9)
    alone, codes, _ = run_job(batch, request)
    clip = noise(1.0, batch.codec.channels)
    others = [
        GenerationRequest("", duration_s=1.0, seed=1),
        GenerationRequest(PIANO, audio_prompt=clip, duration_s=0.5, seed=2, top_k=3),
        GenerationRequest(PIANO, duration_s=0.5, guidance_scale=1, do_sample=False),
    ]
    job = beside(batch, request, others)
    assert torch.equal(job.uniforms, alone.uniforms)
    assert torch.equal(
        delay_pattern.undelayed(job.window.columns, 0, job.window.frames, batch.codec.channels),
        codes,
    )


def test_clips_that_are_taken_in_side_by_side_sound_as_alone(batch):
    """A clip is encoded when its turn comes; nothing of it may be heard by the codec before."""
    clip = noise(1.0, batch.codec.channels)
    request = GenerationRequest(PIANO, audio_prompt=clip, duration_s=0.6, seed=2)
    alone = run_job(batch, request)[2].clip.samples
    finished: list[Event | Exception] = []
    for _ in range(3):
        submit(batch, request, finished.append)
    while batch.step():
        pass
    takes = [event.clip.samples for event in finished if isinstance(event, Finished)]
    assert len(takes) == 3
    for take in takes:
        assert np.abs(take - alone).max() < 1e-4


def test_variations_are_the_single_takes_of_their_seeds(batch):
    request = GenerationRequest("", duration_s=0.5, seed=40, variations=3)
    takes = {e.variation: e for e in stream(batch, request) if isinstance(e, Finished)}
    assert [takes[i].request.seed for i in range(3)] == [40, 41, 42]
    for finished in takes.values():
        alone = run_job(batch, dataclasses.replace(finished.request, stereo=False))[2]
        assert np.abs(alone.clip.samples - finished.clip.samples).max() < 1e-4
    assert not np.array_equal(takes[0].clip.samples, takes[1].clip.samples)


@pytest.mark.parametrize("duration_s", [0.5, 0.51, 1.0, 1.234])
def test_durations_are_exact_to_the_sample(batch, duration_s):
    finished = run_job(batch, GenerationRequest(ROCK, duration_s=duration_s))[2]
    assert finished.clip.samples.shape == (batch.codec.channels, round(duration_s * 50) * 640)
    assert finished.clip.sampling_rate == 32000
    assert finished.request.seed >= 0
    assert finished.request.stereo == (batch.codec.channels == 2)
    assert not finished.stopped


def test_take_begins_with_the_clip_whole(batch):
    clip = noise(1.237, channels=1)  # not a whole number of frames
    request = GenerationRequest(ROCK, audio_prompt=clip, context_s=0.5, duration_s=0.5, seed=1)
    finished = run_job(batch, request)[2]
    own, made = clip.samples.shape[1], finished.clip.samples
    assert made.shape == (batch.codec.channels, own + 16000)
    assert finished.prompt_s == pytest.approx(1.237)
    faded = round(0.02 * 32000)
    assert np.array_equal(made[0, : own - faded], clip.samples[0, : own - faded])
    alone = run_job(batch, dataclasses.replace(request, include_prompt=False))[2]
    assert np.array_equal(alone.clip.samples, made[:, own:])
    assert alone.prompt_s == 0


def test_chunks_joined_are_the_take(batch):
    request = GenerationRequest(ROCK, duration_s=1.3, seed=2)
    events = list(stream(batch, request))
    chunks = [e.clip.samples for e in events if isinstance(e, Chunk)]
    assert len(chunks) > 2
    assert np.array_equal(np.concatenate(chunks, 1), events[-1].clip.samples)
    done = [e.done_s for e in events if isinstance(e, Progress)]
    assert done == sorted(done) and done[0] == 0


def test_stop_keeps_what_was_made_and_frees_the_rows(batch):
    stop = threading.Event()
    events = []
    for event in stream(batch, GenerationRequest(ROCK, duration_s=20, seed=3), stop):
        events.append(event)
        if isinstance(event, Chunk):
            stop.set()
    finished = events[-1]
    assert finished.stopped
    assert 0 < finished.clip.duration_s < 2
    assert not batch.running
    whole = run_job(batch, GenerationRequest(ROCK, duration_s=2, seed=3))[2].clip.samples
    kept = finished.clip.samples[:, : -4 * 640]  # its end is decoded without what would follow
    assert np.abs(kept - whole[:, : kept.shape[1]]).max() < 1e-4


def test_stop_before_the_first_frame_gives_an_empty_take(batch):
    stop = threading.Event()
    stop.set()
    (finished,) = stream(batch, GenerationRequest(ROCK), stop)
    assert finished.stopped and finished.clip.samples.shape[1] == 0


def test_closed_iterator_frees_the_rows_without_a_take(batch):
    held = batch.nbytes
    with closing(stream(batch, GenerationRequest(ROCK, duration_s=20, variations=2))) as events:
        next(event for event in events if isinstance(event, Chunk))
        assert batch.running
    assert not batch.running and not batch.queue
    assert batch.nbytes == held


def test_long_prompt_beside_a_short_one(batch, reference, folder):
    """More tokens than the graph's buffers had room for, admitted while another job runs."""
    long = ROCK + " " + "piano with " * 60
    events: list[Event | Exception] = []
    submit(batch, GenerationRequest(ROCK, duration_s=0.6, do_sample=False), events.append)
    batch.step()
    (short,) = batch.running
    submit(batch, GenerationRequest(long, duration_s=0.6, do_sample=False), events.append)
    while batch.step():
        pass
    expected, _ = generated(reference, folder, [ROCK], 30, 3.0)
    assert torch.equal(
        delay_pattern.undelayed(short.window.columns, 0, 30, batch.codec.channels), expected[0]
    )
    codes = run_job(batch, GenerationRequest(long, duration_s=0.6, do_sample=False))[1]
    assert torch.equal(codes, generated(reference, folder, [long.strip()], 30, 3.0)[0][0])


def test_prompt_beyond_the_text_encoder_is_cut_and_said(tiny_mono):
    batch = make_batch(tiny_mono)
    finished = run_job(batch, GenerationRequest("rock " * 399, duration_s=0.5))[2]
    assert not finished.notes
    tail = "piano drums " * 130
    finished = run_job(batch, GenerationRequest("zzz " * 100 + tail, duration_s=0.5))[2]
    assert len(finished.notes) == 1
    assert "piano" in finished.notes[0]


def test_more_jobs_than_places_wait_in_order(tiny_mono, monkeypatch):
    monkeypatch.setattr(job_queue, "REPORT_EVERY_S", 0.0)
    batch = make_batch(tiny_mono, max_jobs=2)
    heard: list[tuple[int, Event | Exception]] = []
    for caller in range(4):
        request = GenerationRequest(ROCK, duration_s=0.5, seed=caller)
        submit(batch, request, lambda event, caller=caller: heard.append((caller, event)))
    for _ in range(3):
        batch.step()
    places = {c: e.place for c, e in heard if isinstance(e, Progress) and e.stage is Stage.WAITING}
    assert {caller: places[caller] for caller in (2, 3)} == {2: 1, 3: 2}
    while batch.step():
        pass
    assert [caller for caller, event in heard if isinstance(event, Finished)] == [0, 1, 2, 3]


def test_fault_in_one_job_is_its_own(tiny_mono, monkeypatch):
    batch = make_batch(tiny_mono)
    states = batch.conditioner.states

    def broken(prompt: str, *more: object) -> torch.Tensor | None:
        if prompt == PIANO:
            raise torch.OutOfMemoryError("no room")
        return states(prompt, *more)

    monkeypatch.setattr(batch.conditioner, "states", broken)
    events: list[Event | Exception] = []
    submit(batch, GenerationRequest(PIANO, duration_s=0.5, variations=2), events.append)
    submit(batch, GenerationRequest(ROCK, duration_s=0.5), events.append)
    while batch.step():
        pass
    (error,) = [event for event in events if isinstance(event, Exception)]
    assert "shorter" in str(error)
    ends = [event for event in events if isinstance(event, Finished)]
    assert [end.request.prompt for end in ends if not end.fault] == [ROCK]


def test_worker_serves_callers_side_by_side(tiny_mono):
    worker = Worker(make_batch(tiny_mono))

    def take(seed: int) -> Finished:
        return listen(worker, GenerationRequest(ROCK, duration_s=0.5, seed=seed))[-1]

    with ThreadPoolExecutor() as pool:
        taking = [pool.submit(take, seed) for seed in range(6)]
        stopped = LoggedJob(GenerationRequest(ROCK, duration_s=20))
        worker.add(stopped)
        next(event for event in stopped.follow() if isinstance(event, Chunk))
        stopped.stop()
        takes = [each.result(60) for each in taking]
    assert [finished.request.seed for finished in takes] == list(range(6))
    expected = take(2).clip.samples
    worker.close()
    assert np.abs(expected - takes[2].clip.samples).max() < 1e-4
    assert stopped.log.so_far()[-1].stopped


def test_int8_makes_music_and_holds_fewer_bytes(tiny_mono):
    exact, packed = make_batch(tiny_mono), make_batch(tiny_mono, precision="int8")
    request = GenerationRequest(ROCK, audio_prompt=noise(0.5), duration_s=0.5, seed=3)
    takes = [run_job(packed, request)[2].clip.samples for _ in range(2)]
    assert np.array_equal(*takes)
    assert takes[0].shape == run_job(exact, request)[2].clip.samples.shape
    assert packed.nbytes < exact.nbytes


@pytest.mark.parametrize("batch", ["graph"], indirect=True)
def test_jobs_whose_audio_is_decoded_together_are_what_each_is_alone(batch, monkeypatch):
    """As on CUDA, where the codec takes several jobs' frames at once."""
    lengths = (1.5, 0.7, 3.0, 1.1, 2.0, 2.5)
    asked = [GenerationRequest(ROCK, duration_s=s, seed=i) for i, s in enumerate(lengths)]
    alone = [run_job(batch, request)[2].clip.samples for request in asked]
    together, decode_together = [], TakeRecorder.decode_together

    def spy(recorders, *args):
        together.append(len(recorders))
        decode_together(recorders, *args)

    monkeypatch.setattr(TakeRecorder, "decode_together", staticmethod(spy))
    monkeypatch.setattr(Scheduler, "_beside", True)
    ends: list[list[Event | Exception]] = [[] for _ in asked]
    for request, events in zip(asked, ends, strict=True):
        submit(batch, request, events.append)
    while batch.step():
        pass
    assert max(together) > 2
    for samples, events in zip(alone, ends, strict=True):
        chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
        assert np.abs(events[-1].clip.samples - samples).max() < 1e-4
        assert np.abs(np.concatenate(chunks, axis=1) - samples).max() < 1e-4


@pytest.mark.parametrize("batch", ["graph"], indirect=True)
def test_jobs_that_cannot_be_decoded_together_are_decoded_alone(batch, monkeypatch):
    def full(recorders: list[TakeRecorder], *_: object) -> None:
        tried.append(len(recorders))
        raise torch.OutOfMemoryError("out of memory")

    asked, tried = [GenerationRequest(ROCK, duration_s=0.7, seed=seed) for seed in (1, 2)], []
    alone = [run_job(batch, request)[2].clip.samples for request in asked]
    monkeypatch.setattr(TakeRecorder, "decode_together", staticmethod(full))
    monkeypatch.setattr(Scheduler, "_beside", True)
    ends: list[list[Event | Exception]] = [[] for _ in asked]
    for request, events in zip(asked, ends, strict=True):
        submit(batch, request, events.append)
    while batch.step():
        pass
    assert max(tried) == 2
    for samples, events in zip(alone, ends, strict=True):
        assert np.abs(events[-1].clip.samples - samples).max() < 1e-4
