"""A configuration says how large a model is and whether its parts fit, before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import memory, registry
from musicgen_ui.errors import RequestError
from tests.helpers import tiny


@pytest.fixture
def changeable(tiny_mono: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mono, tmp_path / "checkpoint"))


def test_counted_parameters_are_those_of_the_models_that_transformers_builds(tmp_path):
    variants = [
        {},
        {"stereo": True, "gated_t5": True, "text_hidden": 24},
        {"codebook_size": 32, "ratios": (4, 4, 5, 4), "sampling_rate": 16_000, "layers": 3},
        {"melody": True},
        {"melody": True, "stereo": True, "hidden": 12, "text_hidden": 16},  # as wide as the chroma
    ]
    folders = [tiny.build(tmp_path / str(i), **kw) for i, kw in enumerate(variants)]
    for folder in [*folders, registry.BUNDLED]:
        read = configuration.read("tiny", folder / "config.json")
        kind = tiny.MELODY_CLASSES if read["melody"] else tiny.CLASSES
        with torch.device("meta"):
            model = kind[1](kind[0].from_pretrained(folder))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert memory.count_parameters(read) == count


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_chroma", 24, "24 pitch classes and its decoder 12"),
        ("n_fft", "many", "n_fft of 'many'"),
        ("hop_length", 0, "hop_length of 0"),
    ],
)
def test_a_melody_processor_that_does_not_fit_is_refused(tiny_melody, tmp_path, key, value, said):
    folder = Path(shutil.copytree(tiny_melody, tmp_path / "checkpoint"))
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["feature_extractor"][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(RequestError, match=said):
        registry.load(registry.resolve(str(folder)), torch.float32, print)


def test_memory_grows_with_size_and_with_precision():
    sizes = [configuration.meta(size, False) for size in ("small", "medium", "large")]
    needed = [memory.estimate_bytes(config) for config in sizes]
    assert needed == sorted(needed)
    assert 2.3e9 < needed[0] < 3.5e9
    assert memory.estimate_bytes(sizes[0], 2) * 2 == needed[0]


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("decoder", {"vocab_size": 128}, "128 codes and its codec has 64"),
        ("decoder", {"num_codebooks": 8}, "8 codebooks and its codec reads 4"),
        ("decoder", {"audio_channels": 2}, "4 codebooks and its codec reads 8"),
        ("audio_encoder", {"target_bandwidths": [2.4]}, "4 codebooks and its codec reads 8"),
        ("audio_encoder", {"sampling_rate": 32_001}, "32001 Hz"),
        ("audio_encoder", {"sampling_rate": 16_000, "target_bandwidths": [0.6]}, "16000 Hz"),
        ("audio_encoder", {"audio_channels": 2}, "its codec takes 2"),
        ("audio_encoder", {"model_type": "dac"}, "not t5 and dac"),
        (None, {"model_type": "bark"}, "bark model, not MusicGen"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_weights_are_read(
    changeable, part, values, said
):
    tiny.edit_config(changeable, part, **values)
    (changeable / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(RequestError, match=said):
        registry.load(registry.resolve(str(changeable)), torch.float32, print)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"model_type": 3}',
        '{"model_type": "musicgen", "decoder": 1}',
        '{"model_type": "musicgen", "decoder": {"vocab_size": "many"}}',
        '{"model_type": "musicgen", "audio_encoder": {"codebook_size": 0}}',
        '{"model_type": "musicgen", "audio_encoder": {"upsampling_ratios": [8, null]}}',
    ],
)
def test_a_configuration_of_the_wrong_kind_is_a_sentence(changeable, text):
    (changeable / "config.json").write_text(text)
    with pytest.raises(RequestError):
        registry.describe(registry.resolve(str(changeable)))
