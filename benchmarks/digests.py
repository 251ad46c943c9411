"""Digests that show whether a change of the code changed any coupling group or any fused weight.

    python benchmarks/digests.py --output OLD.json     # before the change
    python benchmarks/digests.py --output NEW.json     # after it
    python benchmarks/digests.py --compare OLD.json NEW.json

The networks are 500 random ones (`tests/strategies.py`) and the 60 smallest of the coverage sweep.
`benchmarks/results/digest_recipes.json` says which, so that they stay the same when the code that
draws them changes (`--draw` draws them again). Each gets the SHA-256 of

- `members`: the weights of its two members, which are random with fixed seeds;
- `groups`: the coupling groups, and which indices of every tensor are free and which frozen;
- `weights`: the tensors that `fuse` makes of the two members, bit for bit; of random networks also
  at half and at one and a half times a member's size, or "error" where fxfuse raises one.

Names of files, classes and attributes do not enter into them, nor does the order of groups or of
tensors. Bits depend on the machine and on the version of torch: compare what one machine computed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from benchmarks.coverage_models import build
from tests.models import excite
from tests.strategies import Block, Recipe, members_of, recipes

Digests = dict[str, str]
Place = tuple[str, int]

RECIPES = Path(__file__).parent / "results" / "digest_recipes.json"
COVERAGE = Path(__file__).parent / "results" / "coverage.json"
RANDOM, SWEEP, SEED = 500, 60, 18
#: Sizes of the fused network, in units of a member, beside 1.
SIZES = (0.5, 1.5)


# --- names of fxfuse: all that has to follow when they change ------------------------------------


def captured(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A member; `members_of` gives such ones, too."""
    return fxfuse.capture(model, fxfuse.Example(args, kwargs))


def tensors_of(member: Any) -> Mapping[str, torch.Tensor]:
    """A member's tensors by `state_dict()` name."""
    return member.state()


def coupling(member: Any) -> tuple[list[Mapping[Place, np.ndarray]], Mapping[Place, np.ndarray]]:
    """For each group the indices of each unit in each place, int64 [n_units, slots_per_unit].

    And the frozen indices of each place, int64 [n].
    """
    graph = fxfuse.analyze(member)
    frozen = {place: reason.indices for place, reason in graph.frozen.items()}
    return [group.index for group in graph.groups], frozen


def fused(members: list[Any], size: float | None = None) -> Mapping[str, torch.Tensor] | None:
    """The tensors of the fused network; None: fxfuse refuses."""
    options = {} if size is None else {"size": size}
    try:
        return fxfuse.fuse(members, **options).state_dict()
    except fxfuse.FxfuseError:
        return None


# --- digests -------------------------------------------------------------------------------------


def digest(parts: Iterable[tuple[Any, bytes]]) -> str:
    """SHA-256 of headers, which are written as JSON, and bytes."""
    found = hashlib.sha256()
    for header, content in parts:
        found.update(json.dumps([header, len(content)]).encode() + content)
    return found.hexdigest()


def of_tensors(tensors: Mapping[str, torch.Tensor] | None) -> str:
    """The digest of named tensors: names, dtypes, shapes and bits."""
    return digest([("error", b"")] if tensors is None else map(_part, sorted(tensors.items())))


def _part(named: tuple[str, torch.Tensor]) -> tuple[Any, bytes]:
    name, tensor = named
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return [name, str(tensor.dtype), *tensor.shape], flat.view(torch.uint8).numpy().tobytes()


def of_groups(member: Any) -> str:
    """The digest of the analysis: each group's units, then what is free and frozen."""
    groups, frozen = coupling(member)
    # Units and slots have an order, which the maps of a plan follow; groups and places have none.
    lines = [
        [(*place, rows.astype("<i8").tolist()) for place, rows in sorted(group.items())]
        for group in groups
    ]
    masks = []
    for name, tensor in sorted(tensors_of(member).items()):
        for dim, size in enumerate(tensor.shape):
            mask = np.zeros((2, size), bool)
            for group in groups:
                mask[0, group.get((name, dim), np.empty(0, np.int64)).reshape(-1)] = True
            mask[1, frozen.get((name, dim), np.empty(0, np.int64))] = True
            masks.append(([name, dim, size], mask.tobytes()))
    return digest([*((line, b"") for line in sorted(lines)), *masks])


def digests_of(members: list[Any], sizes: Iterable[float] = ()) -> Digests:
    """All digests of one network, of which there are two members."""
    return {
        "members": digest((of_tensors(tensors_of(member)), b"") for member in members),
        "groups": of_groups(members[0]),
        "weights": of_tensors(fused(members)),
        **{f"weights {size}": of_tensors(fused(members, size)) for size in sizes},
    }


