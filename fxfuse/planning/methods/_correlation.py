"""Activations prepared for correlation."""

from __future__ import annotations

import numpy as np

from fxfuse.planning.measured import Matrix


def centred(activations: Matrix) -> Matrix:
    """Return each column with mean 0, [rows, n_units]; exactly 0 where it does not vary."""
    rest = activations - activations.mean(axis=0)
    # What is left of a constant column after its mean is taken off is rounding.
    varies = np.linalg.norm(rest, axis=0) > 1e-9 * np.linalg.norm(activations, axis=0)
    return np.where(varies, rest, 0.0)


def standardised(activations: Matrix) -> Matrix:
    """Return each column with mean 0 and norm 1, [rows, n_units]; 0 where it does not vary."""
    rest = centred(activations)
    norm = np.linalg.norm(rest, axis=0)
    scaled: Matrix = rest / np.where(norm, norm, 1.0)
    return scaled
