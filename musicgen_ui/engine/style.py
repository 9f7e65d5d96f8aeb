"""The style of a clip as states: MERT's features through a bottleneck, five tokens a second.

MusicGen-Style (Rouard et al. 2024, "Audio Conditioning for Music Generation via Discrete Bottleneck
Features", arXiv 2407.12563, section 4) is conditioned on a few seconds of music. MERT's features
(Li et al. 2023, arXiv 2306.00107), 75 a second, go through a transformer and a batch norm, are
quantized by residual codebooks, and every 15th is kept. The fewer codebooks, the less of the clip
passes, so that the music takes on its style and not its notes. audiocraft's `StyleConditioner` is
the reference.

MERT has HuBERT's architecture, so transformers' `HubertModel` computes it. It hears the samples
without normalisation, as in audiocraft. All of it is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.device import keep_for_this_stream
from musicgen_ui.engine.lora import NO_LAYER, AppliedAdapter, RowAdapters
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

if TYPE_CHECKING:
    from transformers import HubertConfig

_NORM_EPS = 1e-5  # of the batch norm
_LONGEST_PERIOD = 10_000.0  # of the sinusoids of positions


class Mert(TypedDict):
    """The configuration of MERT."""

    sampling_rate: int  # Hz
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_dim: list[int]
    conv_stride: list[int]
    conv_kernel: list[int]
    conv_bias: bool
    num_conv_pos_embeddings: int
    num_conv_pos_embedding_groups: int


class Style(TypedDict, total=False):
    """The "style" of a checkpoint's configuration; empty in others."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_quantizers: int
    codebook_size: int
    downsampling: int  # features a token
    mert: Mert


class StyleEncoder(nn.Module):
    """Samples to style tokens. Its weights are named as audiocraft names them.

    Args:
        config: the "style" of a checkpoint's `config.json`; see `checkpoints.config.STYLE`.
    """

    def __init__(self, config: Style) -> None:
        from transformers import HubertModel

        super().__init__()
        hidden: int = config["hidden_size"]
        self.mert = HubertModel(hubert_config(config["mert"]))
        self.sampling_rate: int = config["mert"]["sampling_rate"]  # Hz
        self.embed = nn.Linear(config["mert"]["hidden_size"], hidden)
        self.transformer = nn.Module()
        heads: int = config["num_attention_heads"]
        layers = (_Layer(hidden, heads) for _ in range(config["num_hidden_layers"]))
        self.transformer.layers = nn.ModuleList(layers)
        self.batch_norm = _BatchNorm(hidden)
        books = (
            nn.Embedding(config["codebook_size"], hidden) for _ in range(config["num_quantizers"])
        )
        self.rvq = nn.ModuleList(books)
        self.downsampling: int = config["downsampling"]  # features a token

    @property
    def codebooks(self) -> int:
        """Residual codebooks, at most."""
        return len(self.rvq)

    def forward(self, samples: Tensor, codebooks: int) -> Tensor:
        """Style tokens, float32 [tokens, hidden].

        Args:
            samples: float32 [samples] at `sampling_rate`.
            codebooks: how many of the residual codebooks to use, the first ones.
        """
        features: Tensor = self.mert(samples[None]).last_hidden_state
        x = self.embed(features)
        x = x + _sinusoids(x.shape[1], x.shape[2]).to(x)
        for layer in cast(nn.ModuleList, self.transformer.layers):
            x = layer(x)
        return self._quantized(self.batch_norm(x)[0], codebooks)[:: self.downsampling]

    def _quantized(self, x: Tensor, codebooks: int) -> Tensor:
        """The sum of the nearest codes, each codebook's of what those before leave, [n, hidden]."""
        total = torch.zeros_like(x)
        for book in list(self.rvq)[:codebooks]:
            codes: Tensor = cast(nn.Embedding, book).weight
            rest = x - total
            distances = codes.square().sum(1) - 2 * rest @ codes.T  # less the same for every code
            total = total + codes[distances.argmin(1)]
        return total


def hubert_config(mert: Mapping[str, Any], masked: float = 0.0) -> HubertConfig:
    """transformers' configuration of MERT.

    Args:
        mert: its own, see `checkpoints.config.MERT`.
        masked: the share of the features that its training masked. Where it is 0, there is no
            embedding for them, which only training needs.
    """
    from transformers import HubertConfig

    values = {key: value for key, value in mert.items() if key != "sampling_rate"}
    return HubertConfig(**values, mask_time_prob=masked, layerdrop=0.0)


