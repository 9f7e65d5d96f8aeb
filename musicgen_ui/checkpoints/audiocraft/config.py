"""An audiocraft checkpoint's settings and weight names, translated to transformers'.

audiocraft, where MusicGen (Copet et al. 2023, arXiv 2306.05284), AudioGen (Kreuk et al. 2022, arXiv
2209.15352) and MusicGen-Style (Rouard et al. 2024, arXiv 2407.12563) were made, exports a
checkpoint as two pickles: the language model with the projections of its conditions, and the
codec. Each holds its weights and the settings it was trained with, a YAML text in which one value
may point to another. transformers has the same architecture under other names, as long as the
settings that change it have MusicGen's values: each is checked, since the weights would also fit a
model that computes something else.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence

from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import file_checks
from musicgen_ui.checkpoints.file_checks import JsonObject
from musicgen_ui.errors import RequestError

# Of a melody checkpoint: the window of its spectrogram.
CHROMA_WINDOW = "condition_provider.conditioners.self_wav.chroma.spec.window"
# Of a fine-tune on chords: the network by which training recognised them.
CHORD_RECOGNITION = "condition_provider.conditioners.self_wav.chroma.model."
# What only the training of a style's modules needs.
STYLE_TRAINING = re.compile(
    r"condition_provider\.conditioners\.self_wav\."
    r"(batch_norm\.num_batches_tracked|rvq\.vq\.layers\.\d+\._codebook\.(?!embed$)\w+)"
)
TOP_K = 250  # audiocraft's default; transformers would take 50
_LONGEST_TEXT = 200_000  # characters, far more than settings have; parsing more takes long
_LARGEST_COUNT = 1_000_000  # so that no model of absurd size is built
_MOST_LAYERS = 4096  # or codebooks
_MOST_RATIOS = 16  # of the codec's layers

# Settings that change what is computed, where transformers has one way.
_LANGUAGE_MODEL: dict[str, object] = {
    "lm_model": "transformer_lm",
    "codebooks_pattern.modeling": "delay",
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm_first": True,
    "transformer_lm.norm": "layer_norm",
    "transformer_lm.causal": True,
    "transformer_lm.positional_embedding": "sin",
    "conditioners.description.model": "t5",
}
_LANGUAGE_MODEL_OPTIONAL: dict[str, object] = {
    "transformer_lm.past_context": None,
    "transformer_lm.layer_scale": None,
    "transformer_lm.xpos": False,
    "transformer_lm.qk_layer_norm": False,
    "transformer_lm.qk_layer_norm_cross": False,
    "transformer_lm.kv_repeat": 1,
    "codebooks_pattern.delay.flatten_first": 0,
    "codebooks_pattern.delay.empty_initial": 0,
    "interleave_stereo_codebooks.per_timestep": False,
    "fuser.cross_attention_pos_emb": False,
    "fuser.sum": [],
    "fuser.input_interpolate": [],
    "conditioners.description.t5.normalize_text": False,
}
# Of a style checkpoint, under conditioners.self_wav.style.
_STYLE: dict[str, object] = {"model_name": "mert", "batch_norm": True}
# Its transformer by name: width, heads, layers.
_STYLE_SCALES = {"xsmall": (256, 8, 4), "default": (512, 8, 8), "large": (1024, 16, 24)}
# Of MERT's config.json: what its own code adds to HuBERT, and what HuBERT is here.
_MERT: dict[str, object] = {
    "feature_extractor_cqt": False,
    "deepnorm": False,
    "do_stable_layer_norm": False,
    "conv_pos_batch_norm": False,
    "feat_proj_layer_norm": True,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_CODEC: dict[str, object] = {
    "compression_model": "encodec",
    "encodec.autoencoder": "seanet",
    "encodec.quantizer": "rvq",
    "seanet.activation": "ELU",
    "seanet.norm": "weight_norm",
}
_CODEC_OPTIONAL: dict[str, object] = {
    "encodec.causal": False,
    "encodec.renormalize": False,
    "seanet.causal": False,
    "seanet.disable_norm_outer_blocks": 0,
    "seanet.activation_params.alpha": 1.0,
    "seanet.decoder.final_activation": None,
    "seanet.encoder": {},
}


class Settings:
    """The settings inside a checkpoint's file.

    Raises:
        RequestError: they cannot be read, here and wherever a value is not what it must be.
    """

    def __init__(self, file: str, text: object) -> None:
        self.file = file
        try:
            if isinstance(text, dict):  # of a training, whose settings are no text
                self.values = text
                return
            if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
                raise ValueError("no text, or far too much")
            held = file_checks.read_yaml(text)
            if not isinstance(held, dict):
                raise ValueError("no settings")
            self.values = held
        except ValueError as error:
            raise RequestError(
                f"{file} has no readable settings under xp.cfg: export the checkpoint with "
                "audiocraft's own export functions.",
                "checkpoint",
            ) from error

    def get(self, path: str, default: object = None) -> object:
        """The value at "a.b.c", else `default`. "${a.b}" stands for the value at a.b."""
        for _ in range(8):  # pointers to pointers; more would be a loop
            value: object = self.values
            for key in path.split("."):
                if not isinstance(value, dict) or key not in value:
                    return default
                value = value[key]
            pointer = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
            if not pointer:
                return value
            path = pointer[1]
        raise self.refusal(path, value)

    def number(self, path: str, most: int = _LARGEST_COUNT, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(path, default)
        if type(value) is not int or not 0 < value <= most:
            raise self.refusal(path, value)
        return value

    def require(self, stated: Mapping[str, object], optional: Mapping[str, object]) -> None:
        """Requires that settings have these values; the optional ones may be missing."""
        for path, value in stated.items():
            if self.get(path) != value:
                raise self.refusal(path, self.get(path))
        for path, value in optional.items():
            if self.get(path, value) != value:
                raise self.refusal(path, self.get(path))

    def refusal(self, path: str, value: object) -> RequestError:
        """The sentence for a value that transformers' MusicGen cannot be."""
        return RequestError(
            f"{self.file} cannot be converted: its setting {path} is {reprlib.repr(value)}, which "
            "transformers' MusicGen does not know. Choose another checkpoint.",
            "checkpoint",
        )


