"""The decoder and its text encoder: a MusicGen of any size, made to learn on little compute.

Three departures from transformers' initial weights, none from its architecture:
- fan-in scaled weights, since the stock deviation of 0.02 learns far more slowly at this size;
- heads that start out looking a fixed number of frames back (`implant_lags`). With sinusoidal
  positions, a rotation of the query makes q(t)·k(s) largest at s = t - lag. The lags are the
  previous frames, and one beat and one loop ago at the composer's tempi, minus one frame: what
  was heard there is what comes next. Copying, which is what a steady rhythm is, need not be found
  by chance, and training is free to move the heads elsewhere;
- output heads that start as their codebook's embeddings, so that a copied frame is a guess.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from training.presets import DecoderSize
from training.styles import STYLES

HIGHEST_SLOW_FREQUENCY = 0.008  # radians a frame; slower position channels are nearly constant


def make_model(
    codec: EncodecConfig, words: int, size: DecoderSize, *, stereo: bool = False, loops: bool = True
) -> MusicgenForConditionalGeneration:
    """Untrained, in float32; `words` is the tokenizer's length. Without `loops` no heads look a
    loop or a beat back: for songs at any tempo."""
    text = T5Config(
        vocab_size=-(-words // 64) * 64,
        d_model=size.text_hidden,
        d_kv=32,
        d_ff=2 * size.text_hidden,
        num_layers=size.text_layers,
        num_heads=4,
        dropout_rate=0.05,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=codec.codebook_size,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        ffn_dim=size.feed_forward,
        max_position_embeddings=2048,
        num_codebooks=codec.num_quantizers * (2 if stereo else 1),
        audio_channels=2 if stereo else 1,
        pad_token_id=codec.codebook_size,
        bos_token_id=codec.codebook_size,
        dropout=0.0,
        activation_function="gelu",
    )
    config = MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=codec.to_dict(), decoder=decoder.to_dict()
    )
    model = MusicgenForConditionalGeneration(config)
    _scale_weights(model, size)
    plan = lag_plan(size.heads, size.layers, codec.num_quantizers)
    implant_lags(model, plan if loops else plan[:1], size)
    if not loops:
        implant_matching(model, size)
    return model


@torch.no_grad()
def _scale_weights(model: MusicgenForConditionalGeneration, size: DecoderSize) -> None:
    for embedding in model.decoder.model.decoder.embed_tokens:
        embedding.weight.normal_(0, 0.25)
    for name, weight in model.decoder.model.decoder.layers.named_parameters():
        if weight.dim() == 2:
            into_stream = "out_proj" in name or "fc2" in name
            depth = math.sqrt(2 * size.layers) if into_stream else 1
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]) / depth)
    model.enc_to_dec_proj.weight.normal_(0, 1 / math.sqrt(size.text_hidden))
    model.enc_to_dec_proj.bias.zero_()
    model.text_encoder.shared.weight.normal_(0, 1.0)
    for block in model.text_encoder.encoder.block:  # every word begins as itself
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[-1].DenseReluDense.wo.weight.zero_()


def lag_plan(heads: int, layers: int, books: int = 4) -> list[list[tuple[int, int]]]:
    """(lag in frames, codebook) of the first layers' heads: what came just before, then a loop
    ago, then a beat ago. In the first layer a head passes on all codebooks."""
    sixteenths = sorted({n for style in STYLES.values() for n in style.sixteenths})
    loops = sorted({n * (32 if n <= 7 else 16) for n in sixteenths})
    copies = [(loop - 1, book) for book in range(books) for loop in loops]
    copies += [(4 * n - 1, 0) for n in sixteenths]
    rows = [[(lag, -1) for lag in range(1, min(heads, 6) + 1)]]
    while copies and len(rows) < max(2, layers - 2):
        rows.append(copies[:heads])
        copies = copies[heads:]
    return rows


@torch.no_grad()
def implant_lags(
    model: MusicgenForConditionalGeneration,
    plan: list[list[tuple[int, int]]],
    size: DecoderSize,
    gain: float = 2.0,
    copied: float = 0.35,
) -> None:
    """Point the first layers' heads at fixed lags (`lag_plan`), to pass on what they see there.

    Fast-turning position channels are kept free of content, so that the heads can tell frames
    apart; each codebook has a share of the slow ones, and a head copies one codebook. `gain` sets
    how sharply a head looks (measured at 2.0, hidden size 256: more than 0.8 of its attention on
    the one frame before training, 0.95 after 430 steps).
    """
    decoder, hidden, width = model.decoder.model.decoder, size.hidden, size.hidden // size.heads
    half, rows = hidden // 2, len(decoder.embed_tokens)
    frequency = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    fast = int((frequency > HIGHEST_SLOW_FREQUENCY).sum())
    position = torch.cat([torch.arange(fast), half + torch.arange(fast)])
    content = torch.cat([torch.arange(fast, half), half + torch.arange(fast, half)])
    channels = model.config.decoder.audio_channels
    share = min(width, len(content) * channels // rows)
    places = [content[k * share : (k + 1) * share] for k in range(rows // channels)]
    chosen = torch.linspace(0, 0.18 * (half - 1), width // 2).round().long()
    for row, embedding in enumerate(decoder.embed_tokens):
        embedding.weight.zero_()
        embedding.weight[:, places[row // channels]] = (
            torch.randn(len(embedding.weight), share) * 0.25 * math.sqrt(hidden / share / channels)
        )
    for name, weight in decoder.layers.named_parameters():
        if "out_proj" in name or "fc2" in name:
            weight[position] *= 0.05
    for layer, lags in enumerate(plan):
        attention = decoder.layers[layer].self_attn
        decoder.layers[layer].self_attn_layer_norm.bias[position] = 0.3  # undoes the norm's mean
        for head, (lag, book) in enumerate(lags):
            at = slice(head * width, (head + 1) * width)
            query, key = _lag_weights(frequency[chosen], chosen, lag, hidden)
            strength = math.sqrt(gain * math.sqrt(width))
            attention.q_proj.weight[at] = query * strength
            attention.k_proj.weight[at] = key * strength
            attention.v_proj.weight[at][:, position] = 0
            if book < 0:
                continue
            seen = torch.eye(width, share)
            attention.v_proj.weight[at] = 0
            attention.v_proj.weight[at, places[book]] = seen
            mixed = torch.randn(len(content), width) / math.sqrt(len(content))
            attention.out_proj.weight[:, at] = 0
            attention.out_proj.weight[content, at] = mixed * copied
            attention.out_proj.weight[places[book], at] += seen.T * copied
    for head, embedding in zip(model.decoder.lm_heads, decoder.embed_tokens, strict=True):
        head.weight.copy_(embedding.weight[: head.out_features] * 0.15)


@torch.no_grad()
def implant_matching(
    model: MusicgenForConditionalGeneration,
    size: DecoderSize,
    sharpness: float = 2.0,
    copied: float = 3.0,
) -> None:
    """Heads of the second layer that look for what the last frames were like before, and copy on.

    After `implant_lags` with its first layer alone: for songs at any tempo, whose loops have any
    length. Each lag's head of the first layer writes a small random projection of the frame it
    sees into channels of its own. The second layer's query is made of the frames at t, t - 1, …,
    its key of those at s - 1, s - 2, …: they agree where the music at s goes on as it will at t.
    Of each codebook one head copies what is at s ("induction heads", Olsson et al. 2022).
    """
    decoder, hidden, width = model.decoder.model.decoder, size.hidden, size.hidden // size.heads
    half, channels = hidden // 2, model.config.decoder.audio_channels
    books, lags = len(decoder.embed_tokens) // channels, min(size.heads, 6)
    if size.layers < 2 or size.heads < books:
        return
    frequency = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    fast = int((frequency > HIGHEST_SLOW_FREQUENCY).sum())
    content = torch.cat([torch.arange(fast, half), half + torch.arange(fast, half)])
    slot = width // (lags - 1)
    share = min(width, (len(content) - lags * slot) // books)
    coded, rest = content[: books * share], content[books * share :]
    for row, embedding in enumerate(decoder.embed_tokens):
        place, scale = coded[row // channels :: books], math.sqrt(hidden / share / channels)
        embedding.weight.zero_()
        embedding.weight[:, place] = torch.randn(len(embedding.weight), share) * 0.25 * scale
    reduced = torch.randn(slot, len(coded)) / math.sqrt(len(coded))
    first, second = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    for lag in range(lags):
        at = slice(lag * width, (lag + 1) * width)
        first.v_proj.weight[at] = 0
        first.out_proj.weight[:, at] = 0
        first.v_proj.weight[lag * width : lag * width + slot, coded] = reduced
        first.out_proj.weight[rest[lag * slot : (lag + 1) * slot], at] = torch.eye(slot, width)
    query, key = torch.zeros(width, hidden), torch.zeros(width, hidden)
    query[:slot, coded] = reduced
    for step in range(lags - 1):
        at = slice(step * slot, (step + 1) * slot)
        if step:
            query[at, rest[(step - 1) * slot : step * slot]] = torch.eye(slot)
        key[at, rest[at]] = torch.eye(slot)
    for book in range(books):
        at = slice(book * width, (book + 1) * width)
        second.q_proj.weight[at], second.k_proj.weight[at] = query * sharpness, key
        second.v_proj.weight[at] = 0
        second.out_proj.weight[:, at] = 0
        second.v_proj.weight[at, coded[book::books]] = torch.eye(width, share)
        second.out_proj.weight[coded[book::books], at] = torch.eye(share, width) * copied
    for head, embedding in zip(model.decoder.lm_heads, decoder.embed_tokens, strict=True):
        head.weight.copy_(embedding.weight[: head.out_features] * 0.15)


def _lag_weights(
    frequency: Tensor, channel: Tensor, lag: int, hidden: int
) -> tuple[Tensor, Tensor]:
    """Query and key [2 · frequencies, hidden] with q(t)·k(s) = sum of cos w(t - lag - s)."""
    pairs, half = len(channel), hidden // 2
    even, odd = 2 * torch.arange(pairs), 2 * torch.arange(pairs) + 1
    query, key = torch.zeros(2 * pairs, hidden), torch.zeros(2 * pairs, hidden)
    cos, sin = torch.cos(frequency * lag), torch.sin(frequency * lag)
    query[even, channel], query[even, half + channel] = cos, sin
    query[odd, half + channel], query[odd, channel] = cos, -sin
    key[even, channel], key[odd, half + channel] = 1.0, 1.0
    return query, key


def corrupted(inputs: Tensor, start: int, most: float) -> Tensor:
    """Replace up to a share `most` of each row's codes, singly and by frames, by codes heard at
    other times of the same clip: wrong but plausible, as sampling errors are."""
    batch, rows, steps = inputs.shape
    device = inputs.device
    times = torch.randint(rows, steps, (batch, 1, steps), device=device).expand_as(inputs)
    share = torch.rand(batch, 1, 1, device=device) * most
    share = share * (torch.rand(batch, 1, 1, device=device) < 0.85)
    hit = torch.rand(inputs.shape, device=device) < share
    hit |= torch.rand(batch, 1, steps, device=device) < 0.3 * share
    return torch.where(hit & (inputs != start), inputs.gather(2, times), inputs)


def code_logits(
    model: MusicgenForConditionalGeneration,
    inputs: Tensor,
    states: Tensor,
    mask: Tensor,
    frames: int,
) -> list[Tensor]:
    """Logits of each row's codes, [batch, frames, codes] a row, from delayed inputs.

    `mask` [batch, words] is 0 where the states count for nothing; a row of zeros is the null
    condition: states of exactly 0 as in `generate`, attended to rather than masked, which is the
    same and leaves no row without keys.
    """
    projected = model.enc_to_dec_proj(states) * mask[..., None]
    attended = torch.where(mask.any(1, keepdim=True), mask, torch.ones_like(mask))
    batch, rows, steps = inputs.shape
    hidden = model.decoder.model(
        inputs.reshape(batch * rows, steps),
        encoder_hidden_states=projected,
        encoder_attention_mask=attended,
        use_cache=False,
    )[0]
    channels = model.config.decoder.audio_channels
    heads = model.decoder.lm_heads
    return [
        head(hidden[:, row // channels : row // channels + frames])
        for row, head in enumerate(heads)
    ]


@torch.no_grad()
def widen_to_stereo(mono: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mono decoder's weights as a stereo one's start: both sides begin as the mono codebook."""
    wide = {}
    for name, weight in mono.items():
        found = re.fullmatch(r"(decoder\..*(embed_tokens|lm_heads)\.)(\d+)(\.weight)", name)
        if not found:
            wide[name] = weight
            continue
        stem, kind, book, tail = found.groups()
        for side in (0, 1):
            share = 0.5 if kind == "embed_tokens" else 1.0  # embeddings are summed
            wide[f"{stem}{2 * int(book) + side}{tail}"] = weight * share
    return wide


def trained_state(model: MusicgenForConditionalGeneration) -> dict[str, Tensor]:
    """All weights but the codec's, which the decoder's training never touches."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("audio_encoder.")}
