"""The three kinds of checkpoints: whole in transformers' format, a decoder alone, and audiocraft's.

Each has its configuration before a weight is read (`config`), downloads what is not on this
computer (`fetch`) and reads the model (`load`). Text encoder, decoder and codec come from three
trainings, so it is checked that they fit before anything large is downloaded or read.
`registry.open_checkpoint` makes the right kind of a `Source`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from musicgen_ui import files
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import file_checks, hub
from musicgen_ui.checkpoints.audiocraft import convert
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.checkpoints.config_types import Configuration
from musicgen_ui.checkpoints.file_checks import JsonObject, UnusableError, check_files
from musicgen_ui.checkpoints.hub import Report
from musicgen_ui.checkpoints.hub_errors import HubError
from musicgen_ui.engine.faults import out_of_memory
from musicgen_ui.errors import RequestError
from musicgen_ui.request import WINDOW_S

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from musicgen_ui.engine.transformer import Model

# A decoder's model type, and that of the whole model.
_WHOLE = {"musicgen_decoder": "musicgen", "musicgen_melody_decoder": "musicgen_melody"}
_SHAPE = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim"),
    *("num_codebooks", "audio_channels", "vocab_size"),
)
_CARD_CHARACTERS = 20_000  # that are read of a card
# transformers patches its own classes while it reads a model: two at once lose tied weights.
_READING = threading.Lock()


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from."""

    name: str  # the short name, Hub id or folder that resolves to it again
    folder: Path | None = None  # None: it is on the Hub, under its name
    # The files in the folder: names, sizes and times of change. Empty unless asked for.
    contents: tuple[tuple[str, int, int], ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: transformers' model on the CPU and its own tokenizer."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    name: str
    sampling_rate: int  # Hz
    channels: int
    extractor: dict[str, object]  # the feature extractor's configuration
    window_s: float = WINDOW_S  # the length of the decoder's training examples


class Checkpoint(Protocol):
    """A checkpoint that was found, of one of the three kinds."""

    source: Source
    base: str  # the checkpoint whose text encoder and codec complete it; "" where it is whole

    def config(self) -> Configuration:
        """The configuration; asks the Hub where it is not on this computer.

        Raises:
            RequestError: there is none, or it is not MusicGen's.
        """
        ...

    def generation(self) -> dict[str, object]:
        """transformers' generation settings, as far as they are on this computer; not trusted."""
        ...

    def fetch(self, report: Report) -> Path:
        """The checkpoint's folder, after a download of what is not here, reported in words.

        Raises:
            RequestError: it cannot be had, or its parts do not fit.
        """
        ...

    def load(self, dtype: torch.dtype, report: Report, streamed: bool = False) -> Loaded:
        """Reads the weights as `dtype`, whatever they are stored as, after `fetch`.

        With `streamed` the decoder's layers are read one by one when they are asked for, as they
        are stored, so that they are never all in memory before they are packed.

        Raises:
            RequestError: it cannot be had, is damaged, or its parts do not fit.
            MemoryError, torch.OutOfMemoryError: there is not enough memory for it.
        """
        ...


class Pretrained:
    """A whole checkpoint in transformers' format.

    Args:
        source: where it is.
        find: finds another checkpoint by name, whose tokenizer this one may use.
        config: where it is known without reading a file.
    """

    base = ""

    def __init__(
        self, source: Source, find: Callable[[str], Pretrained], config: Configuration | None = None
    ) -> None:
        self.source = source
        self._find = find
        self._config = config

    def config(self) -> Configuration:
        """See `Checkpoint.config`."""
        if self._config is None:
            self._config = configuration.read(self.source.name, config_file(self.source))
        return self._config

    def generation(self) -> dict[str, object]:
        """See `Checkpoint.generation`."""
        return _generation(self.source)

    def fetch(self, report: Report) -> Path:
        """See `Checkpoint.fetch`."""
        configuration.check(self.source.name, self.config())  # before gigabytes are downloaded
        folder = self.source.folder or hub.download(self.source.name, report)
        self.tokenizer_folder(folder, report)
        return folder

    def load(self, dtype: torch.dtype, report: Report, streamed: bool = False) -> Loaded:
        """See `Checkpoint.load`."""
        return _load(self, self, dtype, report, streamed)

    def tokenizer_folder(self, folder: Path, report: Report) -> Path:
        """The folder with the tokenizer of the checkpoint in `folder`: its own, or its base's."""
        from musicgen_ui.checkpoints import loading  # torch: seconds

        vocabulary = self.config()["text_encoder"]["vocab_size"]
        named = "" if hub.has_tokenizer(folder) else base_name(folder / "config.json")
        if named:
            try:
                base = self._find(named)
                if base.source != self.source and base.vocabulary() == vocabulary:
                    found = base.source.folder or hub.tokenizer(base.source.name, report)
                    if found and hub.has_tokenizer(found):
                        return found
            except RequestError as error:  # a path on its trainer's computer, or no network
                if isinstance(error, HubError) and vocabulary != loading.T5_VOCABULARY:
                    raise
        repo_id = None if self.source.folder else self.source.name
        return loading.with_tokenizer(folder, repo_id, vocabulary, report)

    def vocabulary(self) -> int:
        """The number of tokens that the text encoder knows."""
        return int(self.config()["text_encoder"]["vocab_size"])


class DecoderAlone:
    """A fine-tuned decoder as transformers saves a `MusicgenForCausalLM`: its base completes it.

    Text encoder and codec were not trained, so they are the base's.
    """

    def __init__(self, source: Source, base: Pretrained) -> None:
        self.source = source
        self.base = base.source.name
        self.base_source = base.source
        self._base = base

    def config(self) -> Configuration:
        """See `Checkpoint.config`."""
        own, base = _decoder_config(config_file(self.source)), self._base.config()
        kind = _WHOLE[own["model_type"]]
        if (kind == "musicgen_melody") != configuration.prefixed(base):
            raise RequestError(
                f"Of the decoder {self.source.name} and its base, only one follows melodies or a "
                "style: name the checkpoint it was trained from under base_model in its "
                "config.json.",
                "checkpoint",
            )
        completed: JsonObject = {**base, **base["melody"], **base["training"]}
        if not base["style"]:
            del completed["style"]
        completed |= {"decoder": own, "model_type": kind}
        return configuration.parse(self.source.name, completed)

    def generation(self) -> dict[str, object]:
        """See `Checkpoint.generation`."""
        return _generation(self.source)

    def fetch(self, report: Report) -> Path:
        """See `Checkpoint.fetch`."""
        configuration.check(self.source.name, self.config())
        folder = self.source.folder or hub.download(self.source.name, report)
        self._base.fetch(report)
        return folder

    def load(self, dtype: torch.dtype, report: Report, streamed: bool = False) -> Loaded:
        """See `Checkpoint.load`."""
        return _load(self, self._base, dtype, report, streamed)


class Audiocraft:
    """A checkpoint in audiocraft's format, converted while it is read.

    Args:
        source: where it is.
        config: where it is known without opening a file.
    """

    base = ""

    def __init__(self, source: Source, config: Configuration | None = None) -> None:
        self.source = source
        self._known_config = config
        self._settings: convert.Files | None = None  # of both files, without their weights

    def config(self) -> Configuration:
        """See `Checkpoint.config`."""
        if self._known_config is not None:
            return self._known_config
        name, folder = self.source.name, self._folder()
        if folder is None:
            return configuration.parse(name, convert.config_on_the_hub(name))
        return configuration.parse(name, convert.config_of(folder, self._settings_in(folder)))

    def generation(self) -> dict[str, object]:
        """See `Checkpoint.generation`."""
        folder = self._folder()
        return convert.generation_of(self._settings_in(folder)) if folder else {}

    def fetch(self, report: Report) -> Path:
        """See `Checkpoint.fetch`."""
        folder = self._downloaded(report)
        convert.fetch(folder, self._settings_in(folder), report)
        return folder

    def load(self, dtype: torch.dtype, report: Report, streamed: bool = False) -> Loaded:
        """See `Checkpoint.load`."""
        folder = self._downloaded(report)
        opened = self._open(folder)
        config = self.config()
        configuration.check(self.source.name, config)
        convert.fetch(folder, opened, report)
        report(f"reading {self.source.name}")
        with _reading(self.source):
            model, tokenizer, extractor = convert.load(folder, opened, dtype, streamed)
        return _loaded(self.source, config, model, tokenizer, extractor)

    def _folder(self) -> Path | None:
        return self.source.folder or hub.cached(self.source.name)

    def _downloaded(self, report: Report) -> Path:
        folder = self._folder()
        if folder is None:
            configuration.check(self.source.name, self.config())  # before gigabytes are downloaded
            folder = hub.download(self.source.name, report)
        return folder

    def _open(self, folder: Path) -> convert.Files:
        opened = exported.read_both(folder)
        model, codec = (replace(file, weights={}) for file in opened)
        self._settings = model, codec
        return opened

    def _settings_in(self, folder: Path) -> convert.Files:
        """Both files without their weights, which are opened at most once for it."""
        if self._settings is None:
            self._open(folder)
        assert self._settings
        return self._settings


def config_file(source: Source) -> Path:
    """The checkpoint's `config.json`, which may be missing; asks the Hub if it is not here.

    Raises:
        RequestError: there is no such repository, or no network.
    """
    return source.folder / "config.json" if source.folder else hub.config_file(source.name)


def is_decoder_alone(file: Path) -> bool:
    """Whether `config.json` describes a decoder alone."""
    kind = _decoder_config(file).get("model_type")
    return isinstance(kind, str) and kind in _WHOLE


def base_name(file: Path) -> str:
    """The base that a `config.json`, or the card beside it, names; "" if neither does."""
    for values in (_decoder_config(file), _card(file.with_name("README.md"))):
        for key in ("base_model", "base_model_name_or_path"):
            name = values.get(key)
            name = name[0] if isinstance(name, list) and name else name
            if isinstance(name, str) and name:
                return name
    return ""


def has_decoder_of(file: Path, config: Configuration) -> bool:
    """Whether a decoder's `config.json` has the shape of the decoder in `config`."""
    own, prefixed = _decoder_config(file), configuration.prefixed(config)
    kind = "musicgen_melody_decoder" if prefixed else "musicgen_decoder"
    return own["model_type"] == kind and all(
        own.get(key, default) == config["decoder"].get(key)
        for key, default in configuration.decoder_defaults(_SHAPE).items()
    )


def _decoder_config(file: Path) -> JsonObject:
    try:
        return file_checks.read_object(file)
    except (OSError, ValueError):
        return {}


def _card(file: Path) -> dict[str, object]:
    """The YAML between the two lines of three dashes at the top of a model card."""
    try:
        with file.open(encoding="utf-8") as opened:
            head = opened.read(_CARD_CHARACTERS).split("---\n")
        values = file_checks.read_yaml(head[1]) if len(head) > 2 and not head[0] else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _generation(source: Source) -> dict[str, object]:
    folder = source.folder or hub.cached_with(source.name, configuration.GENERATION_FILE)
    return configuration.read_generation(folder) if folder else {}


def _load(
    checkpoint: Pretrained | DecoderAlone,
    rest: Pretrained,
    dtype: torch.dtype,
    report: Report,
    streamed: bool,
) -> Loaded:
    """Reads the decoder of `checkpoint` and the other parts of `rest`, usually the same."""
    from musicgen_ui.checkpoints import loading  # torch: seconds

    source, config = checkpoint.source, checkpoint.config()
    folder = checkpoint.fetch(report)
    rest_folder = folder if rest is checkpoint else rest.fetch(report)
    folders = list(dict.fromkeys((folder, rest_folder)))
    for each in folders:
        _require_weights(source.name, each)
    report(f"reading {source.name}")
    with _reading(source):
        for each in folders:
            others = (each / name for name in hub.OTHERS if "*" not in name)
            check_files([*hub.weights_in(each), *others])
        base_config = configuration.read(rest.source.name, rest_folder / "config.json")
        configuration.check(source.name, base_config, rest_folder)
        words = rest.tokenizer_folder(rest_folder, report)
        prefixed = configuration.prefixed(config)
        model = loading.read(folder, rest_folder, dtype, prefixed, streamed)
        tokenizer = loading.tokenizer(words, rest.vocabulary())
        extractor = next(configuration.extractors(rest_folder), {})
    return _loaded(source, config, model, tokenizer, extractor)


def _loaded(
    source: Source,
    config: Configuration,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    extractor: dict[str, object],
) -> Loaded:
    rate, channels = config["audio_encoder"]["sampling_rate"], config["decoder"]["audio_channels"]
    window_s = config["training"]["window_s"]
    return Loaded(model, tokenizer, source.name, rate, channels, extractor, window_s)


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Reads one model at a time; turns what goes wrong into the sentence for the user."""
    try:
        with _READING:
            yield
    except UnusableError as error:
        raise _unusable(source, error.why, error.remedy) from error
    except Exception as error:
        if isinstance(error, RequestError) or out_of_memory(error):
            raise
        why = f"it could not be read ({type(error).__name__}: {str(error)[:200]})"
        raise _unusable(source, why, "save it again with save_pretrained") from error


def _unusable(source: Source, why: str, remedy: str) -> RequestError:
    if source.folder:
        remedy = f"{remedy}, or choose another checkpoint"
    elif damaged := hub.delete_damaged(source.name):
        remedy = (
            f"the copy of {', '.join(damaged)} in the Hub's cache was damaged and is deleted, so "
            "ask for the checkpoint again to download it"
        )
    else:
        remedy = "choose another checkpoint"
    error = UnusableError(why, remedy)
    return RequestError(f"{source.name} cannot be used: {error}.", "checkpoint")


def _require_weights(name: str, folder: Path) -> None:
    if not hub.weights_in(folder):
        raise RequestError(
            f"{name} is incomplete: {shown(folder)} has no model.safetensors or pytorch_model.bin.",
            "checkpoint",
        )


def shown(folder: Path) -> str:
    """A folder as its owner writes it, with "~" for the home folder: a take that names it does not
    tell who that is.
    """
    home = files.expanded("~")  # "~" itself where it is unknown
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
