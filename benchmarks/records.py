"""Results that a benchmark writes case by case, so that a run that is cut off can go on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def earlier(path: Path, key: str, *, keep: bool) -> list[dict[str, Any]]:
    """What an earlier run measured.

    Args:
        path: Its JSON file.
        key: Where the list stands in it.
        keep: Whether it counts; else, and where there is no file, nothing was measured.
    """
    if not keep or not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[key]
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes results as JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add(path: Path, rows: list[dict[str, Any]], measured: Iterable[dict[str, Any]]) -> None:
    """Adds rows one by one as they are measured: each is printed, but for sizes, and written."""
    for row in measured:
        print({key: value for key, value in row.items() if key != "sizes"}, flush=True)
        rows.append(row)
        write(path, {"versions": versions(), "rows": rows})


def described() -> str:
    """The commit of the working tree, and whether it has changes beside."""
    git = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).resolve().parent
    return subprocess.run(git, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose models are swept."""
    found = {"python": platform.python_version()}
    for library in ("torch", "torchvision", "timm", "transformers"):
        # Imported here, before processes fork, so that each of them has it at once.
        found[library] = __import__(library).__version__
    return found


def on_device(name: str) -> dict[str, str | None]:
    """The kind of a device, and of a CUDA device its name."""
    device = torch.device(name)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "card": card}
