"""Which checkpoints there are, where they come from, and loading them.

A checkpoint is named by a word ("bundled", "small", "stereo-medium"), by its id on the Hub, or by
a folder in transformers' or audiocraft's format. `resolve` turns a name into a `Source`, `describe`
says what it can do from its configuration alone, `load` reads its weights. The parts of a
checkpoint, text encoder, decoder and codec, come from three trainings, so `load` checks that they
fit before it reads a weight. Memory is counted from the configuration too: what a model will need
is known before it is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from musicgen_ui import completion, configuration, convert, defaults, exported, files, hub
from musicgen_ui.engine.events import Description
from musicgen_ui.engine.faults import out_of_memory
from musicgen_ui.request import RequestError

if TYPE_CHECKING:
    import torch
    from transformers import (
        MusicgenForConditionalGeneration,
        MusicgenMelodyForConditionalGeneration,
        PreTrainedTokenizerBase,
    )

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "bundled"
DEFAULT_ON_GPU = "facebook/musicgen-small"
META_LICENCE = "CC-BY-NC 4.0"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from."""

    name: str  # the word, Hub id or folder that resolves to it again
    folder: Path | None = None  # None: it is on the Hub, under its name


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: transformers' model on the CPU and its own tokenizer."""

    model: MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    name: str
    sampling_rate: int  # Hz
    channels: int
    extractor: dict[str, Any]  # the feature extractor's configuration


def known() -> dict[str, Source]:
    """The checkpoints that need no Hub id or folder, by the word that names them."""
    folders = (BUNDLED, BUNDLED.with_name(BUNDLED.name + "-stereo"))
    sources = {f.name: Source(f.name, f) for f in folders if (f / "config.json").is_file()}
    for stereo in ("", "stereo-"):
        sources |= {
            stereo + w: Source(f"facebook/musicgen-{stereo}{w}") for w in configuration.META_WORDS
        }
    return sources


def resolve(checkpoint: str, stereo: bool = False, device: str = "cpu") -> Source:
    """The source that `checkpoint` names, or its stereo sibling where stereo is wanted.

    "auto" is Meta's small checkpoint on CUDA, if the Hub or its cache has it, and else the
    bundled one. Asks the Hub only for "auto" on CUDA, and about stereo for an id that isn't known.

    Raises:
        RequestError: there is no such checkpoint, or it cannot do stereo.
    """
    if checkpoint == "auto":
        return _auto(stereo, device)
    source = _find(checkpoint)
    if not stereo or config_of(source)["decoder"]["audio_channels"] == 2:
        return source
    sibling = _sibling(source)
    if sibling is None:
        raise RequestError(
            f"{source.name} is mono and has no stereo sibling: switch stereo off, or choose "
            "a checkpoint that has one, such as facebook/musicgen-small.",
            "stereo",
        )
    return sibling


def _auto(stereo: bool, device: str) -> Source:
    if device == "cuda":
        source = resolve(DEFAULT_ON_GPU, stereo)
        if hub.has(source.name):
            return source
    return resolve("bundled", stereo)


def _find(checkpoint: str) -> Source:
    words = known()
    word = checkpoint.lower().removeprefix("facebook/").removeprefix("musicgen-")
    if word in words:
        return words[word]
    folder = folder_of(checkpoint)
    if folder:
        same = (source for source in words.values() if source.folder == folder)
        return next(same, Source(shown(folder), folder))
    if hub.ID.fullmatch(checkpoint) and not checkpoint.endswith((".git", ".")):
        return Source(checkpoint)
    names = ", ".join(words)
    raise RequestError(
        f'There is no checkpoint or folder "{checkpoint[:80]}": choose one of {names}, a Hub '
        f"id such as {DEFAULT_ON_GPU}, or a folder with a checkpoint in transformers' format.",
        "checkpoint",
    )


def folder_of(checkpoint: str) -> Path | None:
    """The folder that a name is the path of, if there is one."""
    try:
        folder = files.expanded(checkpoint)
        return folder.resolve() if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long, not permitted, a loop of links
        return None


def shown(folder: Path) -> str:
    """A folder as its owner writes it: takes name it, and need not tell who that is."""
    home = files.expanded("~")  # "~" itself where nobody knows it
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _sibling(source: Source) -> Source | None:
    words = known()
    word = next((word for word, other in words.items() if other == source), "")
    return words.get("bundled-stereo" if word == "bundled" else f"stereo-{word}")


def describe(source: Source, bytes_a_weight: float = 4) -> Description:
    """What the checkpoint can do, from its configuration alone.

    Raises:
        RequestError: there is no such checkpoint, or it is not one for this app.
    """
    config = config_of(source)
    configuration.check(source.name, config)
    memory = configuration.estimate_bytes(config, bytes_a_weight)
    stereo = config["decoder"]["audio_channels"] == 2
    rate = config["audio_encoder"]["sampling_rate"]
    parts = [
        f"{configuration.count_parameters(config) / 1e6:.0f} M parameters",
        f"about {configuration.size_in_words(memory)} of memory",
        f"{'stereo' if stereo else 'mono'}, {rate / 1000:g} kHz",
    ]
    if config["melody"]:
        parts.append("follows melodies")
    if base := _base_of(source):
        parts.append(f"text encoder and codec of {base.name}")
    if source.name.startswith("facebook/musicgen-"):
        parts.append(f"weights {META_LICENCE}: not for commercial use")
    choice: Literal["choice", "always", "never"] = "choice" if _sibling(source) else "never"
    return Description(
        source.name,
        "always" if stereo else choice,
        rate,
        " · ".join(parts),
        melody=bool(config["melody"]),
        defaults=defaults.stated(_generation(source), config),
    )


