"""EnCodec's layers as stages that stream: new time steps in, the output's final time steps out.

A convolution keeps the few inputs that its kernel still needs, the LSTM keeps its state, and
padding is added where the signal begins and ends; what a stage remembers of one stream is a `Past`,
so a stage itself never changes. Activations are [batch, time, channels], contiguous. A transposed
convolution of stride s and kernel 2s is then a matrix product over pairs of neighbours, whose
output channels are read as s time steps.

A kernel is what a stage computes, ELU included: `convolution`'s where the precision allows whole
numbers and the processor multiplies them faster, torch's elsewhere. On x86 the weights of these are
packed once as oneDNN wants them; transformers' modules have them reordered in every call.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import llvmlite.binding
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)

from musicgen_ui.errors import RequestError

Precision = Literal["float32", "int16"]
State = tuple[Tensor, Tensor]  # of an LSTM: h and c, each [layers, batch, hidden]
# Of a convolution in whole numbers. Among narrower ones some must stay in float32, and a rounding
# of theirs, which depends on the pieces, may move a code of the next one: 1e-5 in the audio of a
# test's codec. A limit of 16 would save 0.5 of the bundled codec's 5.4 ms a second of audio (Zen 4,
# one thread).
FEWEST_INPUTS = 32


class Kernel(Protocol):
    """What a stage computes: float32 [batch, time, in] to [batch, outputs in time, out]."""

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The outputs, added to `onto` if that is given."""
        ...


@dataclass
class Past:
    """What a stage remembers of one stream."""

    inputs: Tensor | None = None  # [batch, time, channels] that a kernel still needs
    begun: bool = False  # the padding before the signal is done
    hidden: State | None = None  # of an LSTM

    @property
    def phase(self) -> tuple[object, ...]:
        """Equal for pasts that may be `joined`."""
        waiting = None if self.inputs is None else self.inputs.shape[1]
        return waiting, self.begun, self.hidden is None

    @classmethod
    def joined(cls, pasts: Sequence[Past]) -> Past:
        """The past of several signals, one after the other in the batch."""
        inputs = [past.inputs for past in pasts if past.inputs is not None]
        states = [past.hidden for past in pasts if past.hidden is not None]
        hidden = [torch.cat(each, dim=1) for each in zip(*states, strict=True)]
        return cls(
            torch.cat(inputs) if inputs else None,
            pasts[0].begun,
            (hidden[0], hidden[1]) if hidden else None,
        )

    def parted(self, signals: int) -> list[Past]:
        """The pasts of the signals that were `joined`."""
        inputs: Sequence[Tensor | None] = [None] * signals
        hidden: Sequence[State | None] = [None] * signals
        if self.inputs is not None:
            inputs = self.inputs.chunk(signals)
        if self.hidden is not None:  # cuDNN takes a contiguous state alone
            states = ([each.contiguous() for each in s.chunk(signals, 1)] for s in self.hidden)
            hidden = list(zip(*states, strict=True))
        return [Past(own, self.begun, state) for own, state in zip(inputs, hidden, strict=True)]


class Convolution:
    """A convolution that pads the signal at its ends, after an ELU unless it comes first."""

    def __init__(self, layer: EncodecConv1d, precision: Precision, elu: bool = True) -> None:
        conv = layer.conv
        self.stride: int = conv.stride[0]
        self.reach: int = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1  # inputs of one output
        padding = self.reach - self.stride
        self.right = 0 if layer.causal else padding // 2
        self.left = padding - self.right
        self.pad = _reflect if layer.pad_mode == "reflect" else _silence
        self.width = conv.out_channels
        self.kernel = _convolution(conv, precision, elu)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, in] to [batch, time / stride less the delay, out]."""
        return self(self.stretch(x, past, last))

    def stretch(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """The inputs of all outputs that `x` makes final."""
        if past.inputs is not None:
            x = torch.cat([past.inputs, x], dim=1)
        past.inputs = x
        if not past.begun and not last and x.shape[1] <= self.left:
            return x[:, :0]  # the reflection needs more
        x = self.pad(x, 0 if past.begun else self.left, self.right if last else 0)
        past.begun = True
        past.inputs = x[:, self.outputs(x) * self.stride :].clone()  # a view would hold all of x
        return x

    def outputs(self, x: Tensor) -> int:
        """How many outputs the inputs [batch, time, in] are enough for."""
        return max(0, (x.shape[1] - self.reach) // self.stride + 1)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Without padding: [batch, time, in] to [batch, outputs, out]."""
        if not self.outputs(x):
            return x.new_zeros(x.shape[0], 0, self.width)
        return self.kernel(x, onto)