def decoder(settings: Settings) -> JsonObject:
    """transformers' configuration of the language model."""
    settings.require(_LANGUAGE_MODEL, _LANGUAGE_MODEL_OPTIONAL)
    stereo = settings.get("interleave_stereo_codebooks.use", False) is True
    channels, codebooks = 2 if stereo else 1, settings.number("transformer_lm.n_q", _MOST_LAYERS)
    if settings.get("channels", channels) != channels:
        raise settings.refusal("channels", settings.get("channels"))
    delays = [book // channels for book in range(codebooks)]
    if settings.get("codebooks_pattern.delay.delays", delays) != delays:
        raise settings.refusal("codebooks_pattern.delay.delays", "irregular")
    hidden, codes = settings.number("transformer_lm.dim"), settings.number("transformer_lm.card")
    heads = settings.number("transformer_lm.num_heads")
    if hidden % heads:
        raise settings.refusal("transformer_lm.num_heads", heads)
    return {
        "model_type": "musicgen_melody_decoder" if prefixed(settings) else "musicgen_decoder",
        "vocab_size": codes,
        "num_hidden_layers": settings.number("transformer_lm.num_layers", _MOST_LAYERS),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": hidden * settings.number("transformer_lm.hidden_scale", default=4),
        "num_codebooks": codebooks,
        "audio_channels": channels,
        "pad_token_id": codes,
        "bos_token_id": codes,
        "activation_function": "gelu",
    }


def prefixed(settings: Settings) -> bool:
    """Whether the conditions are a prefix: a clip's, then the words. Else they are words alone.

    Raises:
        RequestError: they are something else.
    """
    conditions = settings.get("conditioners")
    names = set(conditions) - {"args"} if isinstance(conditions, dict) else set()
    crossed, prepended = settings.get("fuser.cross", []), settings.get("fuser.prepend", [])
    if names == {"description"} and crossed == ["description"] and prepended == []:
        return False
    both = ["self_wav", "description"]
    if names != set(both) or prepended not in (both, both[::-1]) or crossed != []:
        raise settings.refusal("conditioners", names)
    if settings.get("conditioners.self_wav.model") not in ("chroma_stem", "chroma_chord", "style"):
        model = settings.get("conditioners.self_wav.model")
        raise settings.refusal("conditioners.self_wav.model", model)
    return True


def melody(settings: Settings) -> dict[str, int]:
    """The settings of a melody checkpoint's chroma: chroma_length, num_chroma, …; else empty.

    Hop and window are in samples, `chroma_length` in columns of the training's 30 s. `chords` is
    true of a fine-tune on chords (musicgen-chord), whose conditioner is "chroma_chord".
    """
    model = settings.get("conditioners.self_wav.model")
    if not prefixed(settings) or model == "style":
        return {}
    chroma = f"conditioners.self_wav.{model}."
    settings.require({chroma + "argmax": True, chroma + "n_chroma": 12}, {})
    window = 2 ** max(4, settings.number(chroma + "radix2_exp", 20))
    rate = settings.number(chroma + "sample_rate", default=settings.number("sample_rate"))
    length_s = window_s(settings)
    return {
        "num_chroma": 12,
        "chroma_length": 1 + rate * length_s // (window // 4),
        "n_fft": window,
        "hop_length": window // 4,
        "chunk_length": length_s,  # seconds
        "sampling_rate": rate,
        **({"chords": True} if model == "chroma_chord" else {}),
    }


def style(settings: Settings) -> JsonObject:
    """The configuration of a style checkpoint's encoder, MERT aside; else empty.

    See `checkpoints.config.STYLE` for the names.
    """
    if not prefixed(settings) or settings.get("conditioners.self_wav.model") != "style":
        return {}
    at = "conditioners.self_wav.style."
    settings.require({at + name: value for name, value in _STYLE.items()}, {})
    scale = settings.get(at + "transformer_scale", "default")
    if not isinstance(scale, str) or scale not in _STYLE_SCALES:
        raise settings.refusal(at + "transformer_scale", scale)
    hidden, heads, layers = _STYLE_SCALES[scale]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_quantizers": settings.number(at + "n_q_out", 64),
        "codebook_size": settings.number(at + "bins"),
        "downsampling": settings.number(at + "ds_factor"),
    }


