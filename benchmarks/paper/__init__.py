"""The paper's experiments and ours, each one command; `setting` holds what they share."""
