"""CLAP on a tiny random checkpoint."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerFast,
)

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.clap import Clap
from musicgen_ui.errors import RequestError
from tests.helpers.engine import noise
from tests.helpers.melody import SCALE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the layout of laion/larger_clap_music, of random weights."""
    out = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    config = ClapConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "pad_token_id": 1,
        },
        audio_config={
            "patch_embeds_hidden_size": 8,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "hidden_size": 16,
            "window_size": 4,
            "spec_size": 64,
            "num_mel_bins": 16,
            "num_hidden_layers": 2,
        },
        projection_dim=8,
    )
    ClapModel(config).save_pretrained(out)
    ClapFeatureExtractor(
        feature_size=16, max_length_s=2, truncation="rand_trunc", padding="repeatpad"
    ).save_pretrained(out)
    words = ["<s>", "<pad>", "</s>", "<unk>", "piano", "rock", "drums"]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(out)
    return out


def loaded(folder: Path) -> Clap:
    clap = Clap(folder)
    clap.load(lambda note: None)
    return clap


def test_similarity_is_transformers_cosine(folder):
    model = ClapModel.from_pretrained(folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    clip = Clip(noise(2.0).samples[:, :48_000], 48_000)  # a second: repeated by the extractor
    audio = extractor(clip.samples[0], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([[4, 6]]), "attention_mask": torch.ones(1, 2)}
        expected = model(**inputs, **audio)
    cosine = float(expected.text_embeds[0] @ expected.audio_embeds[0])
    (found,) = loaded(folder).similarity("piano drums", [clip])
    assert found == pytest.approx(cosine, abs=1e-5) and -1 <= found <= 1


def test_similarity_of_long_takes_is_the_same_each_time(folder):
    """The extractor alone would take another part of a long clip each time."""
    clap = loaded(folder)
    clips = [SCALE, noise(7.0), Clip(np.zeros((2, 0), np.float32), 32_000)]
    first = clap.similarity("rock", clips)
    assert first == clap.similarity("rock", clips) and first[2] == -1
    assert len(set(first)) == 3
    assert first[1] != clap.similarity("piano " * 200, clips)[1]


def test_unreadable_checkpoints_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"CLAP in .* cannot be read"):
        loaded(tmp_path)


def test_nothing_is_downloaded_where_that_is_not_allowed(monkeypatch):
    monkeypatch.setattr("musicgen_ui.checkpoints.hub.cached", lambda repo_id: None)
    monkeypatch.setattr("musicgen_ui.checkpoints.hub.download", pytest.fail)
    with pytest.raises(RequestError, match="is not on this server"):
        Clap(may_download=False).load(lambda note: None)


def test_unload_does_not_wait_for_a_load(folder: Path) -> None:
    clap, alive = Clap(folder), []

    def report(_: str) -> None:
        unload = threading.Thread(target=clap.unload, daemon=True)
        unload.start()
        unload.join(2.0)
        alive.append(unload.is_alive())

    clap.load(report)
    assert alive == [False]