def mert(name: str, stated: JsonObject) -> JsonObject:
    """The same of MERT, whose `config.json` is `stated`.

    Raises:
        RequestError: it computes something else than HuBERT; `name` says which it is.
    """
    for key, value in _MERT.items():
        if stated.get(key, value) != value:
            found = reprlib.repr(stated[key])
            raise _not_mert(name, f"its {key} is {found}, not {value}")
    relax = stated.get("attention_relax", -1)
    if not isinstance(relax, (int, float)) or relax > 0:
        raise _not_mert(name, f"its attention_relax is {reprlib.repr(relax)}, not -1")
    known = {key: stated.get(key, value) for key, value in configuration.MERT.items()}
    return known | {"sampling_rate": stated.get("sample_rate", known["sampling_rate"])}


def _not_mert(name: str, why: str) -> RequestError:
    return RequestError(
        f"{name} cannot compute the features of a style clip: {why}. MusicGen-Style needs "
        "m-a-p/MERT-v1-95M.",
        "checkpoint",
    )


def window_s(settings: Settings) -> int:
    """The seconds of a training example: 30 for MusicGen, 10 for AudioGen."""
    return settings.number("dataset.segment_duration", default=30)


def generation(settings: Settings, codec: JsonObject) -> JsonObject:
    """transformers' generation settings: how audiocraft samples, and one window's length."""
    codes, books = settings.number("transformer_lm.card"), settings.number("transformer_lm.n_q")
    channels = 2 if settings.get("interleave_stereo_codebooks.use", False) is True else 1
    frame_rate = codec["sampling_rate"] / math.prod(codec["upsampling_ratios"])
    length = window_s(settings) * frame_rate
    guidance = "classifier_free_guidance.inference_coef"
    scale = settings.get(guidance, 3.0)
    if not isinstance(scale, (int, float)) or not 1 <= scale <= 100:
        raise settings.refusal(guidance, scale)
    return {
        "do_sample": True,
        "top_k": TOP_K,
        "guidance_scale": float(scale),
        "max_length": round(length) + books // channels - 1,
        "bos_token_id": codes,
        "pad_token_id": codes,
        "decoder_start_token_id": codes,
    }


