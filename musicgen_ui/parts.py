"""What an audiocraft checkpoint only names: its text encoder, and sometimes its codec.

Both are in transformers' format, in a folder or on the Hub. audiocraft writes T5's ids without
their owner, "t5-base", as they were before 2024; the cache may know them under either.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen_ui import files, hub
from musicgen_ui.request import RequestError

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "checkpoint"  # of the request, which all that goes wrong here is about


def hub_id(name: str) -> str:
    """ "t5-base", as audiocraft writes it, is "google-t5/t5-base" on the Hub."""
    return name if "/" in name else f"google-t5/{name}"


def read_config(name: str, advice: str) -> dict[str, Any]:
    """The `config.json` of a folder or of an id on the Hub.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    folder = files.expanded(name)
    file = folder / "config.json" if folder.is_dir() else _asked(name, advice, hub.config_file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} has no readable config.json: {advice}.", FIELD) from error
    return config


def fetched(name: str, advice: str, say: Callable[[str], None]) -> Path:
    """The folder of a text encoder or codec: `name` itself, or downloaded.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    folder = files.expanded(name)
    if folder.is_dir():
        return folder
    return _asked(name, advice, lambda repo_id: hub.download(repo_id, say))


def _asked(name: str, advice: str, ask: Callable[[str], Path]) -> Path:
    """What the Hub or its cache answers about `name`."""
    if not hub.ID.fullmatch(hub_id(name)):
        raise RequestError(f'There is no folder "{name[:80]}": {advice}.', FIELD)
    try:
        return ask(name if hub.cached(name) else hub_id(name))
    except RequestError as error:
        why = str(error).partition(":")[0]
        raise RequestError(f"{why}, which the checkpoint needs: {advice}.", FIELD) from error


def codec(folder: Path) -> dict[str, Tensor]:
    """EnCodec's weights in `folder`, under the names they have in MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import EncodecModel

    return _part("audio_encoder", EncodecModel, folder)


def text_encoder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The tokenizer and T5's weights in `folder`, under the names they have in MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    weights = _part("text_encoder", T5EncoderModel, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), weights
    except Exception as error:
        raise RequestError(
            f"{folder} has no readable tokenizer: name a folder that has T5 and its tokenizer with "
            "--text-encoder.",
            FIELD,
        ) from error


def _part(part: str, kind: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of a model in transformers' format, under the names they have in MusicGen."""
    try:
        model, found = kind.from_pretrained(
            folder, local_files_only=True, weights_only=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[:5]}")
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
