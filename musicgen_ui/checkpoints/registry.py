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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from musicgen_ui import files
from musicgen_ui.checkpoints import completion, defaults, hub
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints.audiocraft import convert, parts
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.checkpoints.hub_errors import HubError
from musicgen_ui.checkpoints.unusable import Unusable, check_files
from musicgen_ui.engine.faults import out_of_memory
from musicgen_ui.engine.protocol import Description
from musicgen_ui.errors import RequestError
from musicgen_ui.files import ASSETS

if TYPE_CHECKING:
    import torch
    from transformers import (
        MusicgenForConditionalGeneration,
        MusicgenMelodyForConditionalGeneration,
        PreTrainedTokenizerBase,
    )

BUNDLED = ASSETS / "bundled"
DEFAULT_ON_GPU = "facebook/musicgen-small"
META_LICENCE = "CC-BY-NC 4.0"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from."""

    name: str  # the word, Hub id or folder that resolves to it again
    folder: Path | None = None  # None: it is on the Hub, under its name
    # What lies in the folder: names, sizes and times of change. Empty where nobody asked.
    contents: tuple[tuple[str, int, int], ...] = field(default=(), compare=False, repr=False)


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
    return _as_asked(_find(checkpoint), stereo)


def _as_asked(source: Source, stereo: bool) -> Source:
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
    words = known()
    if device == "cuda":
        name = DEFAULT_ON_GPU.removeprefix("facebook/musicgen-")
        source = words[f"stereo-{name}" if stereo else name]
        if hub.has(source.name):
            return source
    return _as_asked(words.get("bundled") or _find("bundled"), stereo)


def _find(checkpoint: str) -> Source:
    words = known()
    checkpoint = hub.id_of(checkpoint)
    folder = folder_of(checkpoint)
    if folder and holds_checkpoint(folder):
        same = (source for source in words.values() if source.folder == folder)
        return next(same, Source(shown(folder), folder))
    word = checkpoint.lower().removeprefix("facebook/").removeprefix("musicgen-")
    if word in words:
        return words[word]
    if folder:
        return Source(shown(folder), folder)
    if hub.ID.fullmatch(checkpoint) and not checkpoint.endswith((".git", ".")):
        return Source(checkpoint)
    names = ", ".join(words)
    raise RequestError(
        f'There is no checkpoint or folder "{checkpoint[:80]}": choose one of {names}, a Hub '
        f"id such as {DEFAULT_ON_GPU}, or a folder with a checkpoint in transformers' format.",
        "checkpoint",
    )


def holds_checkpoint(folder: Path) -> bool:
    """Whether `folder` is more than one that happens to have a checkpoint's name."""
    return (folder / "config.json").is_file() or exported.is_audiocraft(folder)


def folder_of(name: str) -> Path | None:
    """The folder that a name is the path of, or that has the file that it is the path of.

    Raises:
        RequestError: visitors can put files there, or it is the path of a file that is not the one
            that its folder stands for.
    """
    try:
        path = files.expanded(name)
        file = path if path.is_file() and path.suffix in _SUFFIXES else None
        folder = (path.parent if file else path).resolve()
        visitors = files.is_visitors(folder)
        there = folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, not permitted, a loop of links
        return None
    if visitors:
        raise RequestError(
            "Uploads, takes and temporary files are no checkpoints and no adapters: name another "
            "folder.",
            "checkpoint",
        )
    if file:
        _check_meant(file)
    return folder if there else None


