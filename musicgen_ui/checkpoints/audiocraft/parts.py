"""What an audiocraft checkpoint only names: its text encoder, and sometimes its codec.

Both are in transformers' format, in a folder or on the Hub. audiocraft writes T5's ids without
their owner, "t5-base", as they were before 2024; the cache may know them under either.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen_ui import files
from musicgen_ui.audio import untrusted
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import hub
from musicgen_ui.checkpoints.hub_errors import HubError
from musicgen_ui.checkpoints.unusable import Unusable, check_files
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

_TOKENIZER_AGAIN = "copy or save the tokenizer again"
FIELD = "checkpoint"  # of the request, which all that goes wrong here is about
T5_VOCABULARY = 32128  # of every T5, whose tokenizers are one and the same
_PUBLISHED = (
    *("google-t5/t5-base", "t5-base"),
    *(f"facebook/musicgen-{s}{word}" for s in ("", "stereo-") for word in configuration.META_WORDS),
)


def hub_id(name: str) -> str:
    """ "t5-base", as audiocraft writes it, is "google-t5/t5-base" on the Hub."""
    return name if "/" in name else f"google-t5/{name}"


def place(name: str) -> Path | str:
    """What a user names: a folder with a `config.json`, or else an id on the Hub.

    What a checkpoint names is never a folder: one that only happens to have that name would
    stand in for the Hub's.
    """
    folder = files.expanded(name)
    return folder if (folder / "config.json").is_file() or not _is_id(name) else name


def read_config(where: Path | str, advice: str) -> dict[str, Any]:
    """The `config.json` of a folder or of an id on the Hub.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    if isinstance(where, str):
        file = _asked(where, advice, hub.config_file)
    else:
        file = _folder(where, advice) / "config.json"
    try:
        config = untrusted.read_object(file)
    except (OSError, ValueError) as error:
        raise RequestError(f"{where} has no readable config.json: {advice}.", FIELD) from error
    return config


