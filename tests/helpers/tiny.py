"""A complete MusicGen checkpoint of a few hundred kilobytes with random weights, built in code.

Every file that Meta's checkpoints have is there, in transformers' format, so that the real loading
code runs on it offline. The weights are random but not idle: the decoder's linear layers keep the
size of what goes through them and its heads spread the logits, so greedy tokens vary over time and
with the prompt; the codec's layers are scaled by their own output, so codes vary with the sound and
the sound is neither silent nor clipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyForConditionalGeneration,
    MusicgenProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

CODEBOOKS_A_CHANNEL = 4
CLASSES = (MusicgenConfig, MusicgenForConditionalGeneration, MusicgenDecoderConfig)
MELODY_CLASSES = (
    MusicgenMelodyConfig,
    MusicgenMelodyForConditionalGeneration,
    MusicgenMelodyDecoderConfig,
)
WORDS = [
    *("80s", "pop", "rock", "techno", "slow", "fast", "piano", "drums", "bass", "guitar"),
    *("and", "with", "the", "warm", "bright"),
]
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-\"()/&"


def build(
    folder: Path | str,
    *,
    stereo: bool = False,
    melody: bool = False,
    codebook_size: int = 64,
    layers: int = 2,
    hidden: int = 16,
    heads: int = 2,
    sampling_rate: int = 32_000,
    ratios: Sequence[int] = (8, 5, 4, 4),
    gated_t5: bool = False,
    text_hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint into `folder` and returns it.

    `codebook_size` is a power of two. `text_hidden` other than `hidden` adds the projection
    between text encoder and decoder. `gated_t5` gives T5 1.1's feed-forward. `melody` makes it one
    that follows melodies. The global random state is left as it was.
    """
    folder = Path(folder)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config_class, model_class, decoder_class = MELODY_CLASSES if melody else CLASSES
        config = config_class(
            text_encoder=_t5(len(tokenizer), text_hidden, gated_t5),
            audio_encoder=_encodec(codebook_size, sampling_rate, ratios),
            decoder=_decoder(decoder_class, codebook_size, layers, hidden, heads, stereo),
        )
        model = model_class(config).eval()
        _waken_text(model)
        _waken_decoder(model)
        _waken_codec(model.audio_encoder)
    model.generation_config = _generation(codebook_size)
    model.to(dtype).save_pretrained(folder)
    if melody:
        _save_melody_processor(folder, tokenizer)
        return folder
    extractor = EncodecFeatureExtractor(
        feature_size=2 if stereo else 1, sampling_rate=sampling_rate, padding_side="left"
    )
    MusicgenProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def _save_melody_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """By hand, as its class needs torchaudio."""
    tokenizer.save_pretrained(folder)
    extractor = {
        "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
        "feature_size": 12,
        "num_chroma": 12,
        "sampling_rate": 32_000,
        "n_fft": 16_384,
        "hop_length": 4_096,
        "chunk_length": 30,
    }
    processor = {"feature_extractor": extractor, "processor_class": "MusicgenMelodyProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def edit_config(folder: Path, part: str | None = None, **values: object) -> None:
    """Changes `config.json`, or one part of it ("decoder", "audio_encoder", …), to be wrong."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(values)
    path.write_text(json.dumps(config))


def _t5(vocab_size: int, hidden: int, gated: bool) -> T5Config:
    return T5Config(
        vocab_size=vocab_size,
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )


def _encodec(codebook_size: int, sampling_rate: int, ratios: Sequence[int]) -> EncodecConfig:
    frame_rate = math.ceil(sampling_rate / math.prod(ratios))
    bits = round(math.log2(codebook_size))
    config = EncodecConfig(
        sampling_rate=sampling_rate,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        num_filters=2,
        num_residual_layers=1,
        upsampling_ratios=list(ratios),
        use_causal_conv=False,
        use_conv_shortcut=False,
        hidden_size=16,
        codebook_size=codebook_size,
        codebook_dim=16,
        target_bandwidths=[CODEBOOKS_A_CHANNEL * frame_rate * bits / 1000],
        num_lstm_layers=2,
    )
    assert config.num_quantizers == CODEBOOKS_A_CHANNEL
    return config


def _decoder(
    kind: type, codebook_size: int, layers: int, hidden: int, heads: int, stereo: bool
) -> PreTrainedConfig:
    return kind(
        vocab_size=codebook_size,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=2 * hidden,
        num_codebooks=CODEBOOKS_A_CHANNEL * (2 if stereo else 1),
        audio_channels=2 if stereo else 1,
        pad_token_id=codebook_size,
        bos_token_id=codebook_size,
    )


def _generation(codebook_size: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        guidance_scale=3.0,
        max_length=1503,
        pad_token_id=codebook_size,
        bos_token_id=codebook_size,
        decoder_start_token_id=codebook_size,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words where it knows them, letters where not, as T5's: `</s>` ends every prompt."""
    specials = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in specials]
    pieces += [(c, -6.0) for c in CHARACTERS] + [("▁" + word, -3.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


@torch.no_grad()
def _waken_text(model: MusicgenForConditionalGeneration) -> None:
    torch.nn.init.normal_(model.text_encoder.shared.weight)
    if hasattr(model, "enc_to_dec_proj"):
        torch.nn.init.orthogonal_(model.enc_to_dec_proj.weight)
    if hasattr(model, "audio_enc_to_dec_proj"):
        torch.nn.init.normal_(model.audio_enc_to_dec_proj.weight)


@torch.no_grad()
def _waken_decoder(model: MusicgenForConditionalGeneration) -> None:
    for name, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
        elif isinstance(module, torch.nn.Linear):
            # Above 1, so that a step's tokens change the next step and greedy runs do not settle.
            gain = 2.0 if "encoder_attn.out_proj" in name else 3.0
            torch.nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))


@torch.no_grad()
def _waken_codec(codec: EncodecModel) -> None:
    """Gives every convolution an output of deviation 1 (the last one 0.1) and fills codebooks."""
    rate, hop = codec.config.sampling_rate, math.prod(codec.config.upsampling_ratios)
    convolutions = [m for m in codec.modules() if hasattr(m, "parametrizations")]
    hooks = [m.register_forward_hook(_to_deviation_1) for m in convolutions]
    noise = 0.2 * torch.randn(1, 1, 50 * hop) * torch.linspace(0, 1, 50 * hop)
    latent = codec.encoder(noise + 0.2 * torch.sin(torch.arange(50 * hop) * (880 / rate)))
    for k, layer in enumerate(codec.quantizer.layers):
        layer.codebook.embed.copy_(torch.randn_like(layer.codebook.embed) * 0.6**k)
        layer.codebook.embed_avg.copy_(layer.codebook.embed)
    codec.decoder(torch.randn_like(latent))
    for hook in hooks:
        hook.remove()
    last = convolutions[-1]
    last.parametrizations.weight.original0.mul_(0.1)
    last.bias.mul_(0.1)


def _to_deviation_1(
    module: torch.nn.Module, _: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    scale = 1 / output.std()
    module.parametrizations.weight.original0.mul_(scale)
    module.bias.mul_(scale)
    return output * scale
