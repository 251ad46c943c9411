"""What the experiments share: options, one repetition, rows, and the run over all repetitions.

An experiment is one function from a repetition to rows; every row belongs to a line and a column of
its table. The runner calls it for each network, setting, number of members and seed, and summarises
each cell over the seeds.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.datasets import Data
from benchmarks.paper.setting import OWN_SIZE, SETTINGS, Case, Size, accuracy, case
from fxfuse import Program, capture, fuse
from fxfuse.cli.data import Batches
from tests.options import flat

ACCURACY = "accuracy"


@dataclass(frozen=True)
class Options:
    """What the commands may be told about every repetition.

    Attributes:
        seeds: How many repetitions.
        steps: Steps k of fine-tuning, distillation and matching.
        rates: Learning rates among which validation data chooses.
        beyond: Factor between the rates that are tried beyond those, where the last one is best.
        calibration: Unlabelled training inputs for what needs some.
        batch: Inputs per step.
        member_steps: Steps that a member is trained for; None takes the data set's own.
    """

    seeds: int = 3
    steps: int = 160
    rates: tuple[float, ...] = (1e-3, 5e-3)
    beyond: float = 3.0
    calibration: int = 500
    batch: int = 64
    member_steps: int | None = None


@dataclass(frozen=True)
class Row:
    """What one seed says of one cell.

    Attributes:
        row: The line of the table.
        column: The column.
        values: What was measured, by name.
        x: The line's place on the plot's axis; None for a control, which has none.
    """

    row: str
    column: str
    values: Mapping[str, float]
    x: float | None = None


def along(label: str, x: float, rows: Sequence[Row]) -> list[Row]:
    """One line of a table at `x`, with a column for every cell of `rows`."""
    return [Row(label, f"{row.row}, {row.column}", row.values, x) for row in rows]


@dataclass(frozen=True)
class Job:
    """One repetition of one experiment."""

    network: str
    data: Data
    setting: str
    n: int
    seed: int
    options: Options = field(default_factory=Options)
    size: Size = OWN_SIZE

    @functools.cached_property
    def case(self) -> Case:
        """The members, trained or from the cache."""
        steps = self.options.member_steps
        return case(self.network, self.data, self.setting, self.n, self.seed, steps, self.size)

    @functools.cached_property
    def calibration(self) -> Tensor:
        """Unlabelled training inputs `[c, ...]`, drawn at random."""
        generator = torch.Generator().manual_seed(self.seed)
        inputs = self.case.calibration
        return inputs[torch.randperm(len(inputs), generator=generator)[: self.options.calibration]]

    @functools.cached_property
    def program(self) -> list[Program]:
        """The members' graphs, for experiments that fuse them often."""
        return [capture(member, self.calibration[:2]) for member in self.case.members]

    def fused(
        self, members: Sequence[nn.Module | Program] | None = None, **options: Any
    ) -> nn.Module:
        """A network of the members' class with fused weights; of all members if none are given."""
        result = fuse(
            self.program if members is None else members, self.calibration[:2], **flat(**options)
        )
        return result.load_into(self.case.fresh(self.seed)).eval()

    def batches(self, seed: int | None = None) -> Batches:
        """The training part, in an order that the seed decides."""
        order = self.seed if seed is None else seed
        return Batches(*self.case.train, self.options.batch, seed=order)

    def values(self, module: nn.Module, **others: float) -> dict[str, float]:
        """Test accuracy, which is reported, and validation accuracy, which may choose."""
        test = accuracy(module, *self.case.test)
        return {ACCURACY: test, "validation": accuracy(module, *self.case.val), **others}


@dataclass(frozen=True)
class Experiment:
    """One command.

    Attributes:
        name: Of the module, the JSON and the plot.
        title: Heading on the page.
        about: What is compared, one paragraph.
        measure: Rows of one repetition.
        line: What a line of the table is.
        measures: What the tables show → its heading.
        networks: Default of --network.
        settings: Default of --setting.
        ns: Default of -n.
        steps: Default of --steps.
        along_n: Whether the number of members is the table's lines; every row of `measure` then
            becomes a column.
        logarithmic: The axes of the plot that are, of x and y.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Job], list[Row]]
    line: str
    measures: Mapping[str, str] = field(default_factory=lambda: {ACCURACY: "test accuracy, %"})
    networks: tuple[str, ...] = ("mlp", "vgg")
    settings: tuple[str, ...] = SETTINGS
    ns: tuple[int, ...] = (2,)
    steps: int = Options.steps
    along_n: bool = False
    logarithmic: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """One table: a network on its data."""

    network: str
    data: Data
    setting: str


def run(
    experiment: Experiment,
    places: Sequence[Place],
    ns: Sequence[int],
    options: Options,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Blocks, ready for JSON: one for each place, and each number of members if it is no line.

    Args:
        experiment: What to run.
        places: Networks on their data.
        ns: Numbers of members.
        options: For every repetition.
        report: Called with what has been done.
    """
    blocks = []
    for place in places:
        found = {n: _seeds(experiment, place, n, options, report) for n in ns}
        about = {"network": place.network, "data": place.data.name, "setting": place.setting}
        if experiment.along_n:
            rows = [_along(n, row) for n, rows in found.items() for row in rows]
            blocks.append({**about, "n": None, "rows": rows})
        else:
            blocks += [{**about, "n": n, "rows": rows} for n, rows in found.items()]
    return blocks


def _seeds(
    experiment: Experiment,
    place: Place,
    n: int,
    options: Options,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    runs = []
    for seed in range(options.seeds):
        job = Job(place.network, place.data, place.setting, n, seed, options)
        runs.append(experiment.measure(job))
        report(
            f"{experiment.name}: {place.network} on {place.data.name}, {place.setting}, "
            f"N = {n}, seed {seed}"
        )
    return summary(runs)


def summary(runs: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Mean, least and greatest value of each cell, and that of every seed.

    Raises:
        ValueError: The seeds have other rows, or one cell is there twice.
    """
    keys = [[(row.row, row.column, row.x) for row in rows] for rows in runs]
    if any(other != keys[0] for other in keys) or len(set(keys[0])) != len(keys[0]):
        raise ValueError(f"the seeds do not measure the same cells, each once: {keys}")
    cells = []
    for rows in zip(*runs, strict=True):
        first = rows[0]
        values = {name: _spread([row.values[name] for row in rows]) for name in first.values}
        cells.append({"row": first.row, "column": first.column, "x": first.x, "values": values})
    return cells


def _spread(values: Sequence[float]) -> dict[str, Any]:
    rounded = [round(value, 5) for value in values]
    mean = round(statistics.mean(values), 5)
    return {"mean": mean, "min": min(rounded), "max": max(rounded), "seeds": rounded}


def _along(n: int, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "row": str(n), "column": f"{row['row']}, {row['column']}", "x": float(n)}


def told(options: Options) -> dict[str, Any]:
    """The options as JSON has them."""
    return {**asdict(options), "rates": list(options.rates)}


def places(
    experiment: Experiment,
    networks: Sequence[str] | None,
    settings: Sequence[str] | None,
    data_of: Callable[[str], Data],
) -> list[Place]:
    """The tables of an experiment, the default ones where nothing is asked for."""
    pairs = itertools.product(networks or experiment.networks, settings or experiment.settings)
    return [Place(network, data_of(network), setting) for network, setting in pairs]
