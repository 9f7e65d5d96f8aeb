"""The codec: an audio prompt into codes, and codes into audio as a stream without seams.

EnCodec's decoder (Défossez et al. 2022, arXiv 2210.13438; transformers' `EncodecModel` is the
reference) is a chain of convolutions that look ahead, an LSTM, and transposed convolutions, all
of which reflect the signal at its ends. Here every layer is a stage that is pushed new time steps
and returns those of its output that are final: a convolution keeps the few inputs that its kernel
still needs, the LSTM keeps its state, and padding is added where the signal begins and ends. So
nothing is decoded twice, the one-shot decode is the stream itself, and the lookahead of the
kernels is all the delay there is: 3.75 frames for Meta's 32 kHz codec, whose first samples come
with the fourth frame.

Activations are [batch, time, channels], contiguous, one batch row a channel of the music. A
transposed convolution of stride s and kernel 2s is then a plain convolution of kernel 2, whose
output channels are read as s time steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

from musicgen_ui.request import RequestError

PIECE_FRAMES = 50  # the one-shot decode goes in pieces, so that activations stay in the cache


class Codec:
    """EnCodec's weights in the shape that decoding wants; immutable, so streams can share it.

    It packs copies of the decoder's weights and of the codebooks, and encodes through transformers'
    encoder modules, which it moves to `device` in float32 and keeps. The caller may drop the
    `EncodecModel`; with `release` it is emptied of what was packed, and can then no longer decode.

    Raises:
        RequestError: a codec of a kind that MusicGen does not use.
    """

    def __init__(
        self,
        encodec: EncodecModel,
        channels: int = 1,
        device: torch.device | str = "cpu",
        release: bool = False,
    ) -> None:
        config = encodec.config
        _check(config)
        self.channels = channels  # of the music; EnCodec itself hears one at a time
        self.device = torch.device(device)
        self.sampling_rate: int = config.sampling_rate  # Hz
        self.hop: int = config.hop_length  # samples a frame
        self.frame_rate: int = config.frame_rate  # frames a second
        self.codebooks: int = config.num_quantizers  # a channel
        self.codebook_size: int = config.codebook_size
        module: Any = encodec  # torch's stubs know nothing of a module's parts
        module.to(self.device, torch.float32).eval()
        books = [layer.codebook.embed for layer in module.quantizer.layers]
        self.tables = torch.stack(books[: self.codebooks])  # [codebooks, codebook_size, dim]
        self.stages = _stages(module.decoder.layers)
        if release:
            module.decoder.layers = nn.ModuleList()
        self._encodec = module

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, the encoder's included."""
        held = [*_tensors([self.tables, self.stages]), *self._encodec.encoder.parameters()]
        return sum(tensor.nbytes for tensor in held)

    @torch.inference_mode()
    def encode(self, samples: Tensor) -> Tensor:
        """Audio as codes: float32 [channels, samples] to int64 [channels * codebooks, frames].

        Samples of whole frames. In stereo the rows interleave: left 0, 2, …, right 1, 3, ….
        """
        encoder, quantizer = self._encodec.encoder, self._encodec.quantizer
        audio = samples.to(self.device, torch.float32)
        # Each channel alone, as transformers does: rounding decides between near codes.
        codes = [quantizer.encode(encoder(channel[None, None])) for channel in audio]
        return torch.cat(codes, dim=1)[: self.codebooks].flatten(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes as audio: int64 [channels * codebooks, frames] to float32 [channels, samples]."""
        stream = self.stream()
        pieces = codes.split(PIECE_FRAMES, dim=1)
        audio = [stream.push(piece, last=piece is pieces[-1]) for piece in pieces]
        return torch.cat(audio, dim=1)

    def stream(self) -> CodecStream:
        """A new stream of frames into audio."""
        return CodecStream(self)


class CodecStream:
    """One signal on its way from codes to audio. Its pushes joined are the one-shot decode."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._pasts = [Past() for _ in codec.stages]
        self._begun = self._ended = False

    @torch.inference_mode()
    def push(self, codes: Tensor, last: bool = False) -> Tensor:
        """Takes new frames and returns the samples that are final now.

        int64 [channels * codebooks, frames], 0 frames or more, to float32 [channels, samples].
        `last` ends the signal and returns all that was held back.
        """
        codec = self._codec
        if self._ended:
            raise ValueError("The stream has ended; begin another.")
        self._ended = last
        self._begun = self._begun or codes.shape[1] > 0
        if not self._begun:
            return codes.new_zeros(codec.channels, 0, dtype=torch.float32)
        # [codebooks, channels, frames]
        codes = codes.to(codec.device).unflatten(0, (codec.codebooks, codec.channels))
        latents = map(F.embedding, codes, codec.tables)
        x = torch.stack(list(latents)).sum(0)  # [channels, frames, dim]
        for stage, past in zip(codec.stages, self._pasts, strict=True):
            x = stage.push(x, past, last)
        return x[..., 0]


@dataclass
class Past:
    """What a stage remembers of one stream."""

    inputs: Tensor | None = None  # [batch, time, channels] that a kernel still needs
    begun: bool = False  # the padding before the signal is done
    hidden: list[tuple[Tensor, Tensor]] | None = None  # of an LSTM: (h, c) a layer


class Convolution:
    """A convolution of stride 1 that reflects the signal at its ends, after an optional ELU."""

    def __init__(self, layer: Any, elu: bool = False) -> None:
        conv = layer.conv
        span = (conv.kernel_size[0] - 1) * conv.dilation[0]
        self.right = 0 if layer.causal else span // 2
        self.left = span - self.right
        self.dilation = conv.dilation[0]
        self.elu = elu
        self.weight, self.bias = _packed(conv.weight), conv.bias.detach().clone()

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, in] to [batch, time less the delay, out]."""
        return self(self.stretch(F.elu(x) if self.elu else x, past, last))

    def stretch(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """The inputs of all outputs that `x` makes final."""
        if past.inputs is not None:
            x = torch.cat([past.inputs, x], dim=1)
        right = self.right if last else 0
        if past.begun:
            x = _reflect(x, 0, right)
        elif last or x.shape[1] > self.left:
            x = _reflect(x, self.left, right)
            past.begun = True
        span = self.left + self.right
        past.inputs = x[:, max(0, x.shape[1] - span) :] if past.begun else x
        return x if past.begun else x[:, :0]

    def __call__(self, x: Tensor) -> Tensor:
        """Without padding: [batch, time, in] to [batch, time - span, out]."""
        if x.shape[1] <= self.left + self.right:
            return x.new_zeros(x.shape[0], 0, len(self.bias))
        return _convolve(x, self.weight, self.bias, self.dilation)


class Recurrence:
    """An LSTM with its input added."""

    def __init__(self, layer: Any) -> None:
        weights = [w.detach().clone() for w in layer.lstm.parameters()]
        # a layer: input weight, hidden weight [4 * hidden, hidden], their biases [4 * hidden]
        self.layers = [weights[i : i + 4] for i in range(0, len(weights), 4)]

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, hidden] to the same shape, without delay."""
        zeros = x.new_zeros(x.shape[0], x.shape[2])
        past.hidden = past.hidden or [(zeros, zeros)] * len(self.layers)
        y = x
        for i, weights in enumerate(self.layers):
            y, past.hidden[i] = _recur(y, *past.hidden[i], *weights)
        return x + y