class Residual:
    """ELU, convolution, ELU, convolution of kernel 1, beside the input or its projection."""

    def __init__(self, block: EncodecResnetBlock, precision: Precision) -> None:
        wide, narrow = block.block[1], block.block[3]
        assert isinstance(wide, EncodecConv1d) and isinstance(narrow, EncodecConv1d)
        self.wide = Convolution(wide, precision)
        self.narrow = Convolution(narrow, precision)
        plain = isinstance(block.shortcut, nn.Identity)
        self.shortcut = None if plain else Convolution(block.shortcut, precision, elu=False)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, channels] to [batch, time less the delay, channels]."""
        x = self.wide.stretch(x, past, last)
        y = self.wide(x)
        x = x[:, self.wide.left : self.wide.left + y.shape[1]]
        return self.narrow(y, self.shortcut(x) if self.shortcut else x)


class Upsampling:
    """ELU, then a transposed convolution of stride s and kernel 2s."""

    def __init__(self, layer: EncodecConvTranspose1d, precision: Precision) -> None:
        conv = layer.conv
        self.stride = conv.stride[0]
        half = self.stride // 2
        self.right = math.ceil(self.stride * layer.trim_right_ratio) if layer.causal else half
        self.left = self.stride - self.right  # steps trimmed before and after the signal
        # An input reaches s steps with the first half of the kernel, the next s with the second.
        now, later = conv.weight.detach().split(self.stride, dim=2)  # [in, out, s]
        pair = torch.stack([later, now], dim=-1)  # [in, out, s, (input before, input)]
        self.width = conv.out_channels
        weight = pair.permute(2, 1, 0, 3).flatten(0, 1)  # [s · out, in, 2]
        assert conv.bias is not None
        self.kernel = _pairs(weight, conv.bias.detach().repeat(self.stride), precision)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, in] to [batch, s * time less the delay, out]."""
        silence = x.new_zeros(x.shape[0], 1, x.shape[2])
        before = silence if past.inputs is None else past.inputs
        x = torch.cat([before, x, silence] if last else [before, x], dim=1)
        past.inputs = x[:, -1:].clone()
        if x.shape[1] < 2:
            return x.new_zeros(x.shape[0], 0, self.width)
        y = self.kernel(x).view(x.shape[0], -1, self.width)
        begin, end = 0 if past.begun else self.left, y.shape[1] - self.right if last else None
        past.begun = True
        return y[:, begin:end]


class Recurrence:
    """An LSTM with its input added."""

    def __init__(self, layer: EncodecLSTM, precision: Precision) -> None:
        lstm: nn.LSTM = layer.lstm
        self.run: Callable[..., tuple[Tensor, State]] = lstm
        if precision == "int16" and _divides(lstm):
            from musicgen_ui.engine.cpu.codec_kernels import Lstm  # imports numba

            self.run = Lstm(lstm)

    def push(self, x: Tensor, past: Past, last: bool) -> Tensor:
        """[batch, time, hidden] to the same shape, without delay."""
        if not x.shape[1]:
            return x
        y, past.hidden = self.run(x.transpose(0, 1), past.hidden)
        return x + y.transpose(0, 1)


Stage = Convolution | Residual | Upsampling | Recurrence


def assemble(layers: nn.ModuleList, precision: Precision) -> list[Stage]:
    """The layers of transformers' `EncodecEncoder` or `EncodecDecoder`, float32, as stages.

    They share with `layers` an LSTM that runs in float32, nothing else. `precision` is that of
    products on a CPU; the LSTM's weights are int8 where it is int16.

    Raises:
        RequestError: a layer is of another kind, or in a place where no stage would compute it.
    """
    stages: list[Stage] = []
    elu = False  # an activation that the next layer has to compute
    for layer in layers:
        match layer:
            case nn.ELU() if not elu and layer.alpha == 1:
                elu = True
                continue
            case EncodecConv1d() if elu or not stages:
                stages.append(Convolution(layer, precision, elu))
            case EncodecConvTranspose1d() if elu:
                stages.append(Upsampling(layer, precision))
            case EncodecResnetBlock() if not elu and _is_residual(layer):
                stages.append(Residual(layer, precision))
            case EncodecLSTM() if not elu:
                stages.append(Recurrence(layer, precision))
            case _:
                raise _unsupported(type(layer).__name__)
        elu = False
    if elu:
        raise _unsupported("ELU")
    return stages


def _is_residual(block: EncodecResnetBlock) -> bool:
    """Whether the layers of a residual block are those that `Residual` computes."""
    kinds = [type(layer).__name__ for layer in block.block]
    shortcut = type(block.shortcut).__name__
    plain = all(layer.alpha == 1 for layer in block.block if isinstance(layer, nn.ELU))
    known = shortcut in ("Identity", "EncodecConv1d") and kinds == ["ELU", "EncodecConv1d"] * 2
    return known and plain


def _unsupported(kind: str) -> RequestError:
    return RequestError(
        f"This checkpoint's codec is not supported: MusicGen's codecs have no layer {kind} in that "
        "place. Choose another checkpoint.",
        "checkpoint",
    )


