"""Files that cannot be used, and why, in words.

What goes wrong with a checkpoint's or an adapter's file is told by its cause: a Git LFS pointer, a
web page that was saved in its place, a copy that was cut short. What to do follows from the cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

AGAIN = "copy or download that file again"
_HEAD_BYTES = 512


class Unusable(Exception):  # noqa: N818 - it is about the files
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
    """Looks at the beginning of each file that exists for what is no checkpoint's file at all.

    Raises:
        Unusable: a file is empty, a Git LFS pointer or a web page, or cannot be opened.
    """
    for file in files:
        try:
            with file.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"{file.name} cannot be opened ({error.strerror})"
            raise Unusable(why, "let this user read it") from error
        if not head:
            raise Unusable(f"{file.name} is empty")
        if head.startswith(b"version https://git-lfs"):
            raise Unusable(
                f"{file.name} is a Git LFS pointer, a few lines in place of the file",
                "run `git lfs pull` in that folder, or download the file itself",
            )
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise Unusable(
                f"{file.name} is a web page, saved in place of the file",
                "download the file itself",
            )