def _check_meant(file: Path) -> None:
    """Holds that the folder of `file`, named in its place, means that file."""
    folder = file.parent
    meant = [file.name for file in hub.weights_in(folder)] or [exported.language_model(folder).name]
    meant += [name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
    if file.suffix != ".json" and file.name not in meant:
        raise RequestError(
            f"{file.name} is not the file that is read of {shown(folder)}, which is "
            f"{' or '.join(meant)}: give it that name, in a folder of its own with the other files "
            "of its checkpoint, and name that folder.",
            "checkpoint",
        )


_SUFFIXES = (".safetensors", ".bin", ".th", ".json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def shown(folder: Path) -> str:
    """A folder as its owner writes it: takes name it, and need not tell who that is."""
    home = files.expanded("~")  # "~" itself where nobody knows it
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _sibling(source: Source) -> Source | None:
    words = known()
    word = next((word for word, other in words.items() if other == source), "")
    return words.get("bundled-stereo" if word == "bundled" else f"stereo-{word}")


def with_contents(source: Source) -> Source:
    """The source with what lies in its folder and in its base's, by which a change is noticed."""
    folders = [source.folder] if source.folder else []
    base = _base_of(source) if source.folder else None
    if base and base.folder:
        folders.append(base.folder)
    found = []
    for folder in [f for own in folders for f in (own, own / convert.TEXT_ENCODER)]:
        for pattern in _READ:
            for file in sorted(folder.glob(pattern)):
                status = file.stat()
                found.append((str(file), status.st_size, status.st_mtime_ns))
    return replace(source, contents=tuple(found))


_READ = (*hub.OTHERS, *hub.WEIGHTS, *hub.AUDIOCRAFT, exported.TRAINED, "README.md")


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
    own = _audiocraft(source)
    if own:
        return convert.generation_of(own)
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
    if _is_published(source) and source.folder is None:
        word = source.name.removeprefix("facebook/musicgen-")
        return configuration.meta(word.removeprefix("stereo-"), word.startswith("stereo-"))
    folder = _audiocraft(source)
    if folder:
        return configuration.of(source.name, convert.config_of(folder))
    file = _config_file(source)
    _refuse_adapter(source, file.parent)
    if source.folder or file.is_file():
        return configuration.read(source.name, file)
    if exported.LANGUAGE_MODEL in hub.names_on_the_hub(source.name):
        return configuration.of(source.name, convert.config_on_the_hub(source.name))
    return configuration.read(source.name, file)  # raises: there is none


def _is_published(source: Source) -> bool:
    return source in known().values()


def _audiocraft(source: Source) -> Path | None:
    """The folder of a checkpoint in audiocraft's format; None for any other, or if not here."""
    if _is_published(source):
        return None
    folder = source.folder or hub.cached(source.name)
    return folder if folder and exported.is_audiocraft(folder) else None


def _config_file(source: Source) -> Path:
    return source.folder / "config.json" if source.folder else hub.config_file(source.name)


def _refuse_adapter(source: Source, folder: Path) -> None:
    """Tells of an adapter that is named as a checkpoint; a whole config.json may lie beside it."""
    if not (folder / hub.ADAPTER).is_file() or hub.weights_in(folder):
        return
    if source.folder is None and hub.weights_among(hub.names_on_the_hub(source.name)):
        return
    base = completion.base_name(folder / hub.ADAPTER)
    raise RequestError(
        f"{source.name} is a LoRA adapter, not a checkpoint: name it as the adapter, and leave the "
        f"checkpoint at auto{f' or choose its base {base[:120]}' if base else ''}.",
        "checkpoint",
    )


def _base_of(source: Source) -> Source | None:
    """The checkpoint that completes one which is a decoder alone; None for any other.

    Raises:
        RequestError: it names none that could, and has no published checkpoint's shape.
    """
    published = known().values()
    if source in published or _audiocraft(source):
        return None
    file = _config_file(source)
    if not completion.is_alone(file):
        return None
    _refuse_adapter(source, file.parent)
    named = completion.base_name(file)
    alike = (s for s in published if completion.is_of_size(file, _own_config(s)))
    base = _find(named) if named else next(alike, None)
    if base is None or _audiocraft(base):
        raise completion.baseless(source.name)
    return base


def fetch(source: Source, say: Callable[[str], None]) -> Path:
    """The checkpoint's folder, after a download of what is not here; `say` hears how far it is.

    Raises:
        RequestError: it cannot be had.
    """
    config = config_of(source)
    configuration.check(source.name, config)  # before gigabytes are fetched
    folder = source.folder or hub.download(source.name, say)
    if exported.is_audiocraft(folder):
        convert.fetch(folder, say)
        return folder
    base = _base_of(source)
    if base:
        fetch(base, say)
    else:
        _with_tokenizer(source, folder, config, say)
    return folder


def _with_tokenizer(
    source: Source, folder: Path, config: configuration.Configuration, say: Callable[[str], None]
) -> Path:
    """The folder with the tokenizer of a checkpoint in `folder`: its own, or its base's."""
    vocabulary = config["text_encoder"]["vocab_size"]
    named = "" if hub.has_tokenizer(folder) else completion.base_name(folder / "config.json")
    if named:
        try:
            base = _find(named)
            if base != source and config_of(base)["text_encoder"]["vocab_size"] == vocabulary:
                found = base.folder or hub.tokenizer(base.name, say)
                if found and hub.has_tokenizer(found):
                    return found
        except RequestError as error:  # a path of its trainer's, or no network
            if isinstance(error, HubError) and vocabulary != parts.T5_VOCABULARY:
                raise
    repo_id = None if source.folder else source.name
    return parts.with_tokenizer(folder, repo_id, vocabulary, say)


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
    say(f"reading {source.name}")
    try:
        with _READING:
            if exported.is_audiocraft(folder):
                model, tokenizer, extractor = convert.load(folder, dtype, streamed)
            else:
                model, tokenizer, extractor = _read(source, base, folder, dtype, streamed, say)
    except Unusable as error:
        told = Unusable(error.why, _remedy(source, folder, error.remedy))
        raise RequestError(f"{source.name} cannot be used: {told}.", "checkpoint") from error
    except Exception as error:
        if isinstance(error, RequestError) or out_of_memory(error):
            raise
        why = f"it could not be read ({type(error).__name__}: {str(error)[:200]})"
        told = Unusable(why, _remedy(source, folder, "save it again with save_pretrained"))
        raise RequestError(f"{source.name} cannot be used: {told}.", "checkpoint") from error
    rate, channels = config["audio_encoder"]["sampling_rate"], config["decoder"]["audio_channels"]
    return Loaded(model, tokenizer, source.name, rate, channels, extractor)


def _read(
    source: Source,
    base: Source | None,
    folder: Path,
    dtype: torch.dtype,
    streamed: bool,
    say: Callable[[str], None],
) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer and its feature extractor's configuration."""
    from musicgen_ui.checkpoints import loading  # torch: seconds

    rest = fetch(base, say) if base else folder
    for part in dict.fromkeys((folder, rest)):
        others = (part / name for name in hub.OTHERS if "*" not in name)
        check_files([*hub.weights_in(part), *others])
    config = configuration.read((base or source).name, rest / "config.json")
    configuration.check(source.name, config, rest)
    words = _with_tokenizer(base or source, rest, config, say)
    model = loading.read(folder, rest, dtype, bool(config["melody"]), streamed)
    tokenizer = parts.tokenizer(words, config["text_encoder"]["vocab_size"])
    return model, tokenizer, next(configuration.extractors(rest), {})


def _remedy(source: Source, folder: Path, remedy: str) -> str:
    """What to do about files that cannot be used."""
    if source.folder:
        return f"{remedy}, or choose another checkpoint"
    damaged = hub.damaged(folder)
    if damaged:
        return (
            f"delete {shown(damaged[0])}, a file of the Hub's cache that is not what the Hub "
            "holds, and it is downloaded again"
        )
    return "its files are as the Hub holds them, so choose another checkpoint"


def _hold_weights(name: str, folder: Path) -> None:
    if not hub.weights_in(folder):
        raise RequestError(
            f"{name} is incomplete: {shown(folder)} has no model.safetensors or pytorch_model.bin.",
            "checkpoint",
        )


# transformers patches its own classes while it reads a model: two at once lose tied weights.
_READING = threading.Lock()