class Residual:
    """ELU, convolution, ELU, convolution of kernel 1, beside the input or its projection."""

    def __init__(self, block: Any) -> None:
        self.wide = Convolution(block.block[1])
        self.narrow = Convolution(block.block[3])
        shortcut = block.shortcut
        self.shortcut = None if isinstance(shortcut, nn.Identity) else Convolution(shortcut)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, channels] to [batch, time less the delay, channels]."""
        x = self.wide.stretch(x, past, last)
        y = self.narrow(F.elu_(self.wide(F.elu(x))))
        x = x[:, self.wide.left : self.wide.left + y.shape[1]]
        return y.add_(self.shortcut(x) if self.shortcut else x)


class Upsampling:
    """ELU, then a transposed convolution of stride s and kernel 2s."""

    def __init__(self, layer: Any) -> None:
        conv = layer.conv
        self.stride = conv.stride[0]
        half = self.stride // 2
        self.right = math.ceil(self.stride * layer.trim_right_ratio) if layer.causal else half
        self.left = self.stride - self.right  # trimmed samples before and after the signal
        # An input reaches s steps with the first half of the kernel, the next s with the second.
        now, later = conv.weight.detach().split(self.stride, dim=2)  # [in, out, s]
        weight = torch.stack([later, now], dim=-1)  # [in, out, s, 2]
        self.weight = _packed(weight.permute(2, 1, 0, 3).flatten(0, 1))
        self.bias = conv.bias.detach().repeat(self.stride)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, in] to [batch, s * time less the delay, out]."""
        x = F.elu(x)
        silence = x.new_zeros(x.shape[0], 1, x.shape[2])
        before = silence if past.inputs is None else past.inputs
        x = torch.cat([before, x, silence] if last else [before, x], dim=1)
        past.inputs = x[:, -1:]
        if x.shape[1] < 2:
            return x.new_zeros(x.shape[0], 0, len(self.bias) // self.stride)
        y = _convolve(x, self.weight, self.bias).unflatten(2, (self.stride, -1)).flatten(1, 2)
        begin = 0 if past.begun else self.left
        past.begun = True
        return y[:, begin : y.shape[1] - self.right if last else None]


Stage = Convolution | Recurrence | Residual | Upsampling


def _check(config: EncodecConfig) -> None:
    if config.norm_type != "weight_norm" or config.pad_mode != "reflect":
        raise RequestError("This codec's normalisation or padding is not supported.")
    if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
        raise RequestError("Only codecs that hear one channel, whole and as loud as it is, fit.")


def _stages(layers: nn.ModuleList) -> list[Stage]:
    stages: list[Stage] = []
    for layer in layers:
        match type(layer).__name__:
            case "EncodecConv1d":
                stages.append(Convolution(layer, elu=bool(stages)))
            case "EncodecLSTM":
                stages.append(Recurrence(layer))
            case "EncodecConvTranspose1d":
                stages.append(Upsampling(layer))
            case "EncodecResnetBlock":
                stages.append(Residual(layer))
    return stages


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, list):
        return [tensor for part in held for tensor in _tensors(part)]
    return _tensors(list(vars(held).values())) if isinstance(held, Stage) else []


