"""An adapter changes the rows that wear it, as peft's merged model would, and no others."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.checkpoints import lora
from musicgen_ui.engine.lora import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from musicgen_ui.engine.melody import ChromaExtractor
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers import melody as melodies
from tests.helpers import tiny
from tests.helpers.engine import PIANO, ROCK, generated, make_batch, run_job, submit
from tests.helpers.jobs import made
from tests.helpers.lora import load_model, merged, write

GREEDY = {"prompt": ROCK, "duration_s": 0.5, "do_sample": False}


@pytest.fixture(scope="module", params=["eager", "graph"])
def batch(base: Path, adapter: Path, request: pytest.FixtureRequest) -> Scheduler:
    made = make_batch(base, graphs=request.param == "graph")
    made.adapters.add("one", adapter)
    return made


@pytest.fixture
def changeable(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def codes(batch: Scheduler, name: str = "one", **settings) -> torch.Tensor:
    return run_job(batch, GenerationRequest(**{**GREEDY, "adapter": name} | settings))[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("bases") / "base", text_hidden=24)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(base, tmp_path_factory.mktemp("adapters") / "one")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_lora_equals_pefts_merged_model(base, adapter, batch, strength):
    expected, _ = generated(merged(base, adapter, strength), base, [ROCK], 25, 3.0)
    plain, _ = generated(load_model(base), base, [ROCK], 25, 3.0)
    assert torch.equal(codes(batch, adapter_strength=strength), expected[0])
    assert not torch.equal(plain, expected)
    # Taken off again: the packed weights were never touched.
    assert torch.equal(codes(batch, ""), plain[0])
    assert torch.equal(codes(batch, adapter_strength=0), plain[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"layers.1.fc1": 30, "q_proj": 2}},
        {"alone": True, "target_modules": ["k_proj", "lm_heads.1"]},
    ],
)
def test_lora_scales_as_peft(base, batch, tmp_path, settings):
    alone = settings.get("alone", False)
    folder = write(base, tmp_path / "other", **settings)
    batch.adapters.add("other", folder)
    expected, _ = generated(merged(base, folder, alone=alone), base, [ROCK], 25, 3.0)
    assert torch.equal(codes(batch, "other"), expected[0])


def test_lora_changes_only_its_own_job(base, batch, tmp_path):
    batch.adapters.add("two", write(base, tmp_path / "two", seed=2))
    asked = [
        {"adapter": "one"},
        {"adapter": ""},
        {"adapter": "two", "prompt": PIANO},
        {"adapter": "one", "adapter_strength": 0.3},
        {"adapter": "one", "guidance_scale": 1.0},
    ]
    requests = [GenerationRequest(**{**GREEDY, **settings}) for settings in asked]
    alone = [run_job(batch, request)[2].clip.samples for request in requests]
    events: list[list] = [[] for _ in requests]
    for request, heard in zip(requests, events, strict=True):
        submit(batch, request, heard.append)
    while batch.step():
        pass
    for heard, expected in zip(events, alone, strict=True):
        assert isinstance(heard[-1], Finished), heard[-1]
        assert abs(heard[-1].clip.samples - expected).max() < 1e-5
    assert abs(alone[0] - alone[1]).max() > 0.01


def test_lora_on_an_int8_base_is_close_to_the_merged_model(base, adapter):
    batch = make_batch(base, precision="int8", graphs=False)
    batch.adapters.add("one", adapter)
    plain, expected = (
        make_batch(base),
        Scheduler(merged(base, adapter), batch.conditioner.tokenizer, checkpoint="merged"),
    )

    def first_logits(of: Scheduler, name: str = "") -> torch.Tensor:
        request = GenerationRequest(**GREEDY, adapter=name)
        adapter, states = (
            of.adapters.applied(request),
            of.conditioner.conditions(request).states,
        )
        sequence = of.decoder.sequence(states, 4, adapter=adapter)
        start = torch.full((1, of.decoder.codebooks), of.decoder.start_token)
        return of.decoder.step(start, [sequence])

    wanted = first_logits(expected)
    error = (first_logits(batch, "one") - wanted).abs().mean()
    assert error < 0.1 * (first_logits(plain) - wanted).abs().mean()


# What an adapter may change, where the checkpoint has it.
TARGETS = {
    "self-attention": ["self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"],
    "cross-attention": ["encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.out_proj"],
    "feed-forward": ["fc1", "fc2"],
    "heads": ["lm_heads.0", "lm_heads.3"],
    "embeddings": ["embed_tokens.0", "embed_tokens.2"],
    "text projection": ["enc_to_dec_proj"],
    "melody projection": ["audio_enc_to_dec_proj"],
}
# Of what an adapter changes in float32: how far a precision may be from it.
NEAR = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02, "int8": 0.1}


@pytest.fixture(scope="module", params=[False, True], ids=["text", "melody"])
def targeted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint with all projections, and an adapter for each target that it has."""
    folder = tmp_path_factory.mktemp("targets")
    base = tiny.build(folder / "base", melody=request.param, text_hidden=24)
    lacking = "cross-attention" if request.param else "melody projection"
    found = {
        name: write(base, folder / name, target_modules=modules)
        for name, modules in TARGETS.items()
        if name != lacking
    }
    make = melodies.melody_batch if request.param else make_batch
    return lambda precision: make(base, precision=precision), found, request.param