def codec(settings: Settings) -> JsonObject:
    """transformers' configuration of the codec."""
    settings.require(_CODEC, _CODEC_OPTIONAL)
    ratios = settings.get("seanet.ratios")
    if (
        not isinstance(ratios, list)
        or len(ratios) > _MOST_RATIOS
        or not all(type(r) is int and 0 < r <= 64 for r in ratios)
    ):
        raise settings.refusal("seanet.ratios", ratios)
    if settings.get("seanet.pad_mode") not in ("reflect", "constant"):
        raise settings.refusal("seanet.pad_mode", settings.get("seanet.pad_mode"))
    rate, size = settings.number("sample_rate"), settings.number("rvq.bins")
    codebooks = settings.number("rvq.n_q", _MOST_LAYERS)
    width = settings.number("seanet.dimension")
    return {
        "model_type": "encodec",
        "sampling_rate": rate,
        "audio_channels": settings.number("channels", 2),
        "normalize": False,
        "chunk_length_s": None,
        "use_causal_conv": False,
        "use_conv_shortcut": not settings.get("seanet.true_skip", True),
        "pad_mode": settings.get("seanet.pad_mode"),
        "upsampling_ratios": ratios,
        "hidden_size": width,
        "codebook_dim": width,
        "codebook_size": size,
        "num_filters": settings.number("seanet.n_filters"),
        "num_residual_layers": settings.number("seanet.n_residual_layers", 64),
        "num_lstm_layers": settings.number("seanet.lstm", 64),
        "kernel_size": settings.number("seanet.kernel_size"),
        "last_kernel_size": settings.number("seanet.last_kernel_size"),
        "residual_kernel_size": settings.number("seanet.residual_kernel_size"),
        "dilation_growth_rate": settings.number("seanet.dilation_base"),
        "compress": settings.number("seanet.compress"),
        "target_bandwidths": [_bandwidth(codebooks, rate, ratios, size)],
    }


def _bandwidth(codebooks: int, rate: int, ratios: Sequence[int], size: int) -> float:
    """kbit/s that pay for so many codebooks: transformers counts them by it, rounding down."""
    bits = math.ceil(rate / math.prod(ratios)) * math.ceil(math.log2(size))
    exact = codebooks * bits / 1000
    return exact if 1000 * exact // bits == codebooks else math.nextafter(exact, math.inf)


_TO_AUDIOCRAFT = [
    (
        r"^style\.rvq\.(\d+)\.weight",
        r"condition_provider.conditioners.self_wav.rvq.vq.layers.\1._codebook.embed",
    ),
    (r"^style\.", "condition_provider.conditioners.self_wav."),
    (r"^audio_enc_to_dec_proj", "condition_provider.conditioners.self_wav.output_proj"),
    (r"^enc_to_dec_proj", "condition_provider.conditioners.description.output_proj"),
    (r"^decoder\.lm_heads", "linears"),
    (r"^decoder\.model\.decoder\.embed_tokens", "emb"),
    (r"^decoder\.model\.decoder\.layer_norm", "out_norm"),
    (r"^decoder\.model\.decoder\.layers", "transformer.layers"),
    (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm_cross"),
    (r"final_layer_norm", "norm2"),
    (r"encoder_attn", "cross_attention"),
    (r"\.fc([12])\.", r".linear\1."),
    (r"[qkv]_proj\.weight$", "in_proj_weight"),
    (r"^audio_encoder\.quantizer\.layers\.(\d+)\.codebook", r"quantizer.vq.layers.\1._codebook"),
    (r"^audio_encoder\.(encoder|decoder)\.layers", r"\1.model"),
    (r"\.parametrizations\.weight\.original0", ".weight_g"),
    (r"\.parametrizations\.weight\.original1", ".weight_v"),
    (r"\.conv\.(bias|weight_[gv])$", r".conv.conv.\1"),
]


def name_of(key: str, codec: JsonObject) -> tuple[str, int | None]:
    """audiocraft's name for transformers' `key`, and which third of that weight it is, if one.

    audiocraft keeps queries, keys and values in one weight, in this order.
    """
    name = key
    for pattern, replacement in _TO_AUDIOCRAFT:
        name = re.sub(pattern, replacement, name)
    third = re.search(r"\.([qkv])_proj\.weight$", key)
    layer = re.match(r"decoder\.model\.(\d+)\.conv\.conv\.", name)
    # In the codec's decoder: a convolution, the LSTM, then an ELU, an upsampling and residuals.
    block = 2 + codec["num_residual_layers"]
    upsampling = range(3, 3 + block * len(codec["upsampling_ratios"]), block)
    if layer and int(layer[1]) in upsampling:
        name = name.replace(".conv.conv.", ".convtr.convtr.")
    return name, "qkv".index(third[1]) if third else None
