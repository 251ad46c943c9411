"""Folders of the Hugging Face hub, by their id: `USER/NAME` or `USER/NAME@REVISION`."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from fxfuse.cli.wording import in_one_line
from fxfuse.errors import MissingDependencyError, OptionError

#: In front of the id of a member, or of a network.
PREFIX = "hf:"
_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
#: No code, and no weights that are pickled.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def is_hub_id(text: str) -> bool:
    """Tell whether a text names a folder of the hub, and none on this machine."""
    return bool(_ID.fullmatch(text)) and not Path(text).exists()


def local_folder(text: str) -> Path:
    """Return a folder on this machine; that of a hub id is downloaded, or taken from the cache.

    Raises:
        OptionError: The hub has no such folder, or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    if not is_hub_id(text):
        return Path(text)
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        how = "pip install huggingface_hub, or pass a folder on this machine"
        raise MissingDependencyError(
            "huggingface_hub is not installed", why=str(error), how=how
        ) from error
    repository, _, revision = text.partition("@")
    try:
        found = hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_FILES)
        )
    # Errors of the network and of the hub are of many kinds.
    except Exception as error:
        raise OptionError(
            f"{text} cannot be read from the Hugging Face hub",
            where=f"{PREFIX}{text}",
            why=in_one_line(error),
            how="check the id, your connection and `hf auth login`, or pass a folder on this "
            "machine",
        ) from error
    return Path(found)


def member_path(text: str) -> Path:
    """Return where a member is: of `hf:USER/NAME` the folder of the hub, else the path itself."""
    return local_folder(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)
