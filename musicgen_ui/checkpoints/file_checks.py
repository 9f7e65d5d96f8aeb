"""Checks on a checkpoint's files before they are opened.

A checkpoint may come from anywhere. A few bytes of JSON, YAML or pickle can ask for gigabytes of
memory or minutes of processor time, so each kind of file has bounds that no real checkpoint comes
near, and a file beyond them is refused before anything is allocated. Files that are not what they
should be, such as a Git LFS pointer or a saved web page, are refused by their cause, with what to
do about it. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import yaml

TEXT_BYTES = 300_000  # a configuration; published ones have 10 kB, of a tokenizer 60 kB
# As transformers takes and gives configurations; whoever uses a value checks it before.
JsonObject: TypeAlias = dict[str, Any]

DEPTH = 32  # of lists and objects in each other
LARGEST = 2**53  # number
SCALAR_CHARACTERS = 10_000  # of a value in YAML
BRACKETS = 500  # in YAML; its reader takes the square of them in each other
HEADER_BYTES = 20_000_000  # safetensors' list of weights; published ones have 200 kB
PICKLE_BYTES, PICKLE_STEPS = 8_000_000, 300_000  # of a pickle without its weights
TOKENIZER_BYTES = 20_000_000  # a tokenizer's file; T5's has 2.4 MB, multilingual ones 16 MB
EXTRA_IDS = 1000  # T5 has 100
GROWTH = 1000  # how many times longer a tokenizer may make a text
TEMPLATE_BYTES = 100_000  # what a tokenizer adds to each text

# The globals that a pickle of weights needs. Others that torch allows can allocate memory of any
# size from one number.
_GLOBALS = {
    *("collections OrderedDict", "torch Size", "torch device", "torch._utils _rebuild_tensor_v2"),
    *("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v3"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"),
    *("torch.serialization _get_layout", "torch.nn.parameter Parameter"),
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Bool", "Byte")),
    *(f"torch {kind}Storage" for kind in ("Char", "Short", "Int", "Long")),
    *("torch float32", "torch float16", "torch bfloat16", "torch float64", "torch int64"),
}
_OF_A_TOKENIZER = re.compile(r"token|vocab|merges|spiece|sentencepiece|\.(model|jinja)$")
_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in a file before torch 1.6


AGAIN = "copy or download that file again"
_HEAD_BYTES = 512


class UnusableError(Exception):
    """A file, or what it holds, cannot be used.

    Args:
        why: a clause without its full stop, such as "model.safetensors is empty".
        remedy: what to do, as a clause; `AGAIN` where the file itself is broken.
    """

    def __init__(self, why: str, remedy: str = AGAIN) -> None:
        super().__init__(f"{why}. {remedy[:1].upper()}{remedy[1:]}")
        self.why = why
        self.remedy = remedy


def check_files(files: Iterable[Path]) -> None:
    """Checks the first bytes of each file that exists.

    Raises:
        UnusableError: a file is empty, a Git LFS pointer or a web page, or cannot be opened.
    """
    for file in files:
        try:
            with file.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"{file.name} cannot be opened ({error.strerror})"
            raise UnusableError(why, "let this user read it") from error
        if not head:
            raise UnusableError(f"{file.name} is empty")
        if head.startswith(b"version https://git-lfs"):
            raise UnusableError(
                f"{file.name} is a Git LFS pointer, a few lines in place of the file",
                "run `git lfs pull` in that folder, or download the file itself",
            )
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise UnusableError(
                f"{file.name} is a web page, saved in place of the file",
                "download the file itself",
            )


class ForeignPickleError(pickle.UnpicklingError):
    """A pickle holds more than weights and plain values."""


class _Serialized(Protocol):
    """A part of a tokenizer of the library `tokenizers`, which has no types for it."""

    def __getstate__(self) -> bytes: ...


def read_object(file: Path, largest: float = LARGEST) -> JsonObject:
    """The JSON object in a file of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an object, too long, too deep, or has a number beyond `largest`.
    """
    _require_size(file, TEXT_BYTES)
    try:
        held = json.loads(file.read_text(encoding="utf-8"), parse_int=_integer)
    except RecursionError:
        raise ValueError("it is too deep") from None
    if not isinstance(held, dict):
        raise ValueError("it is not an object")
    require_plain(held, largest)
    return held


def read_yaml(text: str) -> object:
    """The value of a YAML text, without aliases, which can stand for billions of values.

    Raises:
        ValueError: it is no YAML, or beyond bounds.
    """
    if text.count("[") + text.count("{") > BRACKETS:
        raise ValueError("it has too many brackets")
    try:
        held: object = yaml.load(text, Loader=_AliasFreeLoader)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError("it is not plain YAML") from error
    require_plain(held)
    return held


class _AliasFreeLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        if len(node.value) > SCALAR_CHARACTERS:
            raise yaml.YAMLError("it has a very long value")
        return super().construct_scalar(node)


def require_plain(held: object, largest: float = LARGEST) -> None:
    """Raises ValueError for a value nested too deeply and for a number that is too large or NaN."""
    below: list[tuple[object, int]] = [(held, 1)]
    while below:
        value, depth = below.pop()
        if depth > DEPTH:
            raise ValueError("it is too deep")
        if isinstance(value, dict):
            below += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            below += [(item, depth + 1) for item in value]
        elif isinstance(value, (int, float)) and not -largest <= value <= largest:
            raise ValueError("it has a number that is too large, or NaN")


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= 400 else 10**400


def _require_size(file: Path, most: int) -> None:
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{file.name} is missing")
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file.name} has {size:,} bytes, and {most:,} are the most")


def require_weights(file: Path, also: Collection[str] = ()) -> None:
    """Requires that a file of weights, safetensors or pickle, creates nothing but tensors.

    Args:
        file: the weights.
        also: further globals that the pickle may name, as "module name"; stand-ins replace them.

    Raises:
        OSError: it cannot be read.
        ForeignPickleError: it holds other objects than weights.
        ValueError, pickle.UnpicklingError: it is damaged, or asks for more than it holds.
    """
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            if int.from_bytes(opened.read(8), "little") > HEADER_BYTES:
                raise ValueError(f"{file.name} has too long a list of weights")
    elif zipfile.is_zipfile(file):
        _require_plain_archive(file, also)
    else:
        with file.open("rb") as opened:
            _require_old_pickle(opened, also)


def _require_plain_archive(file: Path, also: Collection[str]) -> None:
    """Requires an archive as torch writes it: uncompressed, so it cannot expand."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        size = sum(entry.file_size for entry in entries)
        if not stored or len(names) < len(entries) or size > file.stat().st_size:
            raise pickle.UnpicklingError("it is compressed, or lists a file twice")
        pickles = [e for e in entries if Path(e.filename).name == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
            raise pickle.UnpicklingError("it has no list of weights of usual length")
        _require_plain_pickle(io.BytesIO(archive.read(pickles[0])), also)


def _require_old_pickle(opened: BinaryIO, also: Collection[str]) -> None:
    """A file from before torch 1.6: magic number, version, system info, weights, their keys."""
    head = io.BytesIO(opened.read(PICKLE_BYTES))
    if _require_plain_pickle(head, also) != [_MAGIC]:
        raise pickle.UnpicklingError("it is not a file of torch")
    for _ in range(4):
        _require_plain_pickle(head, also)


def _require_plain_pickle(opened: io.BytesIO, also: Collection[str]) -> list[object]:
    """Checks a pickle's opcodes without running them; gives the long integers in it."""
    numbers: list[object] = []
    try:
        for step, (code, argument, _) in enumerate(pickletools.genops(opened)):
            if step > PICKLE_STEPS:
                raise pickle.UnpicklingError("it has too many opcodes")
            named = code.name in ("GLOBAL", "STACK_GLOBAL", "INST")
            if named and argument not in _GLOBALS and argument not in also:
                raise ForeignPickleError(f"GLOBAL {argument or ''} does not belong to weights")
            if code.name == "LONG1":
                numbers.append(argument)
    except (ValueError, IndexError, UnicodeError, OverflowError) as error:
        raise pickle.UnpicklingError("it is cut short or damaged") from error
    return numbers


def require_small_tokenizer(folder: Path) -> None:
    """Requires that the files of the tokenizer in a folder are of ordinary size.

    Raises:
        OSError, ValueError: they are not.
    """
    for file in folder.iterdir():
        if _OF_A_TOKENIZER.search(file.name) and file.is_file():
            _require_size(file, TOKENIZER_BYTES)
    file = folder / "tokenizer_config.json"
    if file.is_file():  # "no limit" of the length is written as 1e30
        extra = read_object(file, math.inf).get("extra_ids", 0)
        if not isinstance(extra, int) or not 0 <= extra <= EXTRA_IDS:
            raise ValueError(f"{file.name} asks for more than {EXTRA_IDS} extra_ids")


def require_bounded_tokenizer(tokenizer: object) -> None:
    """Requires that a tokenizer does not turn a short text into a very long one.

    Args:
        tokenizer: transformers', after `require_small_tokenizer`.

    Raises:
        ValueError: it does.
    """
    made = getattr(tokenizer, "backend_tokenizer", None)
    if made is None:
        return
    if made.normalizer is not None and _growth(_state(made.normalizer)) > GROWTH:
        raise ValueError("its tokenizer makes texts far longer")
    if made.post_processor is not None and len(bytes(made.post_processor.__getstate__())) > (
        TEMPLATE_BYTES
    ):
        raise ValueError("its tokenizer adds too much to each text")


def _state(part: _Serialized) -> JsonObject:
    state: JsonObject = json.loads(bytes(part.__getstate__()))
    return state


def _growth(normalizer: JsonObject) -> float:
    """How many times longer a text can become."""
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(_growth(inner) for inner in normalizer["normalizers"])
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        grown = len(normalizer["content"]) / len(pattern) if pattern else 0
        return max(1, grown or 1 + len(normalizer["content"]))
    if kind == "Prepend":
        return 1 + len(normalizer["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(base64.b64decode(normalizer["precompiled_charsmap"]))
    return 18 if kind.startswith("NF") else 3  # Unicode's own longest; lower case, accents …


def _longest_replacement(charsmap: bytes) -> int:
    """Of sentencepiece's table: the size of an index, the index, texts with a zero at their end."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")), 1)
