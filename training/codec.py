"""The codec: transformers' EncodecModel at 50 frames a second, and a quantiser that can be trained.

transformers has no training path for EnCodec's residual quantiser: `ResidualQuantizer` works on
the model's own buffers (straight-through gradient, codebooks as exponential averages, a k-means
start, dead codes moved onto live data: Zeghidour et al. 2021, SoundStream, section III-C). The
stock initial weights shrink the signal until nothing trains, so `scale_layers` sets each
convolution's gain from its output on real audio (Mishkin and Matas 2015, LSUV).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EncodecConfig, EncodecModel
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecResnetBlock,
)

from training.presets import CodecSize

FRAME_RATE_HZ = 50
VECTORS_A_STEP = 384  # to which the use of codes is scaled, whatever the batch


def make_codec(size: CodecSize) -> EncodecModel:
    """A mono codec with `codebooks` codebooks; stereo is two mono passes with the same weights."""
    bits = size.codebook_size.bit_length() - 1
    config = EncodecConfig(
        target_bandwidths=[size.codebooks * bits * FRAME_RATE_HZ / 1000],  # kbit/s
        sampling_rate=size.sampling_rate,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        hidden_size=size.hidden,
        codebook_dim=size.hidden,
        num_filters=size.filters,
        num_residual_layers=1,
        upsampling_ratios=list(size.ratios),
        use_causal_conv=False,
        num_lstm_layers=size.lstm_layers,
        codebook_size=size.codebook_size,
        use_conv_shortcut=False,
    )
    if config.frame_rate != FRAME_RATE_HZ or config.num_quantizers != size.codebooks:
        raise ValueError(f"{size} does not give 50 frames a second of {size.codebooks} codebooks.")
    return EncodecModel(config)


def load_codec(path: Path, size: CodecSize) -> EncodecModel:
    """The codec in evaluation mode from a state dict file."""
    codec = make_codec(size)
    state = torch.load(path, map_location="cpu", weights_only=True)
    codec.load_state_dict(state.get("model", state))
    return codec.eval()


@torch.no_grad()
def to_codes(codec: EncodecModel, audio: Tensor) -> Tensor:
    """float32 [clips, samples] → int64 [clips, codebooks, frames]."""
    latent = codec.encoder(audio[:, None])
    return codec.quantizer.encode(latent, codec.config.target_bandwidths[0]).transpose(0, 1)


@torch.no_grad()
def scale_layers(codec: EncodecModel, audio: Tensor) -> None:
    """Rescale every convolution's weight-norm gain, layer by layer, on [clips, 1, samples]."""
    convs = [m for m in codec.modules() if isinstance(m, EncodecConv1d | EncodecConvTranspose1d)]
    blocks = (m for m in codec.modules() if isinstance(m, EncodecResnetBlock))
    residual = {id(block.block[-1]) for block in blocks}
    last = codec.decoder.layers[-1]

    def rescale(module, _, output):
        target = 0.1 if module is last else 0.3 if id(module) in residual else 1.0
        factor = target / (output.std().item() + 1e-8)
        module.conv.parametrizations.weight.original0.mul_(factor)
        return output * factor

    for conv in convs:
        conv.conv.bias.zero_()
    hooks = [conv.register_forward_hook(rescale) for conv in convs]
    codec.decoder(codec.encoder(audio))
    for hook in hooks:
        hook.remove()


@dataclass
class ResidualQuantizer:
    """Trains the codebooks of an EncodecModel in place."""

    codec: EncodecModel
    decay: float = 0.985
    started: bool = False  # until then the latent passes unquantised

    @property
    def codebooks(self) -> list:
        return [layer.codebook for layer in self.codec.quantizer.layers]

    @torch.no_grad()
    def start(self, latent: Tensor, rounds: int = 12) -> float:
        """k-means on [vectors, hidden], a codebook at a time; returns the variance left."""
        rest = latent.clone()
        for book in self.codebooks:
            size = len(book.embed)
            centres = rest[torch.randperm(len(rest), device=rest.device)[:size]].clone()
            centres = centres.repeat(-(-size // len(centres)), 1)[:size]
            for _ in range(rounds):
                index = nearest(rest, centres)
                count = torch.bincount(index, minlength=size)
                total = torch.zeros_like(centres).index_add_(0, index, rest)
                spare = rest[torch.randint(len(rest), (size,), device=rest.device)]
                used = count[:, None] > 0
                centres = torch.where(used, total / count.clamp(min=1)[:, None], spare)
            index = nearest(rest, centres)
            weight = torch.bincount(index, minlength=size).float() * (240 / len(rest))
            book.embed.copy_(centres)
            book.cluster_size.copy_(weight)
            book.embed_avg.copy_(centres * weight[:, None])
            rest = rest - centres[index]
        self.started = True
        return (rest.pow(2).mean() / latent.var()).item()

    def __call__(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[clips, hidden, frames] → the same quantised, straight through; commitment loss."""
        clips, hidden, frames = latent.shape
        rest = latent.float().transpose(1, 2).reshape(-1, hidden)
        total, commitment = torch.zeros_like(rest), rest.new_zeros(())
        for book in self.codebooks:
            index = nearest(rest.detach(), book.embed)
            chosen = book.embed[index]
            commitment = commitment + F.mse_loss(rest, chosen)
            self._follow(book, rest.detach(), index)
            rest, total = rest - chosen, total + chosen
        quantised = total.view(clips, frames, hidden).transpose(1, 2)
        return latent + (quantised - latent).detach(), commitment

    @torch.no_grad()
    def _follow(self, book, vectors: Tensor, index: Tensor) -> None:
        """Move a codebook towards the vectors that chose its codes; restart codes nobody chose."""
        count = torch.zeros_like(book.cluster_size).index_add_(
            0, index, torch.ones_like(index, dtype=book.cluster_size.dtype)
        )  # bincount would wait for the device
        total = torch.zeros_like(book.embed).index_add_(0, index, vectors)
        count, total = (x * (VECTORS_A_STEP / len(vectors)) for x in (count, total))
        book.cluster_size.mul_(self.decay).add_(count, alpha=1 - self.decay)
        book.embed_avg.mul_(self.decay).add_(total, alpha=1 - self.decay)
        book.embed.copy_(book.embed_avg / book.cluster_size.clamp(min=1e-4)[:, None])
        dead = book.cluster_size < 0.03
        fresh = vectors[torch.randint(len(vectors), dead.shape, device=vectors.device)]
        book.embed.copy_(torch.where(dead[:, None], fresh, book.embed))
        book.embed_avg.copy_(torch.where(dead[:, None], fresh * 0.25, book.embed_avg))
        book.cluster_size.masked_fill_(dead, 0.25)


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """[vectors, hidden], [codes, hidden] → index of the closest code."""
    return (vectors @ centres.T - 0.5 * centres.pow(2).sum(1)).argmax(1)