def fetched(where: Path | str, advice: str, say: Callable[[str], None]) -> Path:
    """The folder of a text encoder or codec: `where` itself, or that of an id on the Hub.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    if isinstance(where, Path):
        return _folder(where, advice)
    return _asked(where, advice, lambda repo_id: hub.download(repo_id, say))


def _folder(folder: Path, advice: str) -> Path:
    if not folder.is_dir():
        raise RequestError(f'There is no folder "{str(folder)[:80]}": {advice}.', FIELD)
    return folder


def _is_id(name: str) -> bool:
    return bool(hub.ID.fullmatch(hub_id(name)))


def _asked(name: str, advice: str, ask: Callable[[str], Path]) -> Path:
    """What the Hub or its cache answers about `name`."""
    try:
        return ask(name if hub.cached(name) else hub_id(name))
    except HubError as error:
        why = f"The checkpoint needs {name}, and {error.why[:1].lower()}{error.why[1:]}"
        raise HubError(why, f"{error.remedy}; or {advice}", FIELD) from error


def with_tokenizer(
    folder: Path, repo_id: str | None, vocabulary: int, say: Callable[[str], None]
) -> Path:
    """The folder with a text encoder's tokenizer: `folder`, or where it is taken from instead.

    A checkpoint on the Hub has its own fetched. Where there is none, that of T5 serves a text
    encoder with T5's vocabulary, as those of all published checkpoints are.

    Args:
        folder: of the text encoder's weights.
        repo_id: the repository that `folder` is a snapshot of; None if it is not from the Hub.
        vocabulary: the size of the text encoder's vocabulary.
        say: hears of a download.

    Raises:
        RequestError: there is none, or it cannot be had now.
    """
    if hub.has_tokenizer(folder):
        return folder
    try:
        own = hub.tokenizer(repo_id, say) if repo_id else None
    except HubError:
        if repo_id not in _PUBLISHED:  # whose tokenizers are alike
            raise
        own = None
    if own:
        return own
    if vocabulary != T5_VOCABULARY:
        raise RequestError(
            f"{folder} has no tokenizer ({' or '.join(hub.VOCABULARIES)}), without which all "
            "prompts sound alike: copy that of the checkpoint it was trained from into it, or save "
            "it there with the processor's save_pretrained.",
            FIELD,
        )
    for name in _PUBLISHED:
        for file in hub.VOCABULARIES:
            found = hub.cached_with(name, file)
            if found:
                return found
    try:
        found = hub.tokenizer(hub_id("t5-base"), say)
    except HubError as error:
        raise HubError(
            f"{folder} has no tokenizer, and that of t5-base cannot be had: {error.why}",
            f"{error.remedy}; or copy the {hub.VOCABULARIES[0]} of the checkpoint that it was "
            "trained from into it",
            FIELD,
        ) from error
    assert found, "t5-base on the Hub has a tokenizer"
    return found


def tokenizer(folder: Path, vocabulary: int) -> Any:
    """transformers' tokenizer in `folder`, for a text encoder with so large a vocabulary.

    Raises:
        Unusable: it cannot be read, is empty or is another text encoder's.
    """
    from transformers import AutoTokenizer

    _check_tokenizer(folder)
    try:
        untrusted.require_small_tokenizer(folder)
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        untrusted.require_calm_tokenizer(made)
    except Exception as error:
        why = f"its tokenizer cannot be read ({str(error)[:160]})"
        raise Unusable(why, _TOKENIZER_AGAIN) from error
    ids = set(made.get_vocab().values())
    if len(ids - set(made.all_special_ids)) < 2:  # what transformers makes up where it finds none
        raise Unusable("its tokenizer knows no words", _TOKENIZER_AGAIN)
    if max(ids) >= vocabulary:
        raise Unusable(
            f"its tokenizer has {max(ids) + 1} tokens and its text encoder {vocabulary}",
            "copy the tokenizer that belongs to the text encoder",
        )
    return made


def _check_tokenizer(folder: Path) -> None:
    check_files(folder / name for name in (*hub.VOCABULARIES, "tokenizer_config.json"))
    pieces = folder / "spiece.model"
    if pieces.is_file() and not (folder / "tokenizer.json").is_file():
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2  # transformers reads it with these

        model: Any = sentencepiece_model_pb2
        try:
            model.ModelProto.FromString(pieces.read_bytes())
        except DecodeError as error:
            raise Unusable("spiece.model is damaged or cut short") from error


def codec(folder: Path) -> dict[str, Tensor]:
    """EnCodec's weights in `folder`, under the names they have in MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import EncodecModel

    return _part("audio_encoder", EncodecModel, folder)


def text_encoder(folder: Path) -> dict[str, Tensor]:
    """T5's weights in `folder`, under the names they have in MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import T5EncoderModel

    return _part("text_encoder", T5EncoderModel, folder)


def _part(part: str, kind: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of a model in transformers' format, under the names they have in MusicGen."""
    try:
        check_files(hub.weights_in(folder))
        for file in hub.weights_in(folder):
            untrusted.require_weights(file)
        model, found = kind.from_pretrained(
            folder, local_files_only=True, weights_only=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[:5]}")
    except Unusable as error:
        raise RequestError(f"{folder} cannot be used: {error}.", FIELD) from error
    except Exception as error:
        raise RequestError(
            f"{folder} could not be read: it must hold {kind.__name__}'s weights in transformers' "
            "format. Name another folder, or fetch it again.",
            FIELD,
        ) from error
    tied = "encoder.embed_tokens.weight"  # T5's; `shared` has it
    return {f"{part}.{key}": w for key, w in model.state_dict().items() if key != tied}


def quieten() -> None:
    """Keeps transformers' progress bars and one harmless warning to itself."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.configuration_utils").addFilter(_not_the_start_token)


def _not_the_start_token(record: logging.LogRecord) -> bool:
    """MusicGen's start token is one past the codes, as it must be: no word of warning."""
    return not re.search(r"(pad|bos)_token_id must be .* vocabulary", record.getMessage())
