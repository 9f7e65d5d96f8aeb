"""What every backend does alike: this computer, a front over replicas, a front over a Ray cluster.

The last one starts a cluster: `python -m pytest -m ray tests/backends/test_backends_alike.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.protocol import Backend, Chunk, Failed, Finished, Progress, Recorded, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import Steering
from tests.helpers.backends import KINDS, OPTIONS, backend_of
from tests.helpers.engine import noise
from tests.helpers.jobs import read, takes
from tests.helpers.local import wait_for


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest, tiny_mono) -> Iterator[Backend]:
    with backend_of(request.param, tiny_mono) as made:
        yield made


@pytest.fixture(scope="module")
def local() -> Iterator[LocalBackend]:
    made = LocalBackend(**OPTIONS)
    yield made
    made.close()


def ask(checkpoint, **settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "duration_s": 0.5, "seed": 7, **settings}
    return GenerationRequest(checkpoint=str(checkpoint), **asked)


def test_take_is_that_of_a_single_process(backend, local, tiny_mono):
    request = ask(tiny_mono, variations=2, audio_prompt=noise(0.3))
    made = [takes(read(each.submit(request))) for each in (backend, local)]
    found, same = ({take.variation: take for take in some} for some in made)
    assert found.keys() == same.keys() == {0, 1}
    for variation, take in found.items():
        assert np.allclose(take.clip.samples, same[variation].clip.samples, atol=1e-4)
        assert np.array_equal(take.codes, same[variation].codes)
        assert take.request == same[variation].request


def test_style_take_is_that_of_a_single_process(backend, local, tiny_style):
    """A style clip reaches every backend, and comes back with the take."""
    request = ask(tiny_style, style=noise(3.5, seed=3), style_start_s=0.25, style_codebooks=2)
    (take,), (same,) = (takes(read(each.submit(request))) for each in (backend, local))
    assert np.array_equal(take.codes, same.codes)
    assert take.request == same.request and take.request.style is request.style
    assert backend.describe(str(tiny_style)).style


def test_chunks_of_a_variation_join_to_its_new_music(backend, tiny_mono):
    events = read(backend.submit(ask(tiny_mono, duration_s=3, variations=2)))
    for take in takes(events):
        chunks = [e for e in events if isinstance(e, Chunk) and e.variation == take.variation]
        joined = np.concatenate([chunk.clip.samples for chunk in chunks], axis=1)
        assert np.array_equal(joined, take.clip.samples) and len(chunks) > 1


def test_events_end_with_the_job_and_are_read_again(backend, tiny_mono):
    job = backend.submit(ask(tiny_mono))
    events = list(job.follow())
    assert job.ended and isinstance(events[-1], Finished) and list(job.follow()) == events
    assert list(job.follow(after=len(events) - 1)) == events[-1:]
    assert job.request.seed == 7 and any(isinstance(event, Progress) for event in events)


def test_stopped_job_keeps_what_was_made(backend, tiny_mono):
    job = backend.submit(ask(tiny_mono, duration_s=300))
    next(event for event in job.follow() if isinstance(event, Chunk))
    job.stop()
    (take,) = takes(read(job))
    assert take.stopped and not take.fault and 0 < take.clip.duration_s < 300
    wait_for(lambda: backend.health().jobs == 0, 30)


def test_job_that_is_stopped_at_once_has_empty_takes(backend, tiny_mono):
    job = backend.submit(ask(tiny_mono, duration_s=300, variations=4))
    job.stop()
    assert [take.stopped for take in takes(read(job))] == [True] * 4


def test_live_piece_is_steered_and_recorded(backend, local, tiny_mono):
    """What was recorded is made again by a single process, to the sample."""
    job = backend.submit(ask(tiny_mono, live=True))
    change = Steering(prompts=(("80s pop", 0.5), ("piano", 0.5)), temperature=0.8)
    heard_s, rate, recorded = 0.0, 0, None
    for event in job.follow():
        if isinstance(event, Recorded):
            recorded = event.take
            job.stop()
        if not isinstance(event, Chunk):
            continue
        assert event.clip.samples.any() and heard_s < 60
        rate = event.clip.sampling_rate
        heard_s = (event.start_sample + event.clip.samples.shape[1]) / rate
        job.played(round(heard_s * rate))
        if heard_s - event.clip.duration_s < 1.0 <= heard_s:
            job.steer(change)
        if heard_s - event.clip.duration_s < 4.0 <= heard_s:
            job.record_stretch(0.5, 3.5)
    assert recorded and recorded.clip.duration_s == 3.0
    ((at_s, acted),) = recorded.request.automation
    assert acted == change and 0.5 < at_s < 4.0
    (again,) = takes(read(local.submit(recorded.request)))
    assert np.allclose(again.clip.samples, recorded.clip.samples, atol=1e-4)
    with pytest.raises(RequestError, match="ended"):
        job.steer(change)


def test_error_is_the_jobs_last_event(backend, tmp_path):
    job = backend.submit(ask(tmp_path / "none"))
    (failed,) = [event for event in job.follow() if isinstance(event, Failed)]
    assert isinstance(failed.error, RequestError) and "There is no checkpoint" in str(failed.error)
    with pytest.raises(RequestError, match="There is no checkpoint"):
        backend.describe(str(tmp_path / "none"))


def test_checkpoints_are_listed_described_and_unloaded(backend, local, tiny_mono):
    assert backend.checkpoints() == local.checkpoints()
    assert backend.describe(str(tiny_mono)) == local.describe(str(tiny_mono))
    read(backend.submit(ask(tiny_mono)))
    wait_for(lambda: str(tiny_mono) in backend.status().loaded)

    def is_unloaded() -> bool:
        backend.unload()
        return not backend.status().loaded

    wait_for(is_unloaded)
    assert backend.health().trouble is None


def test_many_clients_all_get_their_takes(backend, tiny_mono):
    ends: dict[int, Finished] = {}

    def client(seed: int) -> None:
        ends[seed] = takes(read(backend.submit(ask(tiny_mono, seed=seed), str(seed % 5))))[0]

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(ends) == 20 and not any(take.stopped for take in ends.values())
    assert all(take.request.seed == seed for seed, take in ends.items())
    waiting = [e for e in backend.submit(ask(tiny_mono)).follow() if isinstance(e, Progress)]
    assert waiting[-1].stage is Stage.COMPOSING
