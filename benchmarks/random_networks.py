"""Oracles 1 and 2 on many random networks; prints counts and every violation.

    python benchmarks/random_networks.py [--networks 10000] [--jobs 2] [--seed 22] [--keep]
    python benchmarks/random_networks.py --seed 22 --only 4711

The networks are those of `tests/strategies.py`, drawn by a plain generator: nothing is shrunk. A
seed and an index name a network, however many are drawn and by however many processes. With
`--keep`, a run goes on where the JSON file ends: it asks about the networks with findings again,
and then draws further ones.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from benchmarks.records import write
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

RESULTS = Path(__file__).parent / "results" / "random_networks.json"
#: A process takes so many networks at a time, and is replaced after so many portions, because
#: torch.export keeps memory.
_CHUNK, _FRESH = 10, 50
#: After so many networks the file is written, and a line tells how far it is.
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


def examine_all(seed: int, indices: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """All outcomes, in the order of their indices."""
    run = partial(examine, seed)
    with get_context("spawn").Pool(jobs, maxtasksperchild=_FRESH) as pool:
        yield from pool.imap(run, indices, chunksize=_CHUNK)


@dataclass
class Tally:
    """Counts over the networks of one seed, from its first one on.

    Attributes:
        networks: How many there were.
        exact: In how many of them wide has to equal the ensemble.
        seconds: Spent on all of them.
        kinds: Networks per kind of block.
        found: Outcomes with findings, by index.
    """

    networks: int = 0
    exact: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    found: dict[int, Outcome] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome; one with findings before is replaced."""
        if (before := self.found.pop(outcome.index, None)) is None:
            self.networks += 1
            self.seconds += outcome.seconds
            self.kinds.update(outcome.kinds)
        self.exact += outcome.exact - (before.exact if before else False)
        if outcome.findings:
            self.found[outcome.index] = outcome

    @classmethod
    def read(cls, path: Path, seed: int) -> Tally:
        """What an earlier run with this seed wrote; nothing where there is no such run."""
        if not path.exists():
            return cls()
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["seed"] != seed:
            raise SystemExit(f"{path} holds networks of seed {result['seed']}, not {seed}")
        networks, exact = result["networks"], result["exact"]
        found = {old["index"]: Outcome(**old) for old in result["findings"]}
        kinds = Counter(result["networks per kind"])
        return cls(networks, exact, networks * result["seconds per network"], kinds, found)

    def result(self, seed: int) -> dict[str, Any]:
        """The JSON file."""
        return {
            "torch": torch.__version__,
            "seed": seed,
            "networks": self.networks,
            "exact": self.exact,
            "seconds per network": round(self.seconds / max(self.networks, 1), 3),
            "networks per kind": dict(sorted(self.kinds.items())),
            "findings": [asdict(self.found[index]) for index in sorted(self.found)],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=22)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this network alone")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if options.only is not None:
        print(draw(options.seed, options.only))
        print(examine(options.seed, options.only))
        return
    tally = Tally.read(options.json, options.seed) if options.keep else Tally()
    indices = [*sorted(tally.found), *range(tally.networks, options.networks)]
    for number, outcome in enumerate(examine_all(options.seed, indices, options.jobs), 1):
        tally.add(outcome)
        for what, text in outcome.findings:
            print(f"{outcome.index}: {what}: {outcome.recipe}\n    {text}", flush=True)
        if number % _PROGRESS == 0 or number == len(indices):
            write(options.json, tally.result(options.seed))
            print(f"{tally.networks} networks, {len(tally.found)} with findings", flush=True)


if __name__ == "__main__":
    main()
