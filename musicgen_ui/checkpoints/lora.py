"""LoRA adapters by name: a folder or a Hub id, as peft saves them, and the base they belong to.

`engine.lora` applies an adapter to a checkpoint; here it is found and downloaded. An adapter names
the checkpoint that it was trained on: "auto" takes that one, and another published checkpoint is
refused, since some have the same shapes.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

from musicgen_ui.checkpoints import file_checks, hub, registry
from musicgen_ui.checkpoints.file_checks import UnusableError, check_files
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

CONFIG, WEIGHTS = hub.ADAPTER, "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # by older peft, in place of WEIGHTS


def find(name: str) -> Source:
    """Where the adapter comes from; asks no network.

    Raises:
        RequestError: it is neither a folder nor a Hub id.
    """
    name = hub.id_of(name, "adapter")
    try:
        folder = registry.folder_of(name)
    except RequestError as error:
        raise RequestError(str(error), "adapter") from error
    if folder and ((folder / CONFIG).is_file() or not hub.ID.fullmatch(name)):
        return Source(registry.shown(folder), folder)
    if hub.ID.fullmatch(name):
        return Source(name)
    raise RequestError(
        f'There is no adapter "{name[:80]}": name a folder or a Hub id with {CONFIG} and '
        f"{WEIGHTS}, as peft saves them.",
        "adapter",
    )


def fetch(source: Source) -> Path:
    """The folder with the adapter's files, downloaded where it is on the Hub.

    Raises:
        RequestError: it cannot be had, or is not an adapter.
    """
    folder = source.folder or _downloaded(source.name)
    found = [folder / file for file in (WEIGHTS, PICKLED) if (folder / file).is_file()]
    if not (folder / CONFIG).is_file() or not found:
        if source.folder and registry.holds_checkpoint(folder) and not found:
            raise RequestError(
                f"{source.name} is a checkpoint, not a LoRA adapter: choose it as the checkpoint.",
                "adapter",
            )
        lacking = WEIGHTS if (folder / CONFIG).is_file() else CONFIG
        raise RequestError(
            f"{source.name} is not an adapter: it has no {lacking}. Name the folder that peft's "
            "save_pretrained wrote.",
            "adapter",
        )
    try:
        check_files([folder / CONFIG, found[0]])
        file_checks.read_object(folder / CONFIG)
        file_checks.require_weights(found[0])
    except UnusableError as error:
        raise RequestError(
            f"The adapter {source.name} cannot be used: {error}.", "adapter"
        ) from error
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise RequestError(
            f"{source.name} is not a readable adapter ({error}): save it again with peft.",
            "adapter",
        ) from error
    return folder


def _downloaded(name: str) -> Path:
    for weights in (WEIGHTS, PICKLED):
        folder = hub.cached_with(name, weights)
        if folder and (folder / CONFIG).is_file():
            return folder
    weights = WEIGHTS if WEIGHTS in hub.names_on_the_hub(name, "adapter") else PICKLED
    return hub.files(name, (CONFIG, weights), "adapter")


def with_base(
    request: GenerationRequest, source: Source, folder: Path, device: str
) -> GenerationRequest:
    """The request with the adapter's own base where it left the checkpoint open.

    Raises:
        RequestError: it asks for another published checkpoint than that base.
    """
    base = base_of(folder)
    request = dataclasses.replace(request, adapter=source.name)
    if base is None:
        return request
    if request.checkpoint == "auto":
        return dataclasses.replace(request, checkpoint=base.name)
    asked = registry.resolve(request.checkpoint, request.stereo, device)
    published = registry.known().values()
    if asked != base and asked in published and base in published:
        raise RequestError(
            f"The adapter {source.name} was trained on {base.name}, not on {asked.name}: choose "
            "that checkpoint.",
            "adapter",
        )
    return request


def base_of(folder: Path) -> Source | None:
    """The checkpoint that an adapter says it was trained on; None where it cannot be had."""
    try:
        config = file_checks.read_object(folder / CONFIG)
        return registry.resolve(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a RequestError too: it is not here, or named by a path of its trainer's
