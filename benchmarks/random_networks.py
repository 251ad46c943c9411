"""Oracles 1 and 2 on many random networks; prints counts and every violation.

    python benchmarks/random_networks.py [--networks 10000] [--jobs 2] [--seed 0] [--json FILE]
    python benchmarks/random_networks.py --seed 0 --only 4711

The networks are those of `tests/strategies.py`, drawn by a plain generator: nothing is shrunk. A
seed and an index name a network, however many are drawn and by however many processes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from fxfuse import verify
from tests.strategies import (
    IMAGE,
    OUTPUTS,
    TOKENS,
    VECTOR,
    Block,
    Recipe,
    Space,
    is_plain,
    kinds,
    members_of,
)

#: A process takes so many networks at a time, and is replaced after so many portions, because
#: torch.export keeps memory.
_CHUNK, _FRESH = 10, 50
#: After so many networks a line tells how far it is.
_PROGRESS = 50
#: Below this the outputs hardly depend on the inputs, and an oracle would learn nothing.
_BLIND = 1e-6


@dataclass
class Outcome:
    """What the oracles said about one network.

    Attributes:
        index: Number of the network in its seed.
        recipe: The network, as Python.
        kinds: Its kinds of block.
        exact: Whether wide has to equal the ensemble exactly; else an operator mixes.
        findings: Pairs of what is wrong and how.
        seconds: Wall-clock time.
    """

    index: int
    recipe: str
    kinds: list[str]
    exact: bool = False
    findings: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def draw(seed: int, index: int) -> Recipe:
    """Network `index` of a seed; every second one has no operator that mixes members."""
    rng = random.Random(f"{seed}/{index}")
    plain = index % 2 == 0

    def blocks(space: Space, most: int) -> tuple[Block, ...]:
        names = kinds(space, plain=plain)
        return tuple(
            Block(rng.choice(names), rng.randint(2, 4), rng.randint(2, 3), rng.random() < 0.5)
            for _ in range(rng.randint(0, most))
        )

    stem, output = rng.randint(2, 6), rng.choice(OUTPUTS)
    if rng.random() < 0.5:
        bridge = rng.choice(["mean", "flatten"])
        return Recipe(stem, blocks(IMAGE, 4), bridge, vectors=blocks(VECTOR, 2), output=output)
    end = rng.choice(["mean", "flatten", "last"])
    tokens = blocks(TOKENS, 3)
    return Recipe(stem, blocks(IMAGE, 2), "tokens", tokens, end, blocks(VECTOR, 1), output)


def judge(recipe: Recipe, seed: int) -> tuple[bool, list[tuple[str, str]]]:
    """Whether the wide oracle had to be exact, and what was found."""
    members = members_of(recipe, 2)
    found = []
    graph = fxfuse.analyze(members[0])
    if (seen := verify.sensitivity(members[0])) <= _BLIND:
        found.append(("blind", f"two inputs differ by {seen:.1e} in the outputs"))
    permutation = verify.permutation_of(graph, seed=seed)
    if not permutation.passed:
        found.append(("permutation", f"error {permutation.error:.1e}"))
    try:
        wide = verify.concatenation_equals_ensemble(members)
    except fxfuse.FxfuseError as error:
        return False, [*found, ("not written", str(error))]
    exact = wide.tolerance < float("inf")
    if not wide.passed:
        found.append(("wide", f"error {wide.error:.1e}"))
    if is_plain(recipe) and not exact:
        found.append(("not exact", wide.detail))
    return exact, found


def examine(seed: int, index: int) -> Outcome:
    """Draws one network and asks the oracles."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    recipe = draw(seed, index)
    names = {b.kind for b in (*recipe.images, *recipe.tokens, *recipe.vectors)}
    outcome = Outcome(index, repr(recipe), sorted(names))
    start = time.perf_counter()
    try:
        outcome.exact, outcome.findings = judge(recipe, index)
    except Exception:
        # One broken network must not end a run of thousands: it is a finding like others.
        outcome.findings.append(("error", traceback.format_exc(limit=-3)))
    outcome.seconds = time.perf_counter() - start
    return outcome


def examine_all(seed: int, indices: range, jobs: int) -> Iterator[Outcome]:
    """All outcomes, in the order of their indices."""
    run = partial(examine, seed)
    if jobs == 1:
        yield from map(run, indices)
        return
    with get_context("spawn").Pool(jobs, maxtasksperchild=_FRESH) as pool:
        yield from pool.imap(run, indices, chunksize=_CHUNK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this network alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    indices = range(options.networks)
    if options.only is not None:
        indices = range(options.only, options.only + 1)
        print(draw(options.seed, options.only))
    start = time.monotonic()
    outcomes = []
    for outcome in examine_all(options.seed, indices, options.jobs):
        outcomes.append(outcome)
        for what, text in outcome.findings:
            print(f"{outcome.index}: {what}: {outcome.recipe}\n    {text}", flush=True)
        if len(outcomes) % _PROGRESS == 0:
            found = sum(bool(o.findings) for o in outcomes)
            print(f"{len(outcomes)} networks, {found} with findings", file=sys.stderr)
    report(outcomes, options, time.monotonic() - start)


def report(outcomes: list[Outcome], options: argparse.Namespace, seconds: float) -> None:
    """Prints the counts; writes them as JSON when asked to."""
    per_kind = Counter(kind for outcome in outcomes for kind in outcome.kinds)
    found = Counter(what for outcome in outcomes for what, _ in outcome.findings)
    exact = sum(outcome.exact for outcome in outcomes)
    counts = {
        "networks": len(outcomes),
        "without a mixing operator: wide has to equal the ensemble": exact,
        "with a mixing operator: infinite tolerance": len(outcomes) - exact,
        "seconds": round(seconds, 1),
        "seconds per network": round(sum(o.seconds for o in outcomes) / len(outcomes), 3),
    }
    for kind, number in sorted(per_kind.items(), key=lambda pair: -pair[1]):
        print(f"{kind:24}{number:>7}")
    for what, number in counts.items():
        print(f"{what}: {number}")
    print(f"findings: {dict(found) or 'none'}")
    if options.json:
        result = {
            "torch": torch.__version__,
            "seed": options.seed,
            "counts": counts,
            "networks per kind": dict(sorted(per_kind.items())),
            "findings": [asdict(outcome) for outcome in outcomes if outcome.findings],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
