"""What a variation's rows are conditioned on: prompts, melody and chords, the style of a clip.

Every prompt is encoded alone and without padding, so its states never depend on other variations.
Most checkpoints attend to them by cross-attention, and an empty prompt is the null condition: no
states at all, which is exact, since MusicGen's null states are zeros and its cross-attention has no
biases.

A melody checkpoint has no cross-attention: its states are a prefix of the decoder's input, first a
window's columns of chroma, of a melody or chords, then the prompt. There silence (class C
throughout) and zeros are the null conditions, as in audiocraft, and count as positions, so the
prompts of a variation's rows are padded with zeros to the longest. A style checkpoint is the same
with the tokens of a clip's style in the place of chroma; its null condition is as many zeros.

A variation may mix several prompts: each has a row of its own, and their logits are mixed by weight
before guidance (`sampling.mix`). With words and a style clip, the style alone is one of them, with
a negative weight (`style.double_guided`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_ui.audio.clip import Chroma
from musicgen_ui.engine import faults
from musicgen_ui.engine.device import copy_weights, keep_for_this_stream, moved
from musicgen_ui.engine.finite import require_finite
from musicgen_ui.engine.lora import NO_LAYER, AppliedAdapter, LoraStore, RowAdapters
from musicgen_ui.engine.melody import ChromaExtractor, MelodyEncoder
from musicgen_ui.engine.style import StyleConditioner, double_guided
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from musicgen_ui.engine.transformer import Model

MAX_TOKENS = 512  # T5 was trained on sequences of 512 tokens


@dataclass(frozen=True, eq=False)
class Conditions:
    """A variation's rows: one for each of its prompts, then, when guided, the uncond row."""

    prompts: tuple[str, ...]
    weights: tuple[float, ...]  # of the prompts; they sum to 1, and some may be negative
    states: list[Tensor | None]  # of the rows, [tokens, hidden]; None is the null condition

    @property
    def guided(self) -> bool:
        """There is an uncond row."""
        return len(self.states) > len(self.prompts)

    @property
    def mixed(self) -> bool:
        """There are several prompts."""
        return len(self.prompts) > 1

    @property
    def names(self) -> tuple[str | None, ...]:
        """What tells a variation's rows apart: the prompt; None of the uncond row."""
        return (*self.prompts, None) if self.guided else self.prompts

    def sources(self, before: Conditions) -> list[int]:
        """For each row, the row of the conditions before whose KV cache it continues.

        A prompt that was there continues its own row. A new one, or a new uncond row, begins with
        the past of the prompt that had the greatest weight.
        """
        heaviest = before.weights.index(max(before.weights))
        rows = {name: row for row, name in enumerate(before.names)}
        return [rows.get(name, heaviest) for name in self.names]


