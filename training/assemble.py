"""Put codec, text encoder and decoder together as a checkpoint folder for `from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, MusicgenForConditionalGeneration

from training.codec import load_codec
from training.lm import make_model
from training.presets import Preset
from training.tokenizer import make_processor

LONGEST_FRAMES = 1500  # 30 s, what the windows cover
SAMPLING = {"do_sample": True, "guidance_scale": 2.0, "top_k": 50, "temperature": 0.7}


def build(
    preset: Preset, *, stereo: bool = False, weights: Path | None = None, codec: Path | None = None
) -> MusicgenForConditionalGeneration:
    """The model in float32: untrained, or with the weights of a trainer and of a codec."""
    from training.codec import make_codec

    trained = load_codec(codec, preset.codec) if codec else make_codec(preset.codec)
    words = len(make_processor(preset.codec.sampling_rate).tokenizer)
    model = make_model(trained.config, words, preset.decoder, stereo=stereo)
    model.audio_encoder.load_state_dict(trained.state_dict())
    if weights:
        load_trained(model, weights)
    return model


def build_kept(
    preset: Preset, codec: dict[str, Tensor], weights: dict[str, Tensor]
) -> MusicgenForConditionalGeneration:
    """The model in float32 from what `pack.read` gives; mono or stereo as the weights are."""
    from training.codec import make_codec

    trained = make_codec(preset.codec)
    trained.load_state_dict(codec)
    stereo = "decoder.lm_heads.4.weight" in weights
    words = len(make_processor(preset.codec.sampling_rate).tokenizer)
    model = make_model(trained.config, words, preset.decoder, stereo=stereo)
    model.audio_encoder.load_state_dict(trained.state_dict())
    _load(model, weights, "What was kept")
    return model


def load_trained(model: MusicgenForConditionalGeneration, path: Path) -> None:
    """A trainer's file into the model; everything but the codec must be in it."""
    _load(model, torch.load(path, map_location="cpu", weights_only=True)["model"], str(path))


def _load(model: MusicgenForConditionalGeneration, state: dict[str, Tensor], source: str) -> None:
    missing = model.load_state_dict(state, strict=False)
    aside = ("audio_encoder.", "text_encoder.encoder.embed_tokens.")  # the latter is shared.weight
    lost = [name for name in missing.missing_keys if not name.startswith(aside)]
    if lost or missing.unexpected_keys:
        names = (lost + missing.unexpected_keys)[:3]
        raise ValueError(f"{source} is of another size or kind: {', '.join(names)} do not fit.")


def assemble(model: MusicgenForConditionalGeneration, preset: Preset, out: Path) -> Path:
    """Float16 safetensors, configuration, sampling defaults, tokenizer and feature extractor."""
    decoder = model.config.decoder
    start = decoder.pad_token_id
    model.generation_config = GenerationConfig(
        **SAMPLING,
        max_length=LONGEST_FRAMES + model.config.audio_encoder.num_quantizers - 1,
        pad_token_id=start,
        bos_token_id=start,
        decoder_start_token_id=start,
    )
    decoder.use_cache = True
    model.decoder.set_attn_implementation("eager")  # not stored: the loader chooses
    model.eval().to(torch.float16).save_pretrained(out)
    stereo = decoder.audio_channels == 2
    make_processor(preset.codec.sampling_rate, stereo=stereo).save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)
    return out
