"""What a result was made with, so that it can be made again, and told where it cannot."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

import fxfuse
from fxfuse.cli.recipe.schema import Made
from fxfuse.common.json_file import read_json
from fxfuse.errors import OptionError


def record(files: Iterable[Path], device: torch.device, base: Path) -> Made:
    """Return what a result is made with now; relative paths begin at `base`."""
    hashes = {_name(file, base): _sha256(file) for file in files}
    return Made(
        fxfuse=fxfuse.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        device=str(device),
        sha256=dict(sorted(hashes.items())),
    )


def parts_of(file: Path) -> list[Path]:
    """Return a file, and for the index of a checkpoint in several files those, too."""
    if not file.name.endswith(".index.json"):
        return [file] if file.is_file() else []
    try:
        shards = set(read_json(file)["weight_map"].values())
        return [file, *(file.parent / str(shard) for shard in sorted(shards))]
    # What the index lacks is said when it is read for its weights.
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [file]


def check_made(before: Made, now: Made) -> None:
    """Check that no file has changed, so that a result can come out again as it was.

    Warns where another version or device makes that doubtful.
    """
    changed = [name for name, sha in before.sha256.items() if now.sha256.get(name) != sha]
    if changed:
        found = now.sha256.get(changed[0], "unknown, since the file is not read")
        raise OptionError(
            "a file has changed since the recipe was run",
            where=changed[0],
            why=f"its SHA-256 is {found}, the recipe has {before.sha256[changed[0]]}",
            how="restore the file, or remove `made` from the recipe to make a new result",
        )
    for name in ("fxfuse", "torch", "python", "device"):
        one, other = getattr(before, name), getattr(now, name)
        if one != other:
            warnings.warn(
                f"the recipe was run with {name} {one}, and this is {other}: numbers may differ in "
                f"their last digits",
                stacklevel=2,
            )


def _name(file: Path, base: Path) -> str:
    return str(file.relative_to(base)) if file.is_relative_to(base) else str(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
