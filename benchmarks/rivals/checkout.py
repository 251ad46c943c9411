"""A rival's repository on this machine: what its modules import, and its commit."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock


def use(checkout: Path, *, unused: Sequence[str] = ()) -> str:
    """Make the modules of a repository importable.

    Args:
        checkout: Its folder.
        unused: Modules that it imports and that the part which runs here never calls.

    Returns:
        The commit.
    """
    sys.path.insert(0, str(checkout.resolve()))
    for name in unused:
        stand_in = types.ModuleType(name)
        stand_in.__getattr__ = lambda attribute: MagicMock(name=attribute)  # type: ignore[method-assign]
        sys.modules.setdefault(name, stand_in)
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