# --- networks ------------------------------------------------------------------------------------


def random_network(fields: Mapping[str, Any]) -> Digests:
    """The digests of a network of `tests/strategies.py`, given the fields of its recipe."""
    blocks = ("images", "tokens", "vectors")
    own = {space: tuple(Block(**block) for block in fields[space]) for space in blocks}
    return digests_of(members_of(Recipe(**{**fields, **own}), 2), SIZES)


def swept_network(name: str) -> Digests:
    """The digests of a model of the coverage sweep."""
    members = []
    for seed in range(2):
        model, args, kwargs = build(name, seed)
        # Norms with other weights than 1 and 0, so that it shows when they change places.
        torch.manual_seed(seed)
        members.append(captured(excite(model, args, kwargs), args, kwargs))
    return digests_of(members)


def draw(path: Path) -> None:
    """Draws the random networks, looks up the smallest of the sweep, and writes down both."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: dict[Recipe, None] = {}

    @seed(SEED)
    @settings(
        max_examples=10 * RANDOM,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes())
    def collect(recipe: Recipe) -> None:
        found.setdefault(recipe)

    collect()
    # Neighbours resemble each other, since hypothesis varies what it has drawn.
    chosen = list(found)[:: len(found) // RANDOM][:RANDOM]
    rows = json.loads(COVERAGE.read_text(encoding="utf-8"))["rows"]
    sizes = sorted((row["parameters"], row["model"]) for row in rows if "failure" not in row)
    lines = {
        "random": [asdict(recipe) for recipe in chosen],
        "sweep": [name for _, name in sizes[:SWEEP]],
    }
    texts = (
        f'"{key}": [\n' + ",\n".join(json.dumps(x, separators=(",", ":")) for x in entries) + "\n]"
        for key, entries in lines.items()
    )
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


def cases(random: int, sweep: int) -> Iterator[tuple[str, Callable[[], Digests]]]:
    """Names of networks, and what computes their digests."""
    listed = json.loads(RECIPES.read_text(encoding="utf-8"))
    for number, fields in enumerate(listed["random"][:random]):
        yield f"random:{number}", lambda fields=fields: random_network(fields)
    for name in listed["sweep"][:sweep]:
        yield name, lambda name=name: swept_network(name)


def compute(random: int, sweep: int) -> dict[str, Digests]:
    """The digests of the first networks of both kinds; of one that crashes, how."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, Digests] = {}
    for name, run in cases(random, sweep):
        try:
            rows[name] = run()
        except Exception as error:
            # What fxfuse does not raise on purpose is shown, and differs from everything.
            traceback.print_exc()
            rows[name] = {"crash": type(error).__name__}
        if len(rows) % 20 == 0 or len(rows) == random + sweep:
            print(f"{len(rows)} networks, {time.process_time():.0f} CPU seconds", flush=True)
    return rows


def compare(old: Mapping[str, Digests], new: Mapping[str, Digests]) -> bool:
    """Prints what is equal and what differs; returns whether all is equal."""
    counts: Counter[str] = Counter()
    for name in {**old, **new}:
        before, after = old.get(name, {}), new.get(name, {})
        keys = {**before, **after}
        differ = [k for k in keys if k == "crash" or before.get(k) != after.get(k)]
        counts["differ" if differ else "equal"] += 1
        for key in keys:
            counts[f"{key}: {'differ' if key in differ else 'equal'}"] += 1
        if not (before and after):
            print(f"{name}: only in {'OLD' if before else 'NEW'}")
        elif differ:
            print(f"{name}: {', '.join(differ)}")
    for what, count in sorted(counts.items()):
        if ":" in what:
            print(f"{what} {count}")
    print(f"{counts['equal']} networks equal, {counts['differ']} differ")
    return bool(counts["equal"]) and not counts["differ"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", type=int, default=RANDOM, help="the first so many")
    parser.add_argument("--sweep", type=int, default=SWEEP, help="the smallest so many")
    parser.add_argument("--output", type=Path, help="where the digests go, as JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--draw", action="store_true", help="draws the networks anew")
    options = parser.parse_args()
    if options.draw:
        draw(RECIPES)
        return
    if options.compare:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in options.compare)
        raise SystemExit(not compare(old, new))
    rows = compute(options.random, options.sweep)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    refused = Counter(k for r in rows.values() for k, d in r.items() if d == of_tensors(None))
    crashed = [name for name, row in rows.items() if "crash" in row]
    print(f"{len(rows)} networks, refused: {dict(refused)}, crashed: {crashed or 'none'}")
    raise SystemExit(bool(crashed))


if __name__ == "__main__":
    main()
