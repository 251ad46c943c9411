"""From a plan and weights to tensors and a graph: applying maps, resizing, emitting."""
