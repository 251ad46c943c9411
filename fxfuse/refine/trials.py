"""Short trials that find the learning rate of a matching run, and whether statistics are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxfuse.refine.judge import Judge, Measured
from fxfuse.refine.modes import copies, restore
from fxfuse.refine.schedule import Budget
from fxfuse.refine.trainer import Trainer

if TYPE_CHECKING:
    from fxfuse.refine.match import Match

#: The rates that are tried, from the highest down.
_RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
#: The rate where there is no time for trials: low enough for a trained network.
_CAREFUL = 1e-4
#: Steps of a trial, as a share of the run's, and how many there are at least: the first ones of
#: every rate lead away from a good start.
_SHARE, _LEAST = 0.1, 25
#: Of a budget in seconds, what all trials may take, and steps below which a trial says nothing.
_OF_SECONDS, _TOO_FEW = 0.25, 4
#: Rates in a row that may be worse than the best one before the search ends.
_PATIENCE = 2
#: Inputs that judge, from which on a standard error says something.
_ENOUGH = 30


@dataclass(frozen=True)
class Settings:
    """What the trials found.

    Attributes:
        rate: Highest learning rate.
        frozen: Whether normalisation and dropout stay in eval mode.
        tried: Rates, each with the distance that it led to.
    """

    rate: float
    frozen: bool
    tried: tuple[tuple[float, float], ...] = ()


def find_settings(
    trainer: Trainer, judge: Judge, options: Match, budget: Budget, look: float
) -> Settings:
    """Find the learning rate, and whether to freeze statistics, by short runs from the start.

    Args:
        trainer: The network at its start, which it has again afterwards.
        judge: Says how good a rate is.
        options: What is decided already.
        budget: Of the run.
        look: CPU seconds of asking the judge once.
    """
    rates = _RATES if options.learning_rate is None else (options.learning_rate,)
    careful = Settings(options.learning_rate or _CAREFUL, options.freeze is not False)
    steps = _steps(trainer, budget, look)
    if steps is None or (len(rates) == 1 and options.freeze is not None):
        return careful
    start, tried = copies(trainer.module), dict[tuple[float, bool], Measured]()

    def trial(rate: float, *, frozen: bool) -> None:
        trainer.run(lambda step: step / steps, rate, frozen=frozen, checked=False)
        tried[rate, frozen] = judge.measure(trainer.module)
        restore(trainer.module, start)

    def best() -> tuple[float, bool]:
        return min(tried, key=lambda each: tried[each].cost)

    frozen = options.freeze is not False
    worse = 0
    for rate in rates:
        trial(rate, frozen=frozen)
        worse = worse + 1 if best() != (rate, frozen) else 0
        if worse == _PATIENCE:
            break
    rate, _ = best()
    if options.freeze is None and _depends_on_mode(trainer):
        for other in _around(rate, rates):
            trial(other, frozen=False)
    rate, frozen = _lowest_as_good(tried, best())
    return Settings(rate, frozen, tuple((each, far.cost) for (each, _), far in tried.items()))


def _lowest_as_good(
    tried: Mapping[tuple[float, bool], Measured], best: tuple[float, bool]
) -> tuple[float, bool]:
    """Return the lowest rate that is as good as the best one, as far as the judge can tell.

    A high rate leads further away from a trained network, and few inputs judge. As good is what
    lies within one standard error of the paired differences (the one-standard-error rule of
    Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3).
    """
    rate, frozen = best
    if tried[best].metric is not None or len(tried[best].each) < _ENOUGH:
        return best
    for other in sorted(each for each, state in tried if state == frozen and each < rate):
        further = tried[other, frozen].each - tried[best].each
        if further.mean() <= further.std() / len(further) ** 0.5:
            return other, frozen
    return best


def _around(rate: float, rates: tuple[float, ...]) -> Iterator[float]:
    """A rate, and the next higher one."""
    place = rates.index(rate)
    yield rate
    if place:
        yield rates[place - 1]


def _steps(trainer: Trainer, budget: Budget, look: float) -> int | None:
    """Steps of a trial; None where there is no time for trials."""
    if budget.steps is not None:
        # No trial is longer than the run itself.
        return min(budget.steps, max(_LEAST, round(_SHARE * budget.steps)))
    each = _OF_SECONDS * budget.left() / (len(_RATES) + 2) - look
    steps = int(each / max(trainer.batch * trainer.seconds_per_input, 1e-9))
    return None if steps < _TOO_FEW else steps


def _depends_on_mode(trainer: Trainer) -> bool:
    """Whether a network may compute something else in train mode."""
    module = trainer.module
    graphs = (getattr(part, "graph", None) for part in module.modules())
    nodes = [node for graph in graphs if graph is not None for node in graph.nodes]
    if nodes:
        return any(node.op == "get_attr" and node.target == "training" for node in nodes)
    kinds = [type(part).__name__ for part in module.modules()]
    return any("Norm" in kind or "Drop" in kind or "Attention" in kind for kind in kinds)
