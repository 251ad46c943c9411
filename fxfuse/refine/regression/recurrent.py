"""Recurrent layers: every gate regressed on the input and on the state that the fused network has.

What a gate gets before its activation is linear in the input of a step and in the hidden state
before it, so all steps of all sequences are rows of one regression, as a layer's positions are. The
targets are what the gates of the kept units get in the members. The state before a step depends on
the weights that are looked for: it is the members' at first, and then what the fused network
computes with the weights found last.

Notation of shapes: n rows (steps of sequences), t steps, b batch, i input channels, r hidden units
that are handed on, g gates and units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.recurrence import (
    Direction,
    Recurrent,
    Steps,
    equations_of,
    run_direction,
    side_by_side,
)
from fxfuse.activations.spill_store import Stored
from fxfuse.analysis.rules.recurrent import gates_of
from fxfuse.refine.regression.error import Error
from fxfuse.refine.regression.rows import rows_for
from fxfuse.refine.regression.solve import Ridge
from fxfuse.refine.regression.work import NO_CLOSER, NO_TARGET, LayerFit, read_in_members
from fxfuse.refine.targets import Targets

State = dict[str, torch.Tensor]

#: Regressions on the states of the fused network, after the one on the members' states.
_TURNS = 3


@dataclass(frozen=True)
class _Aims:
    """What the kept units do in the members, at the chosen rows.

    Attributes:
        chosen: For each batch the rows of [t b], int64.
        x: What the fused network reads, [n, i].
        inner: What the gates should get from the input, [n, g].
        again: What they should get from the state before, [n, g].
        before: The state before the step, [n, r].
        hidden: The state behind the step, [n, r].
    """

    chosen: Sequence[torch.Tensor]
    x: torch.Tensor
    inner: torch.Tensor
    again: torch.Tensor
    before: torch.Tensor
    hidden: torch.Tensor


class RecurrentFit:
    """The fit of the recurrent layers of one node, from the first to the last.

    Args:
        work: The layers.
        student: The fused network, which has run up to and with the node.
        members: The members, which have run as far.
        targets: Merges the members' values.
        state: The fused tensors by name, changed.
        alpha: α of the regressions.
        generator: Chooses rows.
    """

    def __init__(
        self,
        work: Recurrent,
        student: NodeRunner,
        members: Sequence[NodeRunner],
        targets: Targets,
        state: State,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        self.work = work
        self.student = student
        self.members = [member for member in members if member.has(work.node)]
        self.targets = targets
        self.state = state
        self.alpha = alpha
        self.generator = generator
        self.batches = range(len(student.calibration.batches))
        #: What a layer reads in the fused network, and in each member: one [t, b, i] per batch.
        self.read: Stored
        self.theirs: list[Stored]
        self.changed: set[str] = set()

    def run(self) -> list[LayerFit]:
        """Fits one direction after the other; `changed` names the tensors that are new then."""
        fits = []
        self.read, *self.theirs = (
            runner.store.put(self._given(runner)) for runner in (self.student, *self.members)
        )
        for place, layer in enumerate(self.work.layers):
            fits += [self._fit(direction) for direction in layer]
            if place + 1 < len(self.work.layers):
                self._next(layer)
        for _, values in self._lanes():
            values.free_all()
        return fits

    def _lanes(self) -> list[tuple[NodeRunner, Stored]]:
        return [(self.student, self.read), *zip(self.members, self.theirs, strict=True)]

    def _given(self, runner: NodeRunner) -> Iterator[torch.Tensor]:
        return (self.work.by_time(x) for x in runner.value(self._reads(runner)[0]))

    def _reads(self, runner: NodeRunner) -> tuple[fx.Node, ...]:
        return self.work.reads if runner is self.student else read_in_members(self.work)

    def _next(self, layer: Sequence[Direction]) -> None:
        """Goes on to what the layer hands on."""
        following = []
        for runner, values in self._lanes():
            steps = ([self._steps(runner, d, values[b], b) for d in layer] for b in self.batches)
            following.append(runner.store.put(side_by_side(layer, each) for each in steps))
            values.free_all()
        self.read, *self.theirs = following

    def _steps(
        self, runner: NodeRunner, direction: Direction, x: torch.Tensor, batch: int
    ) -> Steps:
        return run_direction(self.work, direction, runner.state, x, self._initial(runner, batch))

    def _initial(self, runner: NodeRunner, batch: int) -> list[torch.Tensor]:
        return [runner.value(state)[batch] for state in self._reads(runner)[1:]]

    # --- one direction --------------------------------------------------------------------------

    def _fit(self, direction: Direction) -> LayerFit:
        name, aim = direction.inner, self.work.node.name
        aims = self._aims(direction)
        if aims is None:
            return LayerFit(name, aim, inf, inf, False, NO_TARGET)
        error_of = Error((-inf, inf), aims.hidden)
        held = {n: self.state[n] for n in direction.tensors}
        seen, hidden = self._look(direction, aims.chosen)
        before = best = error_of(hidden)
        chosen: State | None = None
        for turn in range(1 + _TURNS):
            self._solve(direction, aims, seen if turn else aims.before)
            for projected in (False, True) if direction.projection else (False,):
                if projected:
                    self._project(direction, aims)
                seen, hidden = self._look(direction, aims.chosen)
                error = error_of(hidden)
                if error < best:
                    best, chosen = error, {n: self.state[n] for n in direction.tensors}
        self.state.update(held if chosen is None else chosen)
        if chosen is None:
            return LayerFit(name, aim, before, before, False, NO_CLOSER)
        self.changed |= set(direction.tensors)
        return LayerFit(name, aim, before, best, True)

    def _aims(self, direction: Direction) -> _Aims | None:
        features = sum(self.state[n].shape[1] for n in (direction.inner, direction.recurrent))
        sizes = [x.shape[0] * x.shape[1] for x in self.read]
        share = min(rows_for(features) / sum(sizes), 1.0)
        chosen, columns = [], []
        for batch, (x, size) in enumerate(zip(self.read, sizes, strict=True)):
            order = torch.randperm(size, generator=self.generator)
            rows = order[: max(round(share * size), 1)].sort().values.to(x.device)
            chosen.append(rows)
            merged = self._merged(direction, batch, rows)
            if merged is None:
                return None
            own = x.flip(0) if direction.backwards else x
            columns.append([own.flatten(0, 1)[rows].float(), *merged])
        return _Aims(chosen, *(torch.cat(column) for column in zip(*columns, strict=True)))

    def _merged(
        self, direction: Direction, batch: int, rows: torch.Tensor
    ) -> list[torch.Tensor] | None:
        """What the gates get, and the states before and behind, of the kept units."""
        each = []
        for runner, values in zip(self.members, self.theirs, strict=True):
            steps = self._steps(runner, direction, values[batch], batch)
            found = (*steps.sides(direction, runner.state), steps.before, steps.hidden)
            each.append([value.flatten(0, 1)[rows].float() for value in found])
        places = [(direction.inner, 0)] * 2 + [(direction.recurrent, 1)] * 2
        merged = [
            self.targets.merge_rows(place, column)
            for place, column in zip(places, zip(*each, strict=True), strict=True)
        ]
        known = [value for value in merged if value is not None]
        return known if len(known) == len(merged) else None

    def _look(
        self, direction: Direction, chosen: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The fused network's states before and behind the chosen steps, with its weights now."""
        before, behind = [], []
        for batch, (x, rows) in enumerate(zip(self.read, chosen, strict=True)):
            steps = self._steps(self.student, direction, x, batch)
            before.append(steps.before.flatten(0, 1)[rows].float())
            behind.append(steps.hidden.flatten(0, 1)[rows].float())
        return torch.cat(before), torch.cat(behind)

    def _solve(self, direction: Direction, aims: _Aims, before: torch.Tensor) -> None:
        """Writes the regressions of all gates on the input and these states."""
        state, names = self.state, direction.tensors
        new = {name: state[name].clone() for name in names}
        units = aims.inner.shape[1] // gates_of(self.work.node)
        for equation in equations_of(self.work.node):
            gates = slice(equation.gates[0] * units, equation.gates[1] * units)
            read, wanted, written = [], torch.zeros_like(aims.inner[:, gates]), []
            if equation.inner:
                read.append(aims.x)
                wanted = wanted + aims.inner[:, gates]
                written.append(direction.inner)
            if equation.recurrent:
                read.append(before)
                wanted = wanted + aims.again[:, gates]
                written.append(direction.recurrent)
            rows = torch.cat(read, 1).unsqueeze(1)
            fit = Ridge(rows, centred=bool(direction.biases)).fit(wanted, self.alpha)
            sizes = [x.shape[1] for x in read]
            for name, part in zip(written, fit.matrix[0].split(sizes), strict=True):
                new[name][gates] = part.T.to(new[name].dtype)
            # Both biases are added wherever both products are: the first one takes the shift.
            shifts = [fit.shift[0], torch.zeros_like(fit.shift[0])]
            if not equation.inner:
                shifts.reverse()
            for place, (name, shift) in enumerate(zip(direction.biases, shifts, strict=False)):
                if (equation.inner, equation.recurrent)[place]:
                    new[name][gates] = shift.to(new[name].dtype)
        state.update(new)

    def _project(self, direction: Direction, aims: _Aims) -> None:
        """Writes the regression of the projection on the units that there are now."""
        found = []
        for batch, (x, rows) in enumerate(zip(self.read, aims.chosen, strict=True)):
            steps = self._steps(self.student, direction, x, batch)
            cells = self._initial(self.student, batch)[1][direction.part]
            units = steps.unprojected(direction, self.state, cells)
            found.append(units.flatten(0, 1)[rows].float())
        fit = Ridge(torch.cat(found).unsqueeze(1), centred=False).fit(aims.hidden, self.alpha)
        like = self.state[direction.projection]
        self.state[direction.projection] = fit.matrix[0].T.to(like.dtype).contiguous()
