"""The concatenated network: all members side by side in one graph (DESIGN.md section 5, "wide").

Every labelled dimension grows; a `Layout` says which copy of which index stands where. Layouts
start at the parameters and flow through the graph: data movement runs on arrays of positions,
everything else hands a layout to whatever carries the same neurons. Shape literals are rewritten
from the labels of their node, never by matching numbers. `walk.py` says which file widens which
operator.
"""

from fxfuse.transform.resizing.member import program_at
from fxfuse.transform.resizing.resized import Resized, emit_fused, resized_of
from fxfuse.transform.resizing.walk import (
    apart_names,
    blank,
    emit_resized,
    limit_sizes,
    output_layouts,
)

__all__ = [
    "Resized",
    "apart_names",
    "blank",
    "emit_fused",
    "emit_resized",
    "limit_sizes",
    "output_layouts",
    "program_at",
    "resized_of",
]
