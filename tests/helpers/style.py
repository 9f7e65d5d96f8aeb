"""A tiny MusicGen-Style in audiocraft's layout, and what audiocraft's formulas make of it.

The formulas are those of facebookresearch/audiocraft 896ec7c (`modules/conditioners.py`,
`modules/transformer.py`, `quantization/core_vq.py`, `models/lm.py`) and of HuBERT, on plain tensors
by audiocraft's names.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import HubertConfig, HubertModel

from musicgen_ui.checkpoints import registry
from musicgen_ui.engine.scheduler import Scheduler

GOLDEN = Path(__file__).parents[1] / "golden"
SELF_WAV = "condition_provider.conditioners.self_wav."
HIDDEN, HEADS, LAYERS = 256, 8, 4  # audiocraft's scale "xsmall"
QUANTIZERS, BINS = 6, 32
WINDOW_S = 2
MERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
STRIDES = (5, 2, 2, 2, 2, 2, 2)


def build(folder: Path) -> Path:
    """Writes the checkpoint, with its text encoder and MERT in subfolders, and returns it."""
    folder.mkdir(parents=True)
    package = torch.load(GOLDEN / "melody" / "state_dict.bin", weights_only=True)
    settings = yaml.safe_load(package["xp.cfg"])
    settings["conditioners"]["self_wav"] = {
        "model": "style",
        "style": {
            "model_name": "mert",
            "transformer_scale": "xsmall",
            "sample_rate": "${sample_rate}",
            "encodec_n_q": 3,
            "length": 3.0,
            "ds_factor": 15,
            "n_q_out": QUANTIZERS,
            "eval_q": 3,
            "bins": BINS,
            "varying_lengths": [1.5, 4.5],
            "batch_norm": True,
        },
    }
    settings["dataset"]["segment_duration"] = WINDOW_S
    kept = {k: w for k, w in package["best_state"].items() if not k.startswith(SELF_WAV)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = dict(_style_weights(settings["transformer_lm"]["dim"]))
        _write_mert(folder / "mert")
    state = {"best_state": kept | weights, "xp.cfg": yaml.safe_dump(settings), "exported": True}
    torch.save(state, folder / "state_dict.bin")
    shutil.copy(GOLDEN / "melody" / "compression_state_dict.bin", folder)
    shutil.copytree(GOLDEN / "text_encoder", folder / "text_encoder")
    return folder


def style_batch(folder: Path, **options: Any) -> Scheduler:
    """A scheduler of such a checkpoint."""
    loaded = registry.load(registry.resolve(str(folder)), torch.float32, lambda _: None, True)
    return Scheduler(loaded.model, loaded.tokenizer, checkpoint=loaded.name, **options)


def _style_weights(width: int) -> Iterator[tuple[str, Tensor]]:
    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns) * gain / math.sqrt(columns)

    yield SELF_WAV + "embed.weight", matrix(HIDDEN, MERT["hidden_size"])
    yield SELF_WAV + "embed.bias", torch.randn(HIDDEN)
    for i in range(LAYERS):
        layer = f"{SELF_WAV}transformer.layers.{i}."
        for norm in ("norm1", "norm2"):
            yield f"{layer}{norm}.weight", 1 + torch.randn(HIDDEN) / 4
            yield f"{layer}{norm}.bias", torch.randn(HIDDEN) / 4
        yield layer + "self_attn.in_proj_weight", matrix(3 * HIDDEN, HIDDEN, 2.0)
        yield layer + "self_attn.out_proj.weight", matrix(HIDDEN, HIDDEN)
        yield layer + "linear1.weight", matrix(4 * HIDDEN, HIDDEN)
        yield layer + "linear2.weight", matrix(HIDDEN, 4 * HIDDEN)
    yield SELF_WAV + "batch_norm.running_mean", torch.randn(HIDDEN)
    yield SELF_WAV + "batch_norm.running_var", torch.rand(HIDDEN) * 4 + 0.5
    yield SELF_WAV + "batch_norm.num_batches_tracked", torch.tensor(1234)
    for i in range(QUANTIZERS):
        book = f"{SELF_WAV}rvq.vq.layers.{i}._codebook."
        yield book + "inited", torch.ones(1)
        yield book + "cluster_size", torch.rand(BINS)
        yield book + "embed", torch.randn(BINS, HIDDEN) * 0.7**i
        yield book + "embed_avg", torch.randn(BINS, HIDDEN)
    yield SELF_WAV + "output_proj.weight", matrix(width, HIDDEN)
    yield SELF_WAV + "output_proj.bias", torch.randn(width)


def _write_mert(folder: Path) -> None:
    """As m-a-p/MERT-v1-95M is written: a pickle with weight norm's older names."""
    model = HubertModel(HubertConfig(**MERT, initializer_range=0.2)).eval()
    for weight in model.parameters():  # biases and norms too
        weight.data += torch.randn_like(weight) * 0.1
    names = {"parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    weights = model.state_dict()
    for new, old in names.items():
        weights = {name.replace(new, old): weight for name, weight in weights.items()}
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    config = {"model_type": "mert_model", "sample_rate": 24000, "attention_relax": -1.0, **MERT}
    config |= {"feature_extractor_cqt": False, "deepnorm": False, "conv_stride": list(STRIDES)}
    (folder / "config.json").write_text(json.dumps(config))


@dataclass
class Reference:
    """audiocraft's results, and what its layers give on the way."""

    folder: Path
    layers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        package = torch.load(self.folder / "state_dict.bin", weights_only=True)
        self._weights = package["best_state"]
        self._lm = yaml.safe_load(package["xp.cfg"])["transformer_lm"]
        mert = self.folder / "mert" / "pytorch_model.bin"
        self._mert = torch.load(mert, weights_only=True)

    def style(self, samples: Tensor, eval_q: int) -> Tensor:
        """`StyleConditioner`: samples at 24 kHz, [samples], to [1, tokens, width of the LM]."""
        x = self._linear(SELF_WAV + "embed", self._features(samples[None]))
        x = self._transformer(SELF_WAV + "transformer", x, HEADS, LAYERS, causal=False)
        mean = self._weights[SELF_WAV + "batch_norm.running_mean"]
        variance = self._weights[SELF_WAV + "batch_norm.running_var"]
        x = F.batch_norm(x.transpose(1, 2), mean, variance, eps=1e-5).transpose(1, 2)
        self.layers["batch_norm"] = x
        total, rest = torch.zeros_like(x), x
        for i in range(eval_q):
            codes = self._weights[f"{SELF_WAV}rvq.vq.layers.{i}._codebook.embed"]
            nearest = codes[torch.cdist(rest[0], codes).argmin(1)][None]
            total, rest = total + nearest, rest - nearest
        self.layers["tokens"] = total[:, ::15]
        return self._linear(SELF_WAV + "output_proj", self.layers["tokens"])

    def _features(self, x: Tensor) -> Tensor:
        """MERT's last hidden state: HuBERT, its base."""
        w, width, heads = self._mert, MERT["hidden_size"], MERT["num_attention_heads"]
        x = x[:, None]
        for i, stride in enumerate(STRIDES):
            x = F.conv1d(x, w[f"feature_extractor.conv_layers.{i}.conv.weight"], stride=stride)
            if i == 0:
                norm = "feature_extractor.conv_layers.0.layer_norm."
                x = F.group_norm(x, x.shape[1], w[norm + "weight"], w[norm + "bias"])
            x = F.gelu(x)
        x = _norm(w, "feature_projection.layer_norm", x.transpose(1, 2))
        x = _affine(w, "feature_projection.projection", x)
        at = "encoder.pos_conv_embed.conv."
        direction = w[at + "weight_v"]
        norms = direction.square().sum((0, 1), keepdim=True).sqrt()
        kernel = direction / norms * w[at + "weight_g"]
        padding, groups = kernel.shape[2] // 2, MERT["num_conv_pos_embedding_groups"]
        moved = F.conv1d(x.transpose(1, 2), kernel, w[at + "bias"], padding=padding, groups=groups)[
            :, :, :-1
        ]  # of an even kernel
        x = _norm(w, "encoder.layer_norm", x + F.gelu(moved).transpose(1, 2))
        for i in range(MERT["num_hidden_layers"]):
            layer = f"encoder.layers.{i}."
            q, k, v = (
                _affine(w, f"{layer}attention.{part}_proj", x).unflatten(2, (heads, -1))
                for part in "qkv"
            )
            scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
            out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
            x = _norm(w, layer + "layer_norm", x + _affine(w, layer + "attention.out_proj", out))
            inner = F.gelu(_affine(w, layer + "feed_forward.intermediate_dense", x))
            out = _affine(w, layer + "feed_forward.output_dense", inner)
            x = _norm(w, layer + "final_layer_norm", x + out)
        self.layers["mert"] = x
        return x

    def _transformer(self, at: str, x: Tensor, heads: int, layers: int, causal: bool) -> Tensor:
        """`StreamingTransformer`: sinusoids, then layers with the norm first and no biases."""
        w, (count, width) = self._weights, x.shape[1:]
        half = width // 2
        phases = torch.arange(count)[:, None] / 10000 ** (torch.arange(half) / (half - 1))
        x = x + torch.cat([phases.cos(), phases.sin()], 1)
        mask = torch.ones(count, count).tril().log() if causal else torch.zeros(count, count)
        for i in range(layers):
            layer = f"{at}.layers.{i}."
            qkv = _norm(w, layer + "norm1", x) @ w[layer + "self_attn.in_proj_weight"].T
            q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
            scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads) + mask
            out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
            x = x + out @ w[layer + "self_attn.out_proj.weight"].T
            inner = F.gelu(_norm(w, layer + "norm2", x) @ w[layer + "linear1.weight"].T)
            x = x + inner @ w[layer + "linear2.weight"].T
            self.layers[f"{at}.{i}"] = x
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return _affine(self._weights, name, x)

    def conditions(self, style: Tensor | None, text: Tensor | None, null: Tensor) -> Tensor:
        """The prefixes of the rows text and style, style alone, neither: [3, states, width].

        Args:
            style: see `style`; None is without a clip.
            text: T5's states, [1, tokens, …]; None is without words.
            null: T5's states of "", [1, 1, …], of which audiocraft masks all.
        """
        proj = "condition_provider.conditioners.description.output_proj"
        words = self._linear(proj, null) * 0 if text is None else self._linear(proj, text)
        width = words.shape[2]
        style = torch.zeros(1, 1, width) if style is None else style
        both = torch.cat([style, words], 1)
        return torch.cat([both, torch.cat([style, words * 0], 1), both * 0])

    def logits(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """`LMModel.forward` at the last of the columns.

        Args:
            prefix: [rows, states, width].
            codes: int64 [codebooks, columns], of every row.

        Returns:
            [rows, codebooks, codes].
        """
        w = self._weights
        x = sum(w[f"emb.{k}.weight"][each] for k, each in enumerate(codes))
        x = torch.cat([prefix, x.expand(len(prefix), -1, -1)], 1)
        heads, layers = self._lm["num_heads"], self._lm["num_layers"]
        x = _norm(w, "out_norm", self._transformer("transformer", x, heads, layers, causal=True))
        return torch.stack([x[:, -1] @ w[f"linears.{k}.weight"].T for k in range(len(codes))], 1)

    def guided(
        self, prefix: Tensor, codes: Tensor, cfg_coef: float, cfg_coef_beta: float | None
    ) -> Tensor:
        """`_sample_next_token` before it samples: [codebooks, codes]."""
        cond, wav, uncond = self.logits(prefix, codes)
        if cfg_coef_beta is None:
            return uncond + (cond - uncond) * cfg_coef
        return uncond + cfg_coef * (wav + cfg_coef_beta * (cond - wav) - uncond)

    def greedy(
        self, prefix: Tensor, frames: int, cfg_coef: float, cfg_coef_beta: float | None
    ) -> Tensor:
        """The likeliest codes, int64 [codebooks, frames], in the delay pattern."""
        books, start = self._lm["n_q"], self._lm["card"]
        columns = torch.full((books, frames + books), start)
        for at in range(1, frames + books):
            best = self.guided(prefix, columns[:, :at], cfg_coef, cfg_coef_beta).argmax(-1)
            for book in range(books):
                if 0 <= at - 1 - book < frames:
                    columns[book, at] = best[book]
        return torch.stack([columns[k, 1 + k : 1 + k + frames] for k in range(books)])


def _affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])
