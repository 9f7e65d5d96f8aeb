"""The codec: an audio prompt into codes, and codes into audio as a stream without seams.

EnCodec (Défossez et al. 2022, arXiv 2210.13438; transformers' `EncodecModel` is the reference) is
a chain of layers that look ahead, and mirrors the signal at its ends or sets it in silence.
`stages` makes of every layer one that is pushed new time steps and returns the steps of its output
that are final. So nothing is decoded twice, the one-shot decode is the stream itself, and the
lookahead of the kernels is all the delay there is: 3.75 frames for Meta's 32 kHz codec, whose first
samples come with the fourth frame. The encoder is a chain of the same stages.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecConfig, PreTrainedModel

from musicgen_ui.engine.codec_layers import Past, Precision, assemble, through
from musicgen_ui.engine.device import side_stream
from musicgen_ui.engine.finite import require_finite, require_finite_weight
from musicgen_ui.errors import RequestError

PIECE_FRAMES = 100  # one-shot work goes in pieces, so that memory does not grow with the length


class Codec:
    """EnCodec's weights in the shape that coding wants; immutable, so streams can share it.

    The caller may drop the `EncodecModel`, and must not change it; with `release` it is emptied at
    once. `precision` is that of the decoder on a CPU: in "int16" its noise is 62 dB below the
    bundled codec's music. The encoder is float32, and all of it on other devices.

    Raises:
        RequestError: a codec of a kind that MusicGen does not use, or a weight is no number.
    """

    def __init__(
        self,
        encodec: PreTrainedModel,
        channels: int = 1,
        device: torch.device | str = "cpu",
        precision: Precision = "int16",
        release: bool = False,
    ) -> None:
        module: Any = encodec  # torch's stubs know nothing of a module's parts
        config = module.config
        _check(config)
        self.channels = channels  # of the music; EnCodec itself hears one at a time
        self.device = torch.device(device)
        self.sampling_rate: int = config.sampling_rate  # Hz
        self.hop: int = config.hop_length  # samples a frame
        self.frame_rate: int = config.frame_rate  # frames a second
        self.codebooks: int = config.num_quantizers  # a channel
        self.codebook_size: int = config.codebook_size
        require_finite(module, "audio_encoder")
        books = [layer.codebook.embed for layer in module.quantizer.layers[: self.codebooks]]
        for k, book in enumerate(books):  # no parameter
            require_finite_weight(book, f"audio_encoder.quantizer.layers.{k}.codebook.embed")
        self.tables = torch.stack(books).to(self.device, torch.float32)  # [codebooks, size, dim]
        self.name = _name(config, self.tables)  # equal for codecs whose codes mean the same
        numbers = self.tables.numel() + sum(weight.numel() for weight in module.parameters())
        self.nbytes = 4 * numbers  # of the weights, at most
        with torch.no_grad():
            module.to(self.device, torch.float32)
            self.encoder = assemble(module.encoder.layers, "float32")
            self.decoder = assemble(module.decoder.layers, precision)
        if release:
            module.encoder, module.decoder, module.quantizer = nn.Module(), nn.Module(), nn.Module()

    def encode(self, samples: Tensor) -> Tensor:
        """Audio as codes: float32 [channels, samples] to int64 [channels * codebooks, frames].

        Samples of whole frames. In stereo the rows interleave: left 0, 2, …, right 1, 3, ….
        """
        return torch.cat(list(self.encoding(samples)), dim=1)

    def encoding(self, samples: Tensor) -> Iterator[Tensor]:
        """`encode` piece by piece, for those who have other work between two pieces."""
        pasts = [Past() for _ in self.encoder]
        pieces = samples.to(self.device, torch.float32)[..., None].split(PIECE_FRAMES * self.hop, 1)
        for x in pieces:
            with torch.no_grad():
                latents = through(self.encoder, pasts, x, x is pieces[-1])
                codes = _quantize(latents, self.tables).flatten(0, 1)
            yield codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes as audio: int64 [channels * codebooks, frames] to float32 [channels, samples]."""
        stream, pieces = self.stream(), codes.split(PIECE_FRAMES, dim=1)
        return torch.cat([stream.push(piece, piece is pieces[-1]) for piece in pieces], dim=1)

    def stream(self) -> CodecStream:
        """A new stream of frames into audio."""
        return CodecStream(self)

    def latents(self, codes: Tensor) -> Tensor:
        """int64 [channels * codebooks, frames] to float32 [channels, frames, dim]."""
        # [codebooks, channels, frames]
        codes = codes.to(self.device).unflatten(0, (self.codebooks, self.channels))
        return torch.stack(list(map(F.embedding, codes, self.tables))).sum(0)

    @functools.cached_property
    def side(self) -> torch.cuda.Stream | None:
        """Where audio is decoded beside the decoder's steps; None off CUDA."""
        return side_stream(self.device)


