"""What the codec is asked to keep: spectra at several resolutions, and a judge that learns.

`SpectralLoss` joins log-mel distance (three scales), spectral convergence, and log-magnitude on
the linear axis at 4096 points, which is what brings harmonics back. The discriminator is EnCodec's
idea (Défossez et al. 2022, section 3.4): small 2-D convolutions over complex spectrograms at
several resolutions, hinge losses, and feature matching.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STEP = math.log(6.4) / 27  # of a mel above 1 kHz
MEL_SCALES = ((2048, 128), (1024, 80), (256, 32))  # window length, mel bands


def mel_bank(sampling_rate: int, window: int, bands: int, lowest_hz: float = 20.0) -> Tensor:
    """Triangular filters [bands, window / 2 + 1] of equal area, on Slaney's mel scale."""

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * LOG_STEP))

    low = 3 * lowest_hz / 200  # linear below 1 kHz
    high = 15 + math.log(sampling_rate / 2000) / LOG_STEP
    edges = hertz(torch.linspace(low, high, bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, sampling_rate / 2, window // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])[:, None]
    return (torch.minimum(rise, fall).clamp(min=0) * area).float()


class SpectralLoss(nn.Module):
    def __init__(self, sampling_rate: int):
        super().__init__()
        for window in (4096, 2048, 1024, 256):
            self.register_buffer(f"window_{window}", torch.hann_window(window))
        for window, bands in MEL_SCALES:
            self.register_buffer(f"bank_{window}", mel_bank(sampling_rate, window, bands))
        self.low_bins = round(5000 / sampling_rate * 4096)

    def magnitude(self, audio: Tensor, window: int) -> Tensor:
        """[clips, samples] → [clips, bins, frames]."""
        shape = getattr(self, f"window_{window}")
        return torch.stft(audio, window, window // 4, window=shape, return_complex=True).abs()

    def forward(self, audio: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Named terms, each a mean; `made` [clips, samples] is compared with `audio`."""
        mel, shape = audio.new_zeros(()), audio.new_zeros(())
        for window, _ in MEL_SCALES:
            x, y = self.magnitude(audio, window), self.magnitude(made, window)
            bank = getattr(self, f"bank_{window}")
            mel = mel + (torch.log(bank @ x + 1e-3) - torch.log(bank @ y + 1e-3)).abs().mean()
            shape = shape + (x - y).norm() / (x.norm() + 1e-3)
        x, y = self.magnitude(audio, 4096), self.magnitude(made, 4096)
        low = slice(0, self.low_bins)
        harmonics = (torch.log(x[:, low] + 5e-2) - torch.log(y[:, low] + 5e-2)).abs().mean()
        fine = (x - y).norm() / (x.norm() + 1e-3)
        return {
            "mel": mel / len(MEL_SCALES),
            "shape": shape,
            "harmonics": harmonics,
            "fine": fine,
            "time": (audio - made).abs().mean(),
        }


TERM_WEIGHTS = {"mel": 1.0, "shape": 0.5, "harmonics": 1.2, "fine": 0.5, "time": 5.0}


def log_mel_distance_db(loss: SpectralLoss, audio: Tensor, made: Tensor) -> Tensor:
    """Mean difference of the 128-band log-mel spectrograms in dB."""
    levels = [
        20 * torch.log10(loss.bank_2048 @ loss.magnitude(sound, 2048) + 1e-2)
        for sound in (audio, made)
    ]
    return (levels[0] - levels[1]).abs().mean()


def si_snr_db(audio: Tensor, made: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio in dB, a mean over [clips, samples]."""
    scale = (audio * made).sum(-1, keepdim=True) / audio.pow(2).sum(-1, keepdim=True)
    target = scale * audio
    noise = (made - target).pow(2).sum(-1) + 1e-9
    return (10 * torch.log10(target.pow(2).sum(-1) / noise)).mean()


class Discriminator(nn.Module):
    """One score map for each resolution; `forward` also returns the features in between."""

    def __init__(self, windows: tuple[int, ...] = (2048, 1024, 512, 256), channels: int = 24):
        super().__init__()
        self.windows = windows
        self.stacks = nn.ModuleList(self._stack(channels) for _ in windows)

    @staticmethod
    def _stack(channels: int) -> nn.ModuleList:
        norm = nn.utils.parametrizations.weight_norm
        layers = [norm(nn.Conv2d(2, channels, (9, 3), padding=(4, 1)))]
        for dilation in (1, 2, 4):
            layers.append(
                norm(
                    nn.Conv2d(
                        channels,
                        channels,
                        (9, 3),
                        stride=(2, 1),
                        dilation=(1, dilation),
                        padding=(4, dilation),
                    )
                )
            )
        layers.append(norm(nn.Conv2d(channels, 1, (3, 3), padding=1)))
        return nn.ModuleList(layers)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[clips, samples] → score maps, features."""
        scores, features = [], []
        for window, stack in zip(self.windows, self.stacks, strict=True):
            shape = torch.hann_window(window, device=audio.device)
            spectrum = torch.stft(
                audio, window, window // 4, window=shape, normalized=True, return_complex=True
            )
            x = torch.view_as_real(spectrum).permute(0, 3, 1, 2)  # [clips, 2, bins, frames]
            for layer in stack[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
                features.append(x)
            scores.append(stack[-1](x))
        return scores, features


def discriminator_loss(judge: Discriminator, audio: Tensor, made: Tensor) -> Tensor:
    """Hinge: real above 1, made below -1."""
    real, fake = judge(audio)[0], judge(made.detach())[0]
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True))


def adversarial_losses(judge: Discriminator, audio: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """What the codec pays for being found out, and for features unlike the real ones."""
    with torch.no_grad():
        real = judge(audio)[1]
    scores, fake = judge(made)
    fooled = sum(F.relu(1 - s).mean() for s in scores) / len(scores)
    matching = sum(
        (f - r).abs().mean() / (r.abs().mean() + 1e-6) for f, r in zip(fake, real, strict=True)
    )
    return fooled, matching / len(real)
