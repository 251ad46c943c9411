"""A network as a graph: capture, the eager fallback, and the facts about operators."""
