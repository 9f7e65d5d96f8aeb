"""The same arithmetic as transformers' EnCodec and MusicGen, in few, asynchronous GPU operations.

transformers computes a convolution's padding on the device and waits for it, and gives attention a
mask where the flash kernel needs none. These functions run on the modules' own weights, so what is
trained with them loads and runs as ever; tests hold them against the modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncodecModel, MusicgenForConditionalGeneration, T5EncoderModel
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)


def through_codec(layers: nn.ModuleList, x: Tensor, half: bool = False) -> Tensor:
    """The layers of an EncodecEncoder or EncodecDecoder: [clips, channels, time] whole hops long.

    With `half` all but the first and last convolution run in bfloat16; the result is float32.
    """
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half and 0 < i < last):
            x = _layer(layer, x if half and 0 < i < last else x.float())
    return x


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    match layer:
        case EncodecConv1d():
            return _convolution(layer, x)
        case EncodecConvTranspose1d():
            return _upsampling(layer, x)
        case EncodecLSTM():
            with torch.autocast(x.device.type, enabled=False):  # it would be float16 in cuDNN
                time_first = x.float().permute(2, 0, 1)
                return (layer.lstm(time_first)[0] + time_first).permute(1, 2, 0)
        case EncodecResnetBlock():
            y = x
            for inner in layer.block:
                y = _layer(inner, y)
            return layer.shortcut(x) + y
    return layer(x)


def _weight(conv: nn.Module) -> Tensor:
    parts = conv.parametrizations.weight
    return torch._weight_norm(parts.original1, parts.original0, 0)


def _convolution(layer: EncodecConv1d, x: Tensor) -> Tensor:
    conv = layer.conv
    stride, dilation = conv.stride[0], conv.dilation[0]
    padding = (conv.kernel_size[0] - 1) * dilation + 1 - stride
    right = padding // 2
    if padding:
        x = F.pad(x, (padding - right, right), mode="reflect")
    return F.conv1d(x, _weight(conv), conv.bias, stride, dilation=dilation)


def _upsampling(layer: EncodecConvTranspose1d, x: Tensor) -> Tensor:
    conv = layer.conv
    stride = conv.stride[0]
    padding = conv.kernel_size[0] - stride
    right = padding // 2
    y = F.conv_transpose1d(x, _weight(conv), conv.bias, stride)
    return y[..., padding - right : y.shape[-1] - right]


def to_codes(codec: EncodecModel, audio: Tensor) -> Tensor:
    """float32 [clips, samples] → int64 [clips, codebooks, frames]."""
    latent = through_codec(codec.encoder.layers, audio[:, None])
    return codec.quantizer.encode(latent, codec.config.target_bandwidths[0]).transpose(0, 1)


def text_states(encoder: T5EncoderModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """States [batch, tokens, hidden] of a T5 encoder, without its dropout."""
    stack = encoder.encoder
    first = stack.block[0].layer[0].SelfAttention
    length = tokens.shape[1]
    bias = first.compute_bias(length, length, device=tokens.device)
    bias = bias + (1 - mask[:, None, None].to(bias.dtype)) * -1e9
    x = encoder.shared(tokens)
    for block in stack.block:
        attention, feed_forward = block.layer[0], block.layer[-1]
        own = attention.SelfAttention
        y = attention.layer_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (own.n_heads, -1)).transpose(1, 2)
            for layer in (own.q, own.k, own.v)
        )
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        x = x + own.o(y.transpose(1, 2).flatten(2))
        dense = feed_forward.DenseReluDense
        x = x + dense.wo(F.relu(dense.wi(feed_forward.layer_norm(x))))
    return stack.final_layer_norm(x)


def code_logits(
    model: MusicgenForConditionalGeneration,
    inputs: Tensor,
    states: Tensor,
    mask: Tensor,
    frames: int,
) -> list[Tensor]:
    """As `lm.code_logits`: [batch, frames, codes] for each row of codes."""
    decoder = model.decoder.model.decoder
    projected = model.enc_to_dec_proj(states) * mask[..., None]
    attended = (mask.bool() | ~mask.bool().any(1, keepdim=True))[:, None, None]
    x = decoder.embed_positions.weights[: inputs.shape[-1]]
    for row, embedding in enumerate(decoder.embed_tokens):
        x = x + embedding(inputs[:, row])
    for layer in decoder.layers:
        y = layer.self_attn_layer_norm(x)
        x = x + _attention(layer.self_attn, y, y, None)
        y = layer.encoder_attn_layer_norm(x)
        x = x + _attention(layer.encoder_attn, y, projected, attended)
        y = layer.final_layer_norm(x)
        x = x + layer.fc2(F.gelu(layer.fc1(y)))
    x = decoder.layer_norm(x)
    channels = model.config.decoder.audio_channels
    return [
        head(x[:, row // channels : row // channels + frames])
        for row, head in enumerate(model.decoder.lm_heads)
    ]


def _attention(attention: nn.Module, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, steps, hidden] over `seen` [batch, keys, hidden]; causal without a mask."""
    heads = attention.num_heads

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key = split(attention.q_proj(x)), split(attention.k_proj(seen))
    value = split(attention.v_proj(seen))
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return attention.out_proj(y.transpose(1, 2).flatten(2))