def through(stages: list[Stage], pasts: list[Past], x: Tensor, last: bool) -> Tensor:
    """[batch, time, in] to the final [batch, time', out] of all stages in turn."""
    for stage, past in zip(stages, pasts, strict=True):
        x = stage.push(x, past, last)
    return x


def _elu(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return F.elu(x)
    # torch's takes 0.95 ns an element on one thread, mostly for expm1; this takes 0.4.
    y = (x * math.log2(math.e)).clamp_max_(0).exp2_().sub_(1)
    return torch.maximum(x, y, out=y)


def _reflect(x: Tensor, left: int, right: int) -> Tensor:
    """Mirrors the ends of [batch, time, channels]; a shorter signal counts as ending in zeros."""
    if not left and not right:
        return x
    missing = max(0, max(left, right) + 1 - x.shape[1])
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    end = x.shape[1] - 1
    x = torch.cat([x[:, 1 : left + 1].flip(1), x, x[:, end - right : end].flip(1)], dim=1)
    return x[:, : x.shape[1] - missing]


def _silence(x: Tensor, left: int, right: int) -> Tensor:
    """Zeros around [batch, time, channels]."""
    return F.pad(x, (0, 0, left, right))


def _packs(weight: Tensor) -> bool:
    """Whether torch has oneDNN's packed kernels for where `weight` is."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _divides(lstm: nn.LSTM) -> bool:
    """Whether `recurrence` takes it: on a CPU, in blocks of 64 units."""
    fits = lstm.input_size == lstm.hidden_size and lstm.hidden_size % 64 == 0
    return fits and next(lstm.parameters()).device.type == "cpu"


def _in_whole_numbers(weight: Tensor, precision: Precision, steps: tuple[int, int]) -> bool:
    """Whether `convolution` takes [out, in, taps] with this stride and dilation, and in less time
    than torch."""
    outputs, inputs, taps = weight.shape
    few = outputs * taps <= 16 and steps == (1, 1)
    fits = inputs >= FEWEST_INPUTS and (outputs % 16 == 0 or few)
    return precision == "int16" and fits and weight.device.type == "cpu" and _multiplies_int16()


@functools.cache
def _multiplies_int16() -> bool:
    """Whether a processor multiplies twice as many numbers as in float32: with AVX2 or younger."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _pairs(weight: Tensor, bias: Tensor, precision: Precision) -> Kernel:
    """An ELU, then a convolution of kernel 2: `weight` [out, in, 2]."""
    if _in_whole_numbers(weight, precision, (1, 1)):
        from musicgen_ui.engine.cpu.codec_kernels import Convolution16  # imports numba

        return Convolution16(weight, bias)
    run = _linear(weight.transpose(1, 2).flatten(1), bias)

    def pairs(x: Tensor) -> Tensor:
        return run(torch.cat([x[:, :-1], x[:, 1:]], dim=2))

    return _kernel(pairs, elu=True)


def _kernel(run: Callable[[Tensor], Tensor], elu: bool) -> Kernel:
    def kernel(x: Tensor, onto: Tensor | None = None) -> Tensor:
        y = run(_elu(x) if elu else x)
        return y if onto is None else y.add_(onto)

    return kernel


def _linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """x @ weight.T + bias with the weight [out, in] packed where that is faster."""
    weight = weight.contiguous()
    if not _packs(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")


def _convolution(conv: nn.Conv1d, precision: Precision, elu: bool) -> Kernel:
    """`conv` without padding, after an ELU if `elu`."""
    assert conv.bias is not None
    weight, bias = conv.weight.detach(), conv.bias.detach().clone()
    steps = conv.stride[0], conv.dilation[0]
    if _in_whole_numbers(weight, precision, steps):
        from musicgen_ui.engine.cpu.codec_kernels import Convolution16  # imports numba

        return Convolution16(weight, bias, *steps, elu)
    if conv.kernel_size[0] == 1 and conv.stride[0] == 1:
        # As a convolution oneDNN wants the weights in another layout at another length.
        return _kernel(_linear(weight[..., 0], bias), elu)
    stride, dilation = (1, conv.stride[0]), (1, conv.dilation[0])
    weight = weight[:, :, None].clone(memory_format=torch.channels_last)
    if _packs(weight):
        none = (0, 0)
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight, none, stride, dilation, 1)
        run = torch.ops.mkldnn._convolution_pointwise

        def image(x: Tensor) -> Tensor:
            y: Tensor = run(x, weight, bias, none, stride, dilation, 1, "none", [], "")
            return y
    else:

        def image(x: Tensor) -> Tensor:
            return F.conv2d(x, weight, bias, stride, dilation=dilation)

    # [batch, in, 1, time] with the channels last in memory is what `x` already is
    return _kernel(lambda x: image(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2), elu)