def test_lora_targets_are_applied_in_every_precision(targeted):
    """The projections stay in float32 beside a decoder in half precision, and so do their parts
    of an adapter; it is the dtype of a GPU's default."""
    make, found, melody = targeted
    told = {**GREEDY, **({"melody": melodies.SCALE} if melody else {})}

    def logits(batch: Scheduler, name: str) -> torch.Tensor:
        request = GenerationRequest(**told, adapter=name)
        adapter, states = (
            batch.adapters.applied(request),
            batch.conditioner.conditions(request).states,
        )
        sequence = batch.decoder.sequence(states, 4, adapter=adapter)
        start = torch.full((1, batch.decoder.codebooks), batch.decoder.start_token)
        while sequence.length < 0:
            batch.decoder.prefill(sequence, start.T, 500)
        return torch.stack([batch.decoder.step(start, [sequence]) for _ in range(2)])

    exact: dict[str, torch.Tensor] = {}
    for precision, near in NEAR.items():
        batch = make(precision)
        for name, folder in found.items():
            batch.adapters.add(name, folder)
            change = logits(batch, name) - logits(batch, "")
            expected = exact.setdefault(name, change)
            assert expected.norm() > 0.1, name
            assert (change - expected).norm() <= near * expected.norm(), (name, precision)
        assert run_job(batch, GenerationRequest(**told, adapter=name))[2].clip.samples.size


def test_lora_folder_is_named_in_the_take(base, adapter):
    request = GenerationRequest(
        **GREEDY, checkpoint=str(base), adapter=str(adapter), adapter_strength=0.8, seed=1
    )
    with closing(LocalBackend(device="cpu", precision="float32")) as manager:
        take = made(manager, request)[-1]
        assert (take.request.adapter, take.request.adapter_strength) == (str(adapter), 0.8)
        bare = made(manager, dataclasses.replace(request, adapter=""))[-1]
        assert abs(bare.clip.samples - take.clip.samples).max() > 0.01
        assert len(manager._cache.all()) == 1  # the base was not read again

        # An open choice of the checkpoint is the adapter's own base.
        asked = dataclasses.replace(request, checkpoint="auto")
        assert made(manager, asked)[-1].request.checkpoint == str(base)


def test_a_server_with_listed_checkpoints_alone_puts_nothing_on(base, adapter):
    with closing(LocalBackend(device="cpu", allow_any=False, also=[str(base)])) as manager:
        request = GenerationRequest(**GREEDY, checkpoint=str(base), adapter=str(adapter))
        with pytest.raises(RequestError, match="adapters are disabled") as error:
            made(manager, request)
        assert error.value.field == "adapter"


# What is refused


@pytest.fixture(scope="module")
def eager(base: Path) -> Scheduler:
    return make_batch(base, graphs=False)


@pytest.fixture
def assert_refused(eager: Scheduler) -> Callable[[Path, str], None]:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(RequestError, match=match) as error:
            eager.adapters.add("bad", folder)
        assert error.value.field == "adapter" and str(error.value).endswith(".")

    return refused


def edit(folder: Path, **values) -> Path:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("shape", [{"layers": 1}, {"hidden": 32}])
def test_lora_for_another_base_is_refused(shape, base, assert_refused, tmp_path):
    other = tiny.build(tmp_path / "other-base", text_hidden=24, **shape)
    if shape == {"layers": 1}:
        eager = make_batch(other, graphs=False)
        with pytest.raises(RequestError, match=r"layers\.1\..*does not|does not fit other-base"):
            eager.adapters.add("bad", write(base, tmp_path / "adapter"))
    else:
        assert_refused(
            write(other, tmp_path / "adapter"), "was trained on .*other-base and does not fit base"
        )