class CodecStream:
    """One signal on its way from codes to audio. Its pushes joined are the one-shot decode."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._pasts = [Past() for _ in codec.decoder]
        self._begun = self._ended = False

    @torch.no_grad()
    def push(self, codes: Tensor, last: bool = False) -> Tensor:
        """Takes new frames and returns the samples that are final now.

        int64 [channels * codebooks, frames], 0 frames or more, to float32 [channels, samples].
        `last` ends the signal and returns all that was held back.

        Raises:
            ValueError: the signal has ended.
        """
        codec = self.codec
        if self._ended:
            raise ValueError("The stream has ended; begin another.")
        self._ended = last
        self._begun = self._begun or codes.shape[1] > 0
        if not self._begun:
            return codec.tables.new_zeros(codec.channels, 0)
        return through(codec.decoder, self._pasts, codec.latents(codes), last)[..., 0]

    @property
    def phase(self) -> tuple[object, ...]:
        """Equal for streams that may be pushed together."""
        return self._ended, *(past.phase for past in self._pasts)


@torch.no_grad()
def push_together(streams: Sequence[CodecStream], codes: Sequence[Tensor]) -> Tensor:
    """As `CodecStream.push` of each, in one pass: float32 [streams, channels, samples].

    Args:
        streams: of one codec and one `phase`, not ended.
        codes: of each as many frames.
    """
    codec = streams[0].codec
    pasts = [Past.joined(each) for each in zip(*(stream._pasts for stream in streams), strict=True)]
    latents = torch.cat([codec.latents(each) for each in codes])
    samples = through(codec.decoder, pasts, latents, last=False)[..., 0]
    apart = zip(*(past.parted(len(streams)) for past in pasts), strict=True)
    for stream, own in zip(streams, apart, strict=True):
        stream._pasts = list(own)
    stacked: Tensor = samples.unflatten(0, (len(streams), codec.channels))
    return stacked


class Decoding:
    """A push under way. On CUDA it runs beside the decoder's steps and nobody waits for it."""

    def __init__(self, samples: Tensor, finite: Tensor, done: torch.cuda.Event | None) -> None:
        self._samples = samples  # float32 [channels, samples], on the CPU once `done` is
        self._finite = finite
        self._done = done

    @classmethod
    def start(
        cls,
        streams: Sequence[CodecStream],
        codes: Sequence[Tensor],
        finite: Sequence[Tensor],
        last: bool = False,
    ) -> list[Decoding]:
        """Pushes each stream; several as `push_together` may.

        Args:
            streams: whose pushes are all made in this way.
            codes: of each its next, int64 [channels * codebooks, frames], which nobody writes to.
            finite: of each, bool in whatever shape: the logits that gave the codes were numbers.
            last: ends the signal; of a single stream.
        """
        side = streams[0].codec.side
        usable = torch.stack([each.all() for each in finite])
        if side is None:
            samples = _push(streams, codes, last).cpu()
            return [
                cls(piece, sane, None) for piece, sane in zip(samples, usable.cpu(), strict=True)
            ]
        side.wait_stream(torch.cuda.current_stream(side.device))
        with torch.cuda.stream(side):
            samples = _push(streams, codes, last).to("cpu", non_blocking=True)
            sane = usable.to("cpu", non_blocking=True)
            for tensor in (*codes, usable):
                if tensor.is_cuda:
                    tensor.record_stream(side)
            done = torch.cuda.Event()
            done.record(side)
        return [cls(piece, each, done) for piece, each in zip(samples, sane, strict=True)]

    @property
    def done(self) -> bool:
        """`samples` will not wait."""
        return self._done is None or self._done.query()

    def samples(self) -> np.ndarray | None:
        """float32 [channels, samples]; None where logits or samples are no numbers."""
        if self._done:
            self._done.synchronize()
        samples = self._samples.numpy()
        return samples if self._finite and np.isfinite(samples).all() else None


def _push(streams: Sequence[CodecStream], codes: Sequence[Tensor], last: bool) -> Tensor:
    if len(streams) == 1:
        return streams[0].push(codes[0], last)[None]
    return push_together(streams, codes)


def _name(config: EncodecConfig, tables: Tensor) -> str:
    """Sampling rate, codebooks, and a hash of configuration and codebooks: "32000-4-1f0c…"."""
    digest = hashlib.sha256(config.to_json_string(use_diff=False).encode())
    digest.update(tables.cpu().numpy().tobytes())
    return f"{config.sampling_rate}-{len(tables)}-{digest.hexdigest()[:16]}"


def _check(config: EncodecConfig) -> None:
    if config.norm_type != "weight_norm" or config.pad_mode not in ("reflect", "constant"):
        raise RequestError(
            "This checkpoint's codec is not supported: it must use weight norm, and reflection or "
            "silence at the ends."
        )
    if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
        raise RequestError(
            "This checkpoint's codec is not supported: it must take one channel, in one piece and "
            "without normalising it."
        )


def _quantize(latents: Tensor, tables: Tensor) -> Tensor:
    """[channels, frames, dim] to [codebooks, channels, frames]: nearest entries of what is left.

    Distances are computed as in transformers, so that near ties fall the same way.
    """
    codes = []
    for table in tables:
        squares = latents.pow(2).sum(-1, keepdim=True)
        distances = squares - 2 * latents @ table.t() + table.pow(2).sum(-1)
        codes.append(distances.argmin(-1))
        latents = latents - F.embedding(codes[-1], table)
    return torch.stack(codes)
