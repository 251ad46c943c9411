"""Oracles 1 and 2 on many random networks; prints counts and every violation.

    python benchmarks/random_networks.py [--seconds 600] [--seed 0] [--json FILE]

The networks are those of `tests/strategies.py`, drawn by a plain generator: nothing is shrunk.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from fxfuse import verify
from tests.strategies import (
    IMAGE,
    TOKENS,
    VECTOR,
    Block,
    Recipe,
    Space,
    build,
    images,
    is_plain,
    kinds,
)


def draw(rng: random.Random, plain: bool) -> Recipe:
    def blocks(space: Space, most: int) -> tuple[Block, ...]:
        names = kinds(space, plain=plain)
        return tuple(
            Block(rng.choice(names), rng.randint(2, 4), rng.randint(2, 3), rng.random() < 0.5)
            for _ in range(rng.randint(0, most))
        )

    stem = rng.randint(2, 6)
    if rng.random() < 0.5:
        bridge = rng.choice(["mean", "flatten"])
        return Recipe(stem, blocks(IMAGE, 4), bridge, vectors=blocks(VECTOR, 2))
    end = rng.choice(["mean", "flatten", "first"])
    return Recipe(stem, blocks(IMAGE, 2), "tokens", blocks(TOKENS, 3), end, blocks(VECTOR, 1))


def violations(recipe: Recipe, seed: int) -> list[tuple[str, str]]:
    members = [fxfuse.capture(build(recipe, s), images()) for s in range(2)]
    found = []
    permutation = verify.permutation_of(fxfuse.analyze(members[0]), seed=seed)
    if not permutation.passed:
        found.append(("permutation", f"error {permutation.error:.1e}"))
    try:
        wide = verify.wide_equals_ensemble(members)
    except fxfuse.FxfuseError as error:
        return [*found, ("not written", str(error))]
    if not wide.passed:
        found.append(("wide", f"error {wide.error:.1e}"))
    if is_plain(recipe) and wide.tolerance == float("inf"):
        found.append(("not exact", wide.detail))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(options.seed)
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    networks = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        recipe = draw(rng, plain=networks % 2 == 0)
        for kind, text in violations(recipe, networks):
            found[kind].append({"recipe": repr(recipe), "what": text})
            print(f"{kind}: {recipe}\n    {text}")
        networks += 1
    counts = {kind: len(cases) for kind, cases in found.items()}
    print(f"{networks} networks, findings: {counts or 'none'}")
    if options.json:
        result = {
            "torch": torch.__version__,
            "seed": options.seed,
            "networks": networks,
            "findings": found,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
