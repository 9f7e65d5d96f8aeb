"""What the decoder is told: prompts as states of the text encoder, and a melody as its chroma.

Every prompt is encoded alone and without padding, so what a job hears of its words never depends
on its neighbours. Most checkpoints attend to the prompt's states by cross-attention, and an empty
prompt is the null condition: no states at all, which is exact, since MusicGen's null states are
zeros and its cross-attention has no biases.

A melody checkpoint has no cross-attention: its states are a prefix of the decoder's input, first a
window's columns of chroma, then the prompt. There silence (class C throughout) and zeros are the
null conditions, as in audiocraft, and count as positions, so the rows of a job are as long as the
longer of its two prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_ui.audio.clip import Chroma
from musicgen_ui.engine import faults
from musicgen_ui.engine.device import own
from musicgen_ui.engine.finite import require_finite
from musicgen_ui.engine.lora import OUTSIDE, Rows, Worn
from musicgen_ui.engine.melody import Extractor, MelodyEncoder
from musicgen_ui.engine.shelf import Shelf
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

MAX_TOKENS = 512  # T5 was trained on sequences of 512 tokens


class Conditioner:
    """A request's words and melody as states, by the checkpoint's own modules and tokenizer."""

    def __init__(
        self,
        text_encoder: nn.Module,
        projection: nn.Module | None,
        tokenizer: Any,
        melody: MelodyEncoder | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        encoder: Any = text_encoder
        self._known: int = encoder.get_input_embeddings().num_embeddings  # tokens
        self.projection = projection  # None where the widths agree already
        self.tokenizer = tokenizer
        self.melody = melody  # None where the checkpoint cannot follow one
        self.states = lru_cache(maxsize=64)(self._encode)  # visitors repeat prompts and examples
        self._adapters: Shelf | None = None

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, device: torch.device, extractor: Mapping[str, Any] | None
    ) -> Conditioner:
        """Takes over what a model has before its decoder.

        Args:
            model: transformers'.
            tokenizer: of the checkpoint.
            device: where to run.
            extractor: the feature extractor's configuration, of a melody checkpoint.

        Raises:
            RequestError: a weight is no number.
        """

        def taken(name: str) -> Any:
            module = getattr(model, name, None)  # a projection is only there where widths differ
            require_finite(module, name)
            own(module)
            return None if module is None else module.to(device)

        length, melody = getattr(model.config, "chroma_length", None), None
        if length is not None:
            found = Extractor.of(extractor or {})
            melody = MelodyEncoder(taken("audio_enc_to_dec_proj"), length, found)
        return cls(taken("text_encoder"), taken("enc_to_dec_proj"), tokenizer, melody)

    def share(self, adapters: Shelf) -> None:
        """Lets adapters change the projections too."""
        self._adapters = adapters
        adapters.allow("enc_to_dec_proj", self.projection)
        if self.melody:
            adapters.allow("audio_enc_to_dec_proj", self.melody.projection)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        projections = (self.projection, self.melody and self.melody.projection)
        modules = [self.text_encoder, *(module for module in projections if module)]
        return sum(p.nbytes for module in modules for p in module.parameters())

    @torch.inference_mode()
    def conditions(
        self, request: GenerationRequest, start_s: float = 0.0, at_s: float = 0.0
    ) -> list[Tensor | None]:
        """The states of a job's rows, [tokens, hidden] each: what is wanted, then what is not.

        A job has the first row alone where guidance is off, or could not tell the two apart.

        Args:
            request: what to make.
            start_s: where in the new music the decoder's window begins, in seconds; below 0 where
                it begins with that much of the audio prompt. A melody moves along with it.
            at_s: the time whose words count: a piece's prompt can change.

        Raises:
            RequestError: the checkpoint cannot follow a melody.
        """
        if request.melody and not self.melody:
            raise RequestError(
                "This checkpoint cannot follow a melody: choose one that can.", "melody"
            )
        alike = request.texts == [request.negative_prompt] and not request.melody
        guided = request.guidance_scale > 1 and not alike
        worn = self._adapters.worn(request) if self._adapters else None
        texts = [self.states(request.words(at_s), worn)]
        if guided:
            texts.append(self.states(request.negative_prompt, worn))
        return self._prefixes(self.melody, request, start_s, texts, worn) if self.melody else texts

    def followed(self, request: GenerationRequest) -> Chroma | None:
        """The melody over the whole of the new music; None without one."""
        return self.melody.followed(request) if self.melody else None

    def _prefixes(
        self,
        melody: MelodyEncoder,
        request: GenerationRequest,
        start_s: float,
        texts: list[Tensor | None],
        worn: Worn | None,
    ) -> list[Tensor | None]:
        """Chroma, then text, for each row: what is not wanted is without the melody."""
        columns = [melody.window(request, start_s), melody.silence]
        # The null prompt is one token, the end of the text, and its state is zeros.
        length = max(1 if text is None else len(text) for text in texts)
        rows: list[Tensor | None] = []
        for text, heard in zip(texts, columns, strict=False):
            chroma = melody.states(heard, worn)  # [columns, hidden]
            text = chroma.new_zeros(0, chroma.shape[1]) if text is None else text
            rows.append(torch.cat([chroma, F.pad(text, (0, 0, 0, length - len(text)))]))
        return rows

    @torch.inference_mode()
    def _encode(self, prompt: str, worn: Worn | None = None) -> Tensor | None:
        """The states of `prompt`, [tokens, hidden]; None for the null condition of ""."""
        if not prompt:
            return None
        numbers = self._tokens(prompt)
        if not numbers:
            return None
        device: Any = self.text_encoder.device
        states = self.text_encoder(input_ids=torch.tensor([numbers], device=device))[0][0]
        if self.projection is None:
            return states
        rows = Rows.of([(worn, len(states))])
        return rows.product(OUTSIDE, "enc_to_dec_proj", self.projection, states)

    def cut_after(self, prompt: str) -> str | None:
        """The last words that are heard of a prompt that is too long; None if all of it is.

        Raises:
            RequestError: as `_tokens`.
        """
        if len(self._tokens(prompt, whole=True)) <= MAX_TOKENS:
            return None
        with _of_the_tokenizer():
            words = self.tokenizer.decode(self._tokens(prompt), skip_special_tokens=True).split()
        return " ".join(words[-3:])

    def _tokens(self, prompt: str, whole: bool = False) -> list[int]:
        """The tokens of a prompt's beginning that is heard, or of the whole of it.

        Raises:
            RequestError: the tokenizer cannot read it, or is not that of the text encoder.
        """
        cut = {} if whole else {"max_length": MAX_TOKENS}
        with _of_the_tokenizer():
            tokens = self.tokenizer(prompt, truncation=not whole, **cut).input_ids
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._known:  # a GPU would fail
            raise RequestError(
                f"The tokenizer of this checkpoint is not its text encoder's, which knows "
                f"{self._known} tokens: choose another checkpoint, or save it again with its own "
                "tokenizer.",
                "checkpoint",
            )
        return tokens


@contextmanager
def _of_the_tokenizer() -> Iterator[None]:
    """Tells what a tokenizer makes of words that it cannot read, a panic in Rust included."""
    try:
        yield
    except faults.EXITS:
        raise
    except BaseException as error:
        if faults.out_of_memory(error):
            raise
        raise RequestError(
            "The tokenizer of this checkpoint cannot read these words: change them, or choose "
            "another checkpoint.",
            "prompt",
        ) from error