class Conditioner:
    """Computes the states of a request, with the modules of the checkpoint before its decoder."""

    def __init__(
        self,
        text_encoder: PreTrainedModel,
        projection: nn.Linear | None,
        tokenizer: PreTrainedTokenizerBase,
        melody: MelodyEncoder | None = None,
        style: StyleConditioner | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        embeddings = text_encoder.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        self._vocabulary = embeddings.num_embeddings  # tokens
        self.projection = projection  # None where the widths agree already
        self.tokenizer = tokenizer
        self.melody = melody  # None where the checkpoint cannot follow one
        self.style = style  # None where it is not conditioned on a clip's style
        self.states = lru_cache(maxsize=64)(self._encode)  # prompts are often repeated
        self._adapters: LoraStore | None = None
        self._tokenizing = threading.Lock()  # tokenizers are for one thread at a time

    @classmethod
    def of(
        cls,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        extractor: Mapping[str, object] | None,
        precision: str = "float32",
    ) -> Conditioner:
        """Takes over the modules that a model has before its decoder.

        Args:
            model: transformers'.
            tokenizer: of the checkpoint.
            device: where to run.
            extractor: the feature extractor's configuration, of a melody checkpoint.
            precision: of the decoder; the text encoder takes up bfloat16, while T5 overflows in
                float16 and is float32 there.

        Raises:
            RequestError: a weight is NaN or infinite.
        """

        def part(name: str, dtype: torch.dtype = torch.float32) -> Any:  # whatever it is
            module = getattr(model, name, None)  # a projection is only there where widths differ
            require_finite(module, name)
            copy_weights(module)
            return None if module is None else module.to(device, dtype)

        length, melody, style = getattr(model.config, "chroma_length", None), None, None
        if encoder := part("style"):
            style = StyleConditioner(encoder, part("audio_enc_to_dec_proj"))
        elif length is not None:
            chroma = ChromaExtractor.of(extractor or {})
            melody = MelodyEncoder(part("audio_enc_to_dec_proj"), length, chroma)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        text_encoder, projection = (
            part(name, dtype) for name in ("text_encoder", "enc_to_dec_proj")
        )
        return cls(text_encoder, projection, tokenizer, melody, style)

    @property
    def prefixed(self) -> bool:
        """The states are a prefix of the decoder's input."""
        return bool(self.melody or self.style)

    def use_adapters(self, adapters: LoraStore) -> None:
        """Lets adapters change the projections too."""
        self._adapters = adapters
        adapters.add_target("enc_to_dec_proj", self.projection)
        if audio := self.melody or self.style:
            adapters.add_target("audio_enc_to_dec_proj", audio.projection)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        audio = self.melody or self.style
        encoder = self.style and self.style.encoder
        modules = (self.text_encoder, self.projection, audio and audio.projection, encoder)
        return sum(p.nbytes for module in modules if module for p in module.parameters())

    @torch.inference_mode()
    def conditions(
        self,
        request: GenerationRequest,
        start_s: float = 0.0,
        at_s: float = 0.0,
        *,
        prompts: tuple[tuple[str, float], ...] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditions:
        """The rows of a variation.

        The uncond row is left out where guidance is off, or where it would equal the cond row.

        Args:
            request: what to make.
            start_s: where in the new music the decoder's window begins, in seconds; below 0 where
                it begins with that much of the audio prompt. Melody and chords move along with it.
            at_s: the time whose prompt counts: it may change by sections.
            prompts: a mix in place of the request's prompt, as of `steering.normalised`.
            guidance_scale: in place of the request's.

        Raises:
            RequestError: the checkpoint cannot follow a melody or chords, or take on a style; or a
                mix leaves one that takes on a style with neither words nor a style clip.
        """
        self._require_able(request)
        if prompts and self.style and not request.style and not any(dict(prompts)):
            raise RequestError(
                "Without a style clip this checkpoint needs words: the piece goes on with those "
                "before. Describe the music in one of the prompts.",
                "prompt",
            )
        texts = [text for text, _ in prompts] if prompts else request.texts
        prompts = prompts or ((request.words(at_s), 1.0),)
        scale = request.guidance_scale if guidance_scale is None else guidance_scale
        by_audio = bool(request.followed or request.style)
        guided = scale > 1 and (texts != [request.negative_prompt] or by_audio)
        if request.style:
            prompts = double_guided(prompts, request.text_guidance)
        adapter = self._adapters.applied(request) if self._adapters else None
        states = [self.states(text, adapter) for text, _ in prompts]
        if guided:
            states.append(self.states(request.negative_prompt, adapter))
        for of_row in states:
            keep_for_this_stream(of_row)
        if self.prefixed:
            cond, uncond = self._audio_states(request, start_s, adapter)
            states = _prefixes([cond] * len(prompts) + [uncond] * guided, states)
        names, weights = zip(*prompts, strict=True)
        return Conditions(names, weights, states)

    def _require_able(self, request: GenerationRequest) -> None:
        if request.followed and not self.melody:
            raise RequestError(
                f"This checkpoint cannot follow {request.followed}: choose one that can.",
                "melody" if request.melody else "chords",
            )
        if request.style and not self.style:
            raise RequestError(
                "This checkpoint cannot take on the style of a clip: choose one that can.", "style"
            )

    def _audio_states(
        self, request: GenerationRequest, start_s: float, adapter: AppliedAdapter | None
    ) -> tuple[Tensor, Tensor]:
        """The states of chroma or style of the cond rows and of the uncond row, alike in length."""
        if self.melody:
            columns = (self.melody.window(request, start_s), self.melody.silence)
            cond, uncond = (self.melody.states(each, adapter) for each in columns)
            return cond, uncond
        assert self.style
        cond = self.style.states(request, adapter)
        return cond, torch.zeros_like(cond)

    def prepare(self, request: GenerationRequest, texts: bool = False) -> None:
        """Computes what takes long and is kept for `conditions`; on any thread.

        Args:
            request: whose style clip is encoded.
            texts: whether its texts are encoded too, unless an adapter changes them.

        Raises:
            RequestError: the checkpoint has fewer style codebooks than asked for.
        """
        if self.style and request.style:
            self.style.tokens(request)
        if self.melody:
            self.melody.prepare(request)
        if texts and not request.adapter:
            # `conditions` comes upon the same error, where it is known what to do.
            with contextlib.suppress(Exception):
                for text in (*request.texts, request.negative_prompt):
                    self.states(text, None)

    def chroma(self, request: GenerationRequest) -> Chroma | None:
        """Melody and chords over the whole of the new music; None without them."""
        return self.melody.chroma(request) if self.melody else None

    @torch.inference_mode()
    def _encode(self, prompt: str, adapter: AppliedAdapter | None = None) -> Tensor | None:
        """The states of `prompt`, [tokens, hidden]; None for the null condition of ""."""
        if not prompt:
            return None
        tokens = self._tokens(prompt)
        if not tokens:
            return None
        ids = moved(torch.tensor([tokens]), self.text_encoder.device)
        states: Tensor = self.text_encoder(input_ids=ids)[0][0]
        if self.projection is None:
            return states
        adapters = RowAdapters.of([(adapter, len(states))])
        return adapters.product(NO_LAYER, "enc_to_dec_proj", self.projection, states)

    def truncated_after(self, prompt: str) -> str | None:
        """The last words used of a prompt that is too long; None if all of it is used.

        Raises:
            RequestError: as `_tokens`.
        """
        if len(self._tokens(prompt, truncate=False)) <= MAX_TOKENS:
            return None
        tokens = self._tokens(prompt)
        with self._tokenizing, _tokenizer_errors():
            used = self.tokenizer.decode(tokens, skip_special_tokens=True)
            words = str(used).split()
        return " ".join(words[-3:])

    def _tokens(self, prompt: str, truncate: bool = True) -> list[int]:
        """The tokens of a prompt, of which the model uses the first `MAX_TOKENS`.

        Raises:
            RequestError: the tokenizer fails on it, or is not that of the text encoder.
        """
        limit = {"max_length": MAX_TOKENS} if truncate else {}
        with self._tokenizing, _tokenizer_errors():
            tokens: list[int] = self.tokenizer(prompt, truncation=truncate, **limit).input_ids
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary:  # a GPU would fail
            raise RequestError(
                f"The tokenizer of this checkpoint is not its text encoder's, which has "
                f"{self._vocabulary} tokens: choose another checkpoint, or save it again with its "
                "own tokenizer.",
                "checkpoint",
            )
        return tokens


def _prefixes(audio: list[Tensor], states: list[Tensor | None]) -> list[Tensor | None]:
    """Chroma or style, then text, of each row: [states, hidden], all of one length.

    Args:
        audio: the states of chroma or style of each row, [n, hidden].
        states: the text states of each row, [tokens, hidden].
    """
    # The null prompt is one token, the end of the text, and its state is zeros.
    length = max(1 if text is None else len(text) for text in states)
    rows: list[Tensor | None] = []
    for before, text in zip(audio, states, strict=True):
        text = before.new_zeros(0, before.shape[1]) if text is None else text
        rows.append(torch.cat([before, F.pad(text, (0, 0, 0, length - len(text)))]))
    return rows


@contextlib.contextmanager
def _tokenizer_errors() -> Iterator[None]:
    """Raises a sentence for whatever a tokenizer raises on a prompt, a panic in Rust included."""
    try:
        yield
    except faults.EXITS:
        raise
    except BaseException as error:
        if faults.out_of_memory(error):
            raise
        raise RequestError(
            "The tokenizer of this checkpoint fails on this prompt: change it, or choose another "
            "checkpoint.",
            "prompt",
        ) from error
