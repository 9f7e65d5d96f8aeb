"""LoRA adapters written as peft writes them, and merged by peft."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from transformers import (
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
)

EVERYTHING = [
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    *("lm_heads.0", "lm_heads.3", "embed_tokens.0", "embed_tokens.2"),
    *("enc_to_dec_proj", "audio_enc_to_dec_proj"),
]


def load_model(folder: Path):
    melody = json.loads((folder / "config.json").read_text())["model_type"] == "musicgen_melody"
    kind = MusicgenMelodyForConditionalGeneration if melody else MusicgenForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def write(base: Path, folder: Path, seed: int = 1, alone: bool = False, **settings) -> Path:
    """An adapter that peft made of random matrices, large enough to change the music."""
    model = load_model(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING, "init_lora_weights": False}
            | settings
        )
        trained = peft.get_peft_model(model.decoder if alone else model, config)
    trained.peft_config["default"].base_model_name_or_path = str(base)
    trained.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, strength: float = 1.0, alone: bool = False):
    model = load_model(base)
    wearing = peft.PeftModel.from_pretrained(model.decoder if alone else model, adapter)
    for module in wearing.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= strength  # `scale_layer` leaves embeddings out
    whole = wearing.merge_and_unload()
    if alone:
        model.decoder = whole
        return model
    return whole