class _Layer(nn.Module):
    """A transformer layer: norm first, all positions attend to all, no biases."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.self_attn = nn.MultiheadAttention(hidden, heads, bias=False, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden)
        self.linear1 = nn.Linear(hidden, 4 * hidden, bias=False)
        self.linear2 = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, n, hidden] to the same."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, normed, need_weights=False)[0]
        up: Tensor = self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return x + up


class _BatchNorm(nn.Module):
    """Batch normalisation by the mean and variance of the training, without scale and shift."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        # Parameters: all weights are checked and copied as such.
        self.running_mean = nn.Parameter(torch.zeros(hidden), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(hidden), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, n, hidden] to the same."""
        return (x - self.running_mean) * torch.rsqrt(self.running_var + _NORM_EPS)


def _sinusoids(count: int, width: int) -> Tensor:
    """Embeddings of positions, cosines then sines: float32 [count, width]."""
    half = width // 2
    periods = _LONGEST_PERIOD ** (torch.arange(half) / (half - 1))
    phases = torch.arange(count)[:, None] / periods
    return torch.cat([phases.cos(), phases.sin()], dim=1)


class StyleConditioner:
    """The style clips of requests as states of the decoder.

    Args:
        encoder: of the checkpoint.
        projection: from its tokens to the decoder's width.
    """

    def __init__(self, encoder: StyleEncoder, projection: nn.Module) -> None:
        self.encoder = encoder
        self.projection = projection
        self._tokens: WeakKeyDictionary[Clip, dict[tuple[float, float, int], Tensor]] = (
            WeakKeyDictionary()
        )

    @torch.inference_mode()
    def states(self, request: GenerationRequest, adapter: AppliedAdapter | None = None) -> Tensor:
        """The style of a request, [tokens, hidden]; one token of zeros without a clip.

        Raises:
            RequestError: the checkpoint has fewer codebooks than asked for.
        """
        weight = next(self.projection.parameters())
        if request.style is None:
            return weight.new_zeros(1, len(weight))
        tokens = self.tokens(request)
        keep_for_this_stream(tokens)
        tokens = tokens.to(weight)
        adapters = RowAdapters.of([(adapter, len(tokens))])
        return adapters.product(NO_LAYER, "audio_enc_to_dec_proj", self.projection, tokens)

    @torch.inference_mode()
    def tokens(self, request: GenerationRequest) -> Tensor:
        """The tokens of a request's excerpt, float32 [tokens, hidden of the style].

        Computed once for all variations and windows.

        Raises:
            RequestError: as `states`.
        """
        assert request.style
        if request.style_codebooks > self.encoder.codebooks:
            raise RequestError(
                f"This checkpoint has {self.encoder.codebooks} style codebooks, not "
                f"{request.style_codebooks}: choose at most as many.",
                "style_codebooks",
            )
        of_clip = self._tokens.setdefault(request.style, {})
        key = (request.style_start_s, request.style_length_s, request.style_codebooks)
        if key not in of_clip:
            of_clip[key] = self.encode(request.style_excerpt, request.style_codebooks)
        return of_clip[key]

    @torch.inference_mode()
    def encode(self, excerpt: Clip, codebooks: int) -> Tensor:
        """The tokens of an excerpt, float32 [tokens, hidden of the style]."""
        samples = audio.convert(excerpt, self.encoder.sampling_rate, 1).samples[0]
        device = next(self.encoder.parameters()).device
        tokens: Tensor = self.encoder(torch.from_numpy(samples).to(device), codebooks)
        return tokens


def double_guided(
    prompts: tuple[tuple[str, float], ...], text_guidance: float
) -> tuple[tuple[str, float], ...]:
    """Prompts with weights for double guidance: the style alone is one more, the prompt "".

    Guidance goes away from uncond, past cond, and here cond itself goes away from the style alone,
    past both: style + β · (both - style) (arXiv 2407.12563, section 4.3), which is a mix of the two
    with the weights β and 1 - β.
    """
    if not any(text for text, _ in prompts):
        return prompts
    weights = {text: weight * text_guidance for text, weight in prompts}
    weights[""] = weights.get("", 0.0) + 1 - text_guidance
    return tuple((text, weight) for text, weight in weights.items() if weight)
