"""Which line of the user's code a graph node comes from."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import torch
from torch import fx

_TORCH_ROOT = f"{Path(torch.__file__).parent}/"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_of(node: fx.Node) -> str:
    """Innermost frame of the user's code that made this node, as `file:line  code`.

    Frames inside torch itself are passed over; empty when the node has no stack trace.
    """
    frames = [(m["file"], int(m["line"])) for m in _FRAME.finditer(node.stack_trace or "")]
    outside = [frame for frame in frames if not frame[0].startswith(_TORCH_ROOT)]
    if not outside:
        return ""
    file, line = outside[-1]
    return f"{file}:{line}  {linecache.getline(file, line).strip()}".rstrip()


def where_of(node: fx.Node) -> str:
    """Name and source line of a node, for messages."""
    return f"node {node.name!r}  {source_of(node)}".rstrip()
