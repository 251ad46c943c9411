"""Rivals' own code and ours on the same members and the same calibration inputs, in one run.

Each script takes `--checkout`, a folder with the rival's public repository. Nothing of theirs is
kept here; the JSON names the commit.
"""