def hold_melody(source: Source) -> None:
    """Holds that the checkpoint can follow a melody.

    Raises:
        RequestError: it cannot; the sentence names some that can.
    """
    if not config_of(source)["melody"]:
        able = ", ".join(word for word in known() if "melody" in word)
        raise RequestError(
            f"{source.name} cannot follow a melody: choose {able}, or another checkpoint that can.",
            "checkpoint",
        )


def _generation(source: Source) -> dict[str, Any]:
    """What the checkpoint's `generation_config.json` holds, as far as it is here."""
    if source.folder and exported.is_audiocraft(source.folder):
        return convert.generation_of(source.folder)
    folder = source.folder or hub.cached_with(source.name, defaults.FILE)
    return defaults.read(folder) if folder else {}


def config_of(source: Source) -> configuration.Configuration:
    """The checkpoint's configuration: known, read from its folder, or fetched from the Hub.

    Raises:
        RequestError: there is none, or it is not MusicGen's.
    """
    base = _base_of(source)
    if base is None:
        return _own_config(source)
    return completion.config(source.name, _config_file(source), _own_config(base))


def _own_config(source: Source) -> configuration.Configuration:
    if source.folder and exported.is_audiocraft(source.folder):
        return configuration.of(source.name, convert.config_of(source.folder))
    if source.folder is None and source in known().values():
        word = source.name.removeprefix("facebook/musicgen-")
        return configuration.meta(word.removeprefix("stereo-"), word.startswith("stereo-"))
    return configuration.read(source.name, _config_file(source))


def _config_file(source: Source) -> Path:
    return source.folder / "config.json" if source.folder else hub.config_file(source.name)


def _base_of(source: Source) -> Source | None:
    """The checkpoint that completes one which is a decoder alone; None for any other.

    Raises:
        RequestError: it names none that could, and has no published checkpoint's shape.
    """
    published = known().values()
    if source in published or (source.folder and exported.is_audiocraft(source.folder)):
        return None
    file = _config_file(source)
    if not completion.is_alone(file):
        return None
    named = completion.base_name(file)
    alike = (s for s in published if completion.is_of_size(file, _own_config(s)))
    base = _find(named) if named else next(alike, None)
    if base is None or (base.folder and exported.is_audiocraft(base.folder)):
        raise completion.baseless(source.name)
    return base


def fetch(source: Source, say: Callable[[str], None]) -> Path:
    """The checkpoint's folder, after a download of what is not here; `say` hears how far it is.

    Raises:
        RequestError: it cannot be had.
    """
    configuration.check(source.name, config_of(source))  # before gigabytes are fetched
    folder = source.folder or hub.download(source.name, say)
    if exported.is_audiocraft(folder):
        convert.fetch(folder, say)
    return folder


def load(
    source: Source, dtype: torch.dtype, say: Callable[[str], None], streamed: bool = False
) -> Loaded:
    """Reads the checkpoint's weights as `dtype`, whatever they are stored as, after a download
    where one is needed; `say` hears what is going on.

    With `streamed` the decoder's layers are read one by one when they are asked for, as they are
    stored: what packs them never holds them all.

    Raises:
        RequestError: it cannot be had, is damaged, or its parts do not fit.
        MemoryError, torch.OutOfMemoryError: there is no room for it.
    """
    folder, config = fetch(source, say), config_of(source)
    base = _base_of(source)
    if not exported.is_audiocraft(folder):
        for part in (folder, *([fetch(base, say)] if base else ())):
            _hold_weights(source.name, part)
        if not base:
            config = configuration.read(source.name, folder / "config.json")
            configuration.check(source.name, config, folder)
    say(f"reading {source.name}")
    try:
        with _READING:
            if exported.is_audiocraft(folder):
                model, tokenizer, extractor = convert.load(folder, dtype, streamed)
            else:
                from musicgen_ui import weights  # torch: seconds

                rest = fetch(base, say) if base else folder
                model, tokenizer = weights.read(
                    folder, rest, dtype, bool(config["melody"]), streamed
                )
                extractor = next(configuration.extractors(rest), {})
    except Exception as error:
        if isinstance(error, RequestError) or out_of_memory(error):
            raise
        raise RequestError(
            f"{source.name} could not be read, its files are damaged or incomplete: delete "
            f"{shown(folder)} and fetch it again, or choose another checkpoint.",
            "checkpoint",
        ) from error
    rate, channels = config["audio_encoder"]["sampling_rate"], config["decoder"]["audio_channels"]
    return Loaded(model, tokenizer, source.name, rate, channels, extractor)


def _hold_weights(name: str, folder: Path) -> None:
    if not hub.weights_in(folder):
        raise RequestError(
            f"{name} is incomplete: {shown(folder)} has no model.safetensors or pytorch_model.bin.",
            "checkpoint",
        )


# transformers patches its own classes while it reads a model: two at once lose tied weights.
_READING = threading.Lock()
