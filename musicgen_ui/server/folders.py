"""Where a server keeps its takes and the runs of fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from musicgen_ui import library, remote_folder
from musicgen_ui.errors import RequestError
from musicgen_ui.server.middleware import is_loopback
from musicgen_ui.server.settings import Settings, label


def object_storage(chosen: Settings, takes: Path) -> remote_folder.RemoteFolder | None:
    """The object storage of the takes, where there is one.

    Raises:
        RequestError: it cannot be used.
    """
    url = chosen.output_folder
    if not remote_folder.is_url(url) or url.startswith("file:"):
        return None
    return remote_folder.RemoteFolder(url, takes)


def is_shown_to_others(chosen: Settings) -> bool:
    """Whether this server is reached from other computers, by itself or through a proxy."""
    public = os.environ.get("SPACE_ID") or chosen.allowed_hosts or chosen.root_path
    return bool(chosen.share or public) or not is_loopback(chosen.host)


def is_users_alone(chosen: Settings) -> bool:
    """Whether only the user of this computer has the page, and any checkpoint."""
    others = is_shown_to_others(chosen) or chosen.trusted_proxies
    return chosen.any_checkpoint and not others


def kept_folder(chosen: Settings) -> Path | None:
    """Where takes are kept for good; None where they are temporary."""
    return library.kept_folder(chosen.output_folder, chosen.host, is_shown_to_others(chosen))


def finetune_folder(chosen: Settings) -> Path | None:
    """Where runs of fine-tuning are kept; None where others reach this server, which has no
    fine-tuning, nor where not every checkpoint may be named."""
    if not is_users_alone(chosen):
        return None
    home = Path(platformdirs.user_music_dir()) / library.FOLDER  # made by the first run
    folder = chosen.output_folder
    named = folder not in ("", library.TEMPORARY) and not remote_folder.is_url(folder)
    return (Path(folder) if named else home) / "fine-tuning"


def check_folder(chosen: Settings) -> None:
    """Makes the folder of takes.

    Raises:
        RequestError: it cannot be made or written to.
    """
    folder = kept_folder(chosen)
    if folder is None:
        return
    named = f"{label('output_folder')} cannot be {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{named}: {error.strerror}. Name a folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{named}, which cannot be written to: name another folder.")
