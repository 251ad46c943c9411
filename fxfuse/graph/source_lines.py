"""Which line of the user's code a graph node comes from."""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import fx

_TORCH_ROOT = f"{Path(torch.__file__).parent}/"
_OWN_ROOT = f"{Path(__file__).parents[1]}/"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_of(node: fx.Node) -> str:
    """Return the innermost frame of the user's code that made this node, as `file:line  code`.

    The file is named as seen from where Python imports it (`package/file.py`), so that the text is
    short and the same on every machine. Frames inside torch itself are passed over; empty when the
    node has no stack trace.
    """
    return _innermost(
        [(m["file"], int(m["line"])) for m in _FRAME.finditer(node.stack_trace or "")]
    )


def source_of_caller() -> str:
    """Return the innermost line of the user's code that is running, as `source_of` does."""
    stack = reversed(list(traceback.walk_stack(inspect.currentframe())))
    return _innermost_running(stack)


def source_of_error(error: BaseException) -> str:
    """Return the innermost line of the user's code that an error came from, as `source_of` does."""
    return _innermost_running(traceback.walk_tb(error.__traceback__))


def _innermost_running(stack: Iterable[tuple[FrameType, int]]) -> str:
    """The innermost frame that is not our own code, which runs the user's."""
    frames = ((frame.f_code.co_filename, line) for frame, line in stack)
    return _innermost([frame for frame in frames if not frame[0].startswith(_OWN_ROOT)])


def _innermost(frames: Sequence[tuple[str, int]]) -> str:
    outside = [frame for frame in frames if not frame[0].startswith(_TORCH_ROOT)]
    if not outside:
        return ""
    file, line = outside[-1]
    return f"{_as_imported(file)}:{line}  {linecache.getline(file, line).strip()}".rstrip()


def at_line(name: str, source: str) -> str:
    """Return a name, and the file and line of what `source_of` returned, without the code."""
    line = source.partition("  ")[0]
    return f"{name} ({line})" if line else name


def _as_imported(file: str) -> str:
    """A path relative to the nearest folder that modules are imported from; itself if in none."""
    roots = (os.path.join(os.path.abspath(root), "") for root in sys.path)
    inside = max((root for root in roots if file.startswith(root)), key=len, default="")
    return file.removeprefix(inside)


def where_of(node: fx.Node) -> str:
    """Name and source line of a node, for messages."""
    return f"node {node.name!r}  {source_of(node)}".rstrip()