def _packed(weight: Tensor) -> Tensor:
    """[out, in, kernel] in the layout for [batch, time, channels] activations."""
    return weight.detach()[:, :, None].clone(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """[batch, time + span, in] to [batch, time, out]."""
    image = x.transpose(1, 2)[:, :, None]  # [batch, in, 1, time], channels last in memory
    return F.conv2d(image, weight, bias, dilation=(1, dilation))[:, :, 0].transpose(1, 2)


def _reflect(x: Tensor, left: int, right: int) -> Tensor:
    """Mirrors both ends of [batch, time, channels]; a shorter signal counts as ending in zeros."""
    missing = max(0, max(left, right) + 1 - x.shape[1])
    x = F.pad(x, (0, 0, 0, missing))
    mirrored = [x[:, 1 : left + 1].flip(1), x, x[:, x.shape[1] - 1 - right : -1].flip(1)]
    x = torch.cat(mirrored, dim=1)
    return x[:, : x.shape[1] - missing]


def _recur(
    x: Tensor, h: Tensor, c: Tensor, w_in: Tensor, w_hid: Tensor, b_in: Tensor, b_hid: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A layer of an LSTM over [batch, time, hidden], and its state (h, c) after it."""
    projected = F.linear(x, w_in, b_in + b_hid)
    outputs = []
    for gates in projected.unbind(1):
        i, f, g, o = F.linear(h, w_hid).add_(gates).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, dim=1) if outputs else x, (h, c)
