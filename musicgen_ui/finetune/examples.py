"""Songs as examples: codes of their pieces and states of their captions, computed once.

Both are kept in the run's folder, by the content of the audio file and by the caption, so a run
that was interrupted, or gets further songs, computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from musicgen_ui import files
from musicgen_ui.audio import clip as audio
from musicgen_ui.audio import load
from musicgen_ui.audio.clip import Clip
from musicgen_ui.checkpoints.registry import Loaded
from musicgen_ui.engine.codec import Codec
from musicgen_ui.engine.conditioning import Conditioner
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import dataset, pieces
from musicgen_ui.finetune.dataset import Song
from musicgen_ui.finetune.pieces import Measures
from musicgen_ui.finetune.progress import Event, Kind, Report
from musicgen_ui.request import FIELDS, GenerationRequest

MARGIN_FRAMES = 8  # are encoded beyond a piece's end and dropped: they hear the cut
FEWEST_FRAMES = 16  # of an example
STYLE_S = tuple(FIELDS["style_length_s"].metadata[key] for key in ("min", "max"))
_VERSION = "2"  # of what is cached


class PausedError(Exception):
    """The user paused the run before its first step."""


@dataclass(frozen=True, eq=False)
class Example:
    """A piece of a song."""

    codes: Tensor  # int16 [codebooks, frames]
    # float32 [tokens, hidden], ways to say what the piece is: its caption, and, of a melody or
    # style checkpoint, its caption without the melody or style.
    states: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Examples:
    """All that a run learns from."""

    pieces: list[Example]
    null: Tensor  # [tokens, hidden] of the uncond condition
    songs: list[Song]  # those that were read, with their captions
    prefix: bool  # states come before the codes, as in melody and style checkpoints


class Encoder:
    """Makes examples with a checkpoint's codec and text encoder.

    Args:
        loaded: the checkpoint; its codec and text encoder are taken over.
        device: where to compute states.
        cache: the folder for what was computed.
        codec_device: where to compute codes, if elsewhere.
    """

    def __init__(
        self, loaded: Loaded, device: torch.device, cache: Path, codec_device: str = ""
    ) -> None:
        model = loaded.model
        self._codec = Codec(
            model.audio_encoder, loaded.channels, codec_device or device, "float32", release=True
        )
        self._conditioner = Conditioner.of(model, loaded.tokenizer, device, loaded.extractor)
        self._name = loaded.name
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def examples(
        self,
        paths: Sequence[Path],
        activation_word: str,
        piece_s: float,
        report: Report,
        pause: threading.Event,
    ) -> Examples:
        """The pieces of the songs that can be read; others are reported and left out.

        Raises:
            RequestError: a caption is too long, or no song can be used.
            PausedError: `pause` was set.
        """
        written = [dataset.written_caption(path) for path in paths]  # refused before any work
        songs: list[Song] = []
        made: list[tuple[Song, list[dict[str, Tensor]]]] = []
        for i, (path, caption) in enumerate(zip(paths, written, strict=True)):
            if pause.is_set():
                raise PausedError
            report(Event(Kind.PREPARING, f"Song {i + 1} of {len(paths)}: {path.name}"))
            try:
                measures, coded = self._song(path, piece_s, report)
            except RequestError as error:
                report(Event(Kind.NOTE, f"{path.name} was left out: {error}"))
                continue
            suggested = not caption
            caption = caption or dataset.suggested_caption(path, measures)
            caption = dataset.with_word(caption, activation_word)
            dataset.require_short(caption, path.name)
            songs.append(Song(path, caption, suggested))
            made.append((songs[-1], coded))
        if not songs:
            raise RequestError("None of the audio files can be used: see the notes above.")
        texts = self._texts([song.caption for song in songs])
        found = [
            Example(piece["codes"], self._states(texts[song.caption], piece))
            for song, coded in made
            for piece in coded
        ]
        null = self._states(None, {})[-1]
        return Examples(found, null, songs, self._conditioner.prefixed)

    def _song(
        self, path: Path, piece_s: float, report: Report
    ) -> tuple[Measures, list[dict[str, Tensor]]]:
        """Measures and pieces of a song: codes, and its chroma or style where they condition."""
        key = hashlib.sha256(f"{_VERSION} {self._name} {piece_s} ".encode())
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: key).hexdigest()
        except OSError as error:
            raise RequestError(f"The file cannot be read: {error.strerror}.") from error
        cached = self._cache / f"{digest[:32]}.safetensors"
        if not cached.is_file():
            for note in self._encode(path, piece_s, cached):
                report(Event(Kind.NOTE, f"{path.name}: {note}"))
        with safe_open(cached, framework="pt") as opened:
            measures = Measures(**json.loads(opened.metadata()["measures"]))
            found: list[dict[str, Tensor]] = []
            for name in sorted(opened.keys(), key=lambda name: int(name.partition(".")[0])):
                number, _, what = name.partition(".")
                if int(number) == len(found):
                    found.append({})
                found[-1][what] = opened.get_tensor(name)
        return measures, found

    def _encode(self, path: Path, piece_s: float, cached: Path) -> tuple[str, ...]:
        """Writes a song's pieces into the cache; returns what is to be said about it."""
        reading = load.read(path, pieces.LONGEST_S)
        measures = pieces.measure(reading.clip)
        spans = pieces.cut(reading.clip, piece_s, measures.bars_s)
        clip = audio.convert(reading.clip, self._codec.sampling_rate, self._codec.channels)
        tensors: dict[str, Tensor] = {}
        count = 0
        for start_s, end_s in spans:
            piece, frames = self._piece(clip, start_s, end_s)
            if frames < FEWEST_FRAMES:
                continue
            codes = self._codec.encode(torch.from_numpy(piece))[:, :frames]
            tensors[f"{count}.codes"] = codes.to(torch.int16).cpu().contiguous()
            used = Clip(piece[:, : frames * self._codec.hop], clip.sampling_rate)
            if self._conditioner.melody:
                chroma = self._conditioner.melody.extractor(used)
                tensors[f"{count}.chroma"] = chroma.to(torch.uint8).cpu()
            if self._conditioner.style and used.duration_s >= STYLE_S[0]:
                tensors[f"{count}.style"] = self._style(used, count)
            count += 1
        if not count:
            raise RequestError("it is silent or shorter than a second: choose another file.")
        facts = {"tempo_bpm": measures.tempo_bpm, "key": measures.key}
        files.replace(cached, save(tensors, {"measures": json.dumps(facts)}))
        return reading.notes

    def _piece(self, clip: Clip, start_s: float, end_s: float) -> tuple[np.ndarray, int]:
        """float32 [channels, samples] of whole frames with the margin, and the frames without.

        It begins on the frame grid of the song, on which music made by a program may lie.
        """
        hop, rate = self._codec.hop, clip.sampling_rate
        start = round(start_s * rate / hop) * hop
        frames = (min(round(end_s * rate), clip.samples.shape[1]) - start) // hop
        some = clip.samples[:, start : start + (frames + MARGIN_FRAMES) * hop]
        whole = some.shape[1] // hop
        return np.ascontiguousarray(some[:, : whole * hop]), frames

    def _texts(self, captions: Sequence[str]) -> dict[str, Tensor | None]:
        """The text states of captions, from the cache where they are there."""
        cached = self._cache / "captions.safetensors"
        names = {caption: _digest(f"{self._name} {caption}") for caption in captions}
        found: dict[str, Tensor] = {}
        if cached.is_file():
            with safe_open(cached, framework="pt") as opened:
                there = set(opened.keys())
                found = {n: opened.get_tensor(n) for n in names.values() if n in there}
        missing = [caption for caption, name in names.items() if name not in found]
        for caption in missing:
            states = self._conditioner.states(caption)
            if states is not None:
                found[names[caption]] = states.float().cpu().clone()
        if missing and found:
            files.replace(cached, save(found))
        return {caption: found.get(name) for caption, name in names.items()}

    def _style(self, piece: Clip, seed: int) -> Tensor:
        """The style tokens of an excerpt from anywhere in a piece, as audiocraft trains."""
        style = self._conditioner.style
        assert style
        draws = np.random.default_rng(seed)
        length_s = draws.uniform(STYLE_S[0], min(STYLE_S[1], piece.duration_s))
        samples = round(length_s * piece.sampling_rate)
        begin = int(draws.integers(piece.samples.shape[1] - samples + 1))
        excerpt = Clip(piece.samples[:, begin : begin + samples], piece.sampling_rate)
        codebooks = min(GenerationRequest.style_codebooks, style.encoder.codebooks)
        return style.encode(excerpt, codebooks).cpu().clone()

    def _states(self, text: Tensor | None, piece: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The states of a piece: with its melody or style, and without."""
        text = self._null() if text is None else text
        melody, style = self._conditioner.melody, self._conditioner.style
        if style:
            before = [self._null()]
            if "style" in piece:
                with torch.inference_mode():
                    tokens = style.projection(piece["style"].to(self._device))
                before.insert(0, tokens.float().cpu())
            return tuple(torch.cat([each, text]).clone() for each in before)
        if melody is None:
            return (text,)
        columns, chroma = [melody.silence], piece.get("chroma")
        if chroma is not None:
            at = torch.arange(melody.length) % len(chroma)  # a short melody is repeated
            classes = melody.extractor.num_chroma
            columns.insert(0, F.one_hot(chroma.long()[at], classes).float())
        with torch.inference_mode():
            states = [melody.states(each.to(self._device)).float().cpu() for each in columns]
        return tuple(torch.cat([each, text]).clone() for each in states)

    def _null(self) -> Tensor:
        """The states of no words: zeros."""
        return torch.zeros(1, self._hidden)

    @property
    def _device(self) -> torch.device:
        return self._conditioner.text_encoder.device

    @property
    def _hidden(self) -> int:
        projection = self._conditioner.projection
        if projection is not None:
            return projection.out_features
        return int(self._conditioner.text_encoder.config.d_model)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
