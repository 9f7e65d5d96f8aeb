"""Which checkpoints there are, and where they come from.

A checkpoint is named by a short name ("bundled", "small", "stereo-medium"), by its id on the Hub,
or by a folder in transformers' or audiocraft's format. `resolve` turns a name into a `Source`,
`open_checkpoint` finds out of which kind it is, and `describe` says what it can do from its
configuration alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from musicgen_ui import files
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import hub, kinds, memory
from musicgen_ui.checkpoints.audiocraft import convert
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.checkpoints.config import PUBLISHED
from musicgen_ui.checkpoints.config_types import Configuration
from musicgen_ui.checkpoints.hub import Report
from musicgen_ui.checkpoints.kinds import (
    Audiocraft,
    Checkpoint,
    DecoderAlone,
    Loaded,
    Pretrained,
    Source,
    shown,
)
from musicgen_ui.engine.protocol import CheckpointInfo
from musicgen_ui.errors import RequestError
from musicgen_ui.files import ASSETS
from musicgen_ui.request import GenerationRequest

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "Loaded",
    "Source",
    "config_of",
    "describe",
    "fetch",
    "known",
    "load",
    "open_checkpoint",
    "resolve",
    "shown",
]

BUNDLED = ASSETS / "bundled"
DEFAULT_ON_GPU = "facebook/musicgen-small"
META_LICENCE = "CC-BY-NC 4.0"


def known() -> dict[str, Source]:
    """The checkpoints that have a short name, by it."""
    folders = (BUNDLED, BUNDLED.with_name(BUNDLED.name + "-stereo"))
    sources = {f.name: Source(f.name, f) for f in folders if (f / "config.json").is_file()}
    return sources | {word: Source(name) for word, name in PUBLISHED.items()}


def known_configs() -> dict[str, Configuration]:
    """The configurations of these checkpoints, by short name; asks no network."""
    return {
        word: configuration.published(word) if word in PUBLISHED else config_of(source)
        for word, source in known().items()
    }


def resolve(checkpoint: str, stereo: bool = False, device: str = "cpu") -> Source:
    """The source that `checkpoint` names, or its stereo sibling if `stereo`.

    "auto" is Meta's small checkpoint on CUDA, if the Hub or its cache has it, and else the
    bundled one. Asks the Hub only for "auto" on CUDA, and about stereo for an id that isn't known.

    Raises:
        RequestError: there is no such checkpoint, or it cannot do stereo.
    """
    if checkpoint == "auto":
        return _auto(stereo, device)
    return _with_stereo(_find(checkpoint), stereo)


def _with_stereo(source: Source, stereo: bool) -> Source:
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
    return _with_stereo(words.get("bundled") or _find("bundled"), stereo)


def _find(checkpoint: str) -> Source:
    words = known()
    checkpoint = hub.id_of(checkpoint)
    folder = folder_of(checkpoint)
    if folder and holds_checkpoint(folder):
        same = (source for source in words.values() if source.folder == folder)
        return next(same, Source(shown(folder), folder))
    asked = checkpoint.lower().removeprefix("facebook/")
    for word, source in words.items():
        if asked in (word, source.name.removeprefix("facebook/")):
            return source
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
    """Whether `folder` holds a checkpoint, and not only has the name of one."""
    return (folder / "config.json").is_file() or exported.is_audiocraft(folder)


def folder_of(name: str) -> Path | None:
    """The folder at the path `name`, or the folder of the file at that path; None if neither is.

    Raises:
        RequestError: visitors can put files there, or the file is not the one that is read of its
            folder.
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
            "Folders of uploads, takes and temporary files are no checkpoints and no adapters: "
            "name another folder.",
            "checkpoint",
        )
    if file:
        _require_main_file(file)
    return folder if there else None


