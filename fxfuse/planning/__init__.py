"""The plan: methods, scores, sizes, and the role of every tensor."""