def test_lora_of_another_published_checkpoint_is_refused(changeable):
    edit(changeable, base_model_name_or_path="facebook/musicgen-small")
    source = lora.find(str(changeable))
    request = GenerationRequest(checkpoint="stereo-small", adapter=str(changeable))
    with pytest.raises(RequestError, match=r"trained on facebook/musicgen-small, not on facebook/"):
        lora.with_base(request, source, changeable, "cpu")
    kept = lora.with_base(GenerationRequest(adapter="x"), source, changeable, "cpu")
    assert kept.checkpoint == "facebook/musicgen-small"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, r"no plain LoRA \(use_dora\): merge it"),
        ({"peft_type": "IA3"}, r"no plain LoRA \(IA3\)"),
        ({"init_lora_weights": "pissa"}, r"no plain LoRA \(pissa\)"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "a pattern in its settings"),
        ({"lora_alpha": "much"}, "no readable adapter_model"),
        ({"peft_type": None}, "no plain LoRA"),
    ],
)
def test_lora_of_another_kind_is_refused(changeable, assert_refused, values, said):
    assert_refused(edit(changeable, **values), said)


def test_lora_with_unsupported_weights_is_refused(changeable, assert_refused):
    weights = load((changeable / WEIGHTS_FILE).read_bytes())
    extra = "base_model.model.text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    save_file({**weights, extra: torch.zeros(4, 24)}, changeable / WEIGHTS_FILE)
    assert_refused(changeable, r"changes base_model\.model\.text_encoder.* is not supported")


def test_lora_damaged_files_are_refused(changeable, assert_refused, tmp_path):
    whole = (changeable / WEIGHTS_FILE).read_bytes()
    weights = load((changeable / WEIGHTS_FILE).read_bytes())
    (changeable / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    assert_refused(changeable, "no readable adapter_model")
    key = next(iter(weights))
    for value in (float("nan"), float("inf")):
        save_file({**weights, key: weights[key] * value}, changeable / WEIGHTS_FILE)
        assert_refused(changeable, re.escape(key))
    save_file({k: w for k, w in weights.items() if k != key}, changeable / WEIGHTS_FILE)
    assert_refused(changeable, "does not fit|no readable")
    (changeable / CONFIG_FILE).write_text("{")
    assert_refused(changeable, "no readable adapter_config")
    (changeable / CONFIG_FILE).unlink()
    with pytest.raises(RequestError, match=r"it has no adapter_config\.json"):
        lora.fetch(lora.find(str(changeable)))
    with pytest.raises(RequestError, match='no adapter "nowhere"'):
        lora.find("nowhere")


def test_lora_store_reads_changed_weights_again(base, eager, changeable, tmp_path):
    eager.adapters.add("same", changeable)
    first = codes(eager, "same")
    shutil.copy(write(base, tmp_path / "later", seed=5) / WEIGHTS_FILE, changeable / WEIGHTS_FILE)
    assert not torch.equal(codes(eager, "same"), first)


def test_lora_store_reads_changed_settings_again(eager, changeable):
    eager.adapters.add("scaled", changeable)
    first = codes(eager, "scaled")
    edit(changeable, lora_alpha=0.001)
    assert not torch.equal(codes(eager, "scaled"), first)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_lora_reads_the_pickle_of_older_peft(eager, changeable, named):
    eager.adapters.add("one", changeable)
    expected = codes(eager, "one")
    weights = load((changeable / WEIGHTS_FILE).read_bytes())
    (changeable / WEIGHTS_FILE).unlink()
    torch.save(weights, changeable / PICKLE_FILE)
    path = changeable if named == "folder" else changeable / PICKLE_FILE
    folder = lora.fetch(lora.find(str(path)))
    eager.adapters.add("old", folder)
    assert torch.equal(codes(eager, "old"), expected)


def test_lora_of_a_compiled_model_is_unwrapped(eager, changeable):
    eager.adapters.add("plain", changeable)
    expected = codes(eager, "plain")
    weights = load((changeable / WEIGHTS_FILE).read_bytes())
    wrapped = {
        name.replace("model.model.", "model._orig_mod.model."): w for name, w in weights.items()
    }
    save_file(wrapped, changeable / WEIGHTS_FILE)
    eager.adapters.add("compiled", changeable)
    assert torch.equal(codes(eager, "compiled"), expected)


def test_lora_is_applied_to_chroma_and_prefix(tmp_path):
    base = tiny.build(tmp_path / "base", melody=True, text_hidden=24)
    folder = write(base, tmp_path / "adapter")
    batch = melodies.melody_batch(base)
    batch.adapters.add("one", folder)
    told = {**GREEDY, "melody": melodies.SCALE}
    chroma = ChromaExtractor()(told["melody"])
    worn, plain = codes(batch, **told), codes(batch, "", **told)
    whole = merged(base, folder)
    assert torch.equal(worn, melodies.generated(whole, base, ROCK, chroma, 3.0, 25))
    assert not torch.equal(worn, plain)