def _require_main_file(file: Path) -> None:
    """Requires that `file` is the one that is read of its folder."""
    folder = file.parent
    read = [file.name for file in hub.weights_in(folder)] or [exported.language_model(folder).name]
    read += [name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
    if file.suffix != ".json" and file.name not in read:
        raise RequestError(
            f"{file.name} is not the file that is read of {shown(folder)}, which is "
            f"{' or '.join(read)}: give it that name, in a folder of its own with the other files "
            "of its checkpoint, and name that folder.",
            "checkpoint",
        )


_SUFFIXES = (".safetensors", ".bin", ".th", ".json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def _sibling(source: Source) -> Source | None:
    words = known()
    word = next((word for word, other in words.items() if other == source), "")
    return words.get("bundled-stereo" if word == "bundled" else f"stereo-{word}")


def with_contents(source: Source) -> Source:
    """The source with the files in its folder and in its base's, by which a change is noticed."""
    if source.folder is None:
        return source
    opened, found = open_checkpoint(source), _contents(source.folder)
    if isinstance(opened, DecoderAlone) and opened.base_source.folder:
        found += _contents(opened.base_source.folder)
    return replace(source, contents=found)


def _contents(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """The files that belong to the checkpoint in `folder`: path, size, time of change in ns."""
    found = []
    for place in (folder, folder / convert.TEXT_ENCODER, folder / convert.MERT):
        for pattern in _FILES:
            for file in sorted(place.glob(pattern)):
                status = file.stat()
                found.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(found)


_FILES = (*hub.OTHERS, *hub.WEIGHTS, *hub.AUDIOCRAFT, exported.TRAINED, "README.md")


def open_checkpoint(source: Source) -> Checkpoint:
    """The checkpoint at `source`, of the kind that its files are; asks the Hub if none are here.

    Raises:
        RequestError: there is no such checkpoint, it is an adapter, or a decoder without a base.
    """
    word = _published_word(source)
    folder = source.folder or hub.cached(source.name)
    if folder and exported.is_audiocraft(folder):
        return _audiocraft(source, word, _contents(folder))
    if word in configuration.AUDIOCRAFT_ALONE:
        return _audiocraft(source, word, ())
    if word or source in known().values():
        return _pretrained(source)
    file = kinds.config_file(source)
    _refuse_adapter(source, file.parent)
    here = source.folder or file.is_file()
    if not here and exported.LANGUAGE_MODEL in hub.names_on_the_hub(source.name):
        return _audiocraft(source, "", ())
    if kinds.is_decoder_alone(file):
        return DecoderAlone(source, _base_of(source, file))
    return _pretrained(source)


def _published_word(source: Source) -> str:
    """The short name of a checkpoint on the Hub; "" for any other."""
    return next((word for word, name in PUBLISHED.items() if source == Source(name)), "")


def _pretrained(source: Source) -> Pretrained:
    word = _published_word(source)
    config = configuration.published(word) if word else None
    return Pretrained(source, lambda name: _pretrained(_find(name)), config)


@functools.lru_cache(maxsize=8)
def _audiocraft(
    source: Source, word: str, contents: tuple[tuple[str, int, int], ...]
) -> Audiocraft:
    """Kept while its files are the same, since its settings are inside its large pickles."""
    del contents  # it is a part of the key
    return Audiocraft(source, configuration.published(word) if word else None)


def _base_of(source: Source, file: Path) -> Pretrained:
    """The checkpoint that completes a decoder alone.

    That is the one that its `config.json` or its card names, or else the published checkpoint with
    a decoder of the same shape.

    Raises:
        RequestError: there is none.
    """
    named = kinds.base_name(file)
    alike = (
        known()[word]
        for word, config in known_configs().items()
        if kinds.has_decoder_of(file, config)
    )
    base = _find(named) if named else next(alike, None)
    folder = base and (base.folder or hub.cached(base.name))
    if (
        base is None
        or _published_word(base) in configuration.AUDIOCRAFT_ALONE
        or (folder and exported.is_audiocraft(folder))
    ):
        raise RequestError(
            f"{source.name} is a decoder alone, without text encoder and codec: write the "
            "checkpoint that has them, in transformers' format, under base_model into its "
            "config.json.",
            "checkpoint",
        )
    return _pretrained(base)


def _refuse_adapter(source: Source, folder: Path) -> None:
    """Refuses an adapter that is named as a checkpoint; some have a whole config.json too."""
    if not (folder / hub.ADAPTER).is_file() or hub.weights_in(folder):
        return
    if source.folder is None and hub.weights_among(hub.names_on_the_hub(source.name)):
        return
    base = kinds.base_name(folder / hub.ADAPTER)
    raise RequestError(
        f"{source.name} is a LoRA adapter, not a checkpoint: name it as the adapter, and leave the "
        f"checkpoint at auto{f' or choose its base {base[:120]}' if base else ''}.",
        "checkpoint",
    )


def config_of(source: Source) -> Configuration:
    """See `Checkpoint.config`."""
    return open_checkpoint(source).config()


def fetch(source: Source, report: Report) -> Path:
    """See `Checkpoint.fetch`."""
    return open_checkpoint(source).fetch(report)


def load(source: Source, dtype: torch.dtype, report: Report, streamed: bool = False) -> Loaded:
    """See `Checkpoint.load`."""
    return open_checkpoint(source).load(dtype, report, streamed)


def describe(source: Source, bytes_a_weight: float = 4) -> CheckpointInfo:
    """What the checkpoint can do, from its configuration alone.

    Raises:
        RequestError: there is no such checkpoint, or it is not one for this app.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config()
    configuration.check(source.name, config)
    needed = memory.estimate_bytes(config, bytes_a_weight)
    stereo = config["decoder"]["audio_channels"] == 2
    rate, window_s = config["audio_encoder"]["sampling_rate"], config["training"]["window_s"]
    facts = [
        f"{memory.count_parameters(config) / 1e6:.0f} M parameters",
        f"about {memory.size_in_words(needed)} of memory",
        f"{'stereo' if stereo else 'mono'}, {rate / 1000:g} kHz",
    ]
    if config["training"]["sound_effects"]:
        facts.insert(0, "sound effects")
    if config["melody"]:
        facts.append("follows melodies")
    if config["style"]:
        facts.append("takes on a clip's style")
    if checkpoint.base:
        facts.append(f"text encoder and codec of {checkpoint.base}")
    if source.name in PUBLISHED.values():
        facts.append(f"weights {META_LICENCE}: not for commercial use")
    choice: Literal["choice", "always", "never"] = "choice" if _sibling(source) else "never"
    return CheckpointInfo(
        source.name,
        "always" if stereo else choice,
        rate,
        " · ".join(facts),
        melody=bool(config["melody"]),
        style=bool(config["style"]),
        defaults=configuration.own_defaults(checkpoint.generation(), config),
        window_s=window_s,
        nbytes=needed,
        download_bytes=_download_bytes(source, config),
    )


def _download_bytes(source: Source, config: Configuration) -> int:
    """What is fetched before a checkpoint can be used; 0 where it is on this computer."""
    if source.folder or hub.cached(source.name):
        return 0
    return memory.count_parameters(config) * 4  # published in float32


def require_able(source: Source, request: GenerationRequest) -> None:
    """Requires that the checkpoint can do what is asked.

    Raises:
        RequestError: it cannot follow a melody or chords, or take on a style, and the sentence
            names some that can; or it is a style checkpoint that is given nothing to go by.
    """
    config = config_of(source)
    if request.followed and not config["melody"]:
        able = ", ".join(word for word in PUBLISHED if "melody" in word)
        raise RequestError(
            f"{source.name} cannot follow {request.followed}: choose {able}, or another checkpoint "
            "that can.",
            "checkpoint",
        )
    if request.style and not config["style"]:
        raise RequestError(
            f"{source.name} cannot take on the style of a clip: choose style, or another "
            "checkpoint that can.",
            "checkpoint",
        )
    steered = (text for _, change in request.automation for text, _ in change.prompts or ())
    words = (*request.texts, *steered)
    if config["style"] and not (request.style or request.audio_prompt or any(words)):
        raise RequestError(
            f"{source.name} makes music from words, from the style of a clip, or from both: "
            "describe the music, or choose a style clip.",
            "prompt",
        )
