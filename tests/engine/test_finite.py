"""A weight that is no number is refused by its name, wherever it is."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine import faults
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers import tiny
from tests.helpers.engine import ROCK, load, stream
from tests.helpers.jobs import made

LAYER = "decoder.model.decoder.layers.1"
WEIGHTS = [
    *(f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.fc2.weight", f"{LAYER}.final_layer_norm.bias"),
    *("decoder.model.decoder.embed_tokens.2.weight", "decoder.model.decoder.layer_norm.weight"),
    *("decoder.lm_heads.3.weight", "enc_to_dec_proj.weight"),
    "text_encoder.encoder.final_layer_norm.weight",
    "audio_encoder.encoder.layers.0.conv.parametrizations.weight.original1",
    "audio_encoder.decoder.layers.1.lstm.weight_hh_l1",
    "audio_encoder.decoder.layers.0.conv.bias",
    "audio_encoder.quantizer.layers.3.codebook.embed",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("bases") / "base", text_hidden=24)


@pytest.fixture(scope="module")
def make(base: Path) -> Callable[..., Scheduler]:
    """Batches of a tiny model of which some weights were changed."""
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)

    def made(changes: dict[str, Any], precision: str = "float32") -> Scheduler:
        changed = copy.deepcopy(model)
        weights = dict(changed.named_parameters()) | dict(changed.named_buffers())
        with torch.no_grad():
            for name, value in changes.items():
                weights[name].view(-1)[-1 if value else slice(None)] = value
        return Scheduler(changed, tokenizer, checkpoint="changed", precision=precision)

    return made


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_with_nan_is_refused_by_its_name(
    make: Callable[..., Scheduler], name: str
) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        make({name: float("nan")}, "int8")
    assert refused.value.field == "checkpoint"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8"])
def test_it_is_refused_in_every_precision(
    make: Callable[..., Scheduler], precision: str, value: float
) -> None:
    with pytest.raises(RequestError, match=f"{LAYER}.fc1.weight"):
        make({f"{LAYER}.fc1.weight": value}, precision)


def test_what_half_precision_cannot_hold_is_refused_in_it_alone(
    make: Callable[..., Scheduler],
) -> None:
    name = f"{LAYER}.fc1.weight"
    with pytest.raises(RequestError, match=f"{name}.*precision"):
        make({name: 70_000.0}, "float16")
    for precision in ("float32", "bfloat16", "int8"):
        make({name: 70_000.0}, precision)


def test_a_weight_norm_that_divides_by_nothing_is_refused(make: Callable[..., Scheduler]) -> None:
    name = "audio_encoder.decoder.layers.0.conv"
    with pytest.raises(RequestError, match=f"{name}.weight"):
        make({f"{name}.parametrizations.weight.original1": 0.0})


def test_the_files_of_a_checkpoint_are_looked_at(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights[f"{LAYER}.fc1.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    request = GenerationRequest(ROCK, checkpoint=str(folder), duration_s=0.5)
    refused = pytest.raises(RequestError, match=f"{LAYER}.fc1.weight")
    with closing(LocalBackend(device="cpu", precision="int8")) as manager, refused:
        made(manager, request)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_overflows_later_is_seen_and_makes_no_take(
    make: Callable[..., Scheduler], precision: str, value: float
) -> None:
    """NaN goes through the kernels of int8 as it does through float32."""
    batch = make({}, precision)
    with torch.inference_mode():
        batch.decoder.embeddings[:, 3] = value
    with pytest.raises(faults.NotFiniteError):
        list(stream(batch, GenerationRequest(ROCK, duration_s=0.5)))
