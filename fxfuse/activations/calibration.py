"""Calibration inputs of a network, checked and cut into batches; labels, if there are any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from fxfuse.activations.augment import Augment, default_augment
from fxfuse.common.options import Options
from fxfuse.errors import InputError, OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.run import answers
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import pytree

#: Below this many inputs regressions are noisy (issue 4 asks for 100 to 1,000).
FEW = 100

#: From so many inputs on, copies of them are worth nothing.
_MANY = 1000

#: Answers to some rows and to all of them differ by rounding: kernels depend on the batch.
_ROUNDING = 1e-3

#: Inputs of a batch that has statistics.
_LEAST = 2

#: Keys under which data loaders of keyword inputs hold labels.
_LABELS = ("labels", "label")

#: Positional and keyword inputs of one call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Calibration(Options):
    """Calibration inputs, from the members' own domain, and how they are used.

    Attributes:
        inputs: 100 to 1,000 inputs: a tensor [n, ...], a tuple of tensors (positional inputs), a
            mapping of tensors (keyword inputs), or an iterable of batches of these; with labels as
            pairs (inputs, labels).
        limit: Largest number of inputs, sampled in a fixed random order (the first ones of an
            iterable). Memory does not grow with it, apart from the inputs themselves.
        augmentations: Number of augmented copies of each input that are measured as well: images
            and signals, shifted by up to a position, and half of them mixed in pairs. None: one for
            fewer than 1,000 images or signals, otherwise none.
        held_out: Share of the inputs that no fit sees: one half of them chooses between networks,
            the other accepts what was chosen only if it is better than what there was. 0: all
            inputs are fitted to, and without `evaluate` nothing is judged.
        evaluate: Your own metric, which judges instead: a function from a network in eval mode to a
            number, higher is better. It needs separate data, which nothing else sees.
    """

    inputs: Any
    limit: int = 1000
    augmentations: int | None = None
    held_out: float = 0.3
    evaluate: Callable[[torch.nn.Module], float] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        for name, least in (("limit", 1), ("augmentations", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(
                    f"{name} must be at least {least}, got {value}",
                    how="leave it out, or pass a larger number",
                )
        if not 0 <= self.held_out < 1:
            raise OptionError(
                f"held_out must be at least 0 and below 1, got {self.held_out}",
                why="it is the share of the inputs that judge, and some have to be left to fit",
                how="leave it out, or pass a share such as 0.3",
            )

    @staticmethod
    def of(given: Any) -> Calibration:
        """Return what a caller gave as calibration: inputs, or a `Calibration`."""
        return given if isinstance(given, Calibration) else Calibration(given)


@dataclass(frozen=True)
class CalibrationBatches:
    """Inputs in batches, in the structure that the network is called with.

    Attributes:
        batches: (args, kwargs) of each call.
        size: Number of inputs in all batches.
        labels: Of each batch; empty where none were given.
        fixed: Whether all calls must have the size that they have.
        undivided: Whether calls stay as they are: nodes of a graph, say, go with its edges.
        augmentations: Number of augmented copies of each input that are measured as well.
        held_out: Share of the inputs that judge.
        evaluate: The user's own metric, if any.
    """

    batches: tuple[Call, ...]
    size: int
    labels: tuple[torch.Tensor, ...] = ()
    fixed: bool = False
    undivided: bool = False
    augmentations: int = 0
    held_out: float = 0.0
    evaluate: Callable[[torch.nn.Module], float] | None = None

    @cached_property
    def with_copies(self) -> CalibrationBatches:
        """The inputs and their augmented copies, always the same ones; without labels.

        A copy has no label of its own.
        """
        if not self.augmentations:
            return self
        augment = _augment(self.batches[0])
        generator = torch.Generator().manual_seed(0)
        batches = list(self.batches)
        for _ in range(self.augmentations):
            batches += self.copied(augment, generator)
        size = (1 + self.augmentations) * self.size
        return replace(self, batches=tuple(batches), size=size, labels=(), augmentations=0)

    def copied(self, augment: Augment, generator: torch.Generator) -> list[Call]:
        """An augmented copy of each call with one tensor."""
        return [((augment(args[0], generator),), {}) for args, _ in self.batches]

    @staticmethod
    def plain(inputs: Any, batch: int) -> CalibrationBatches:
        """Inputs for networks that were not captured, in batches, in the order that they have.

        Raises:
            InputError: They are not tensors of one length.
        """
        call = _call(tuple(inputs) if isinstance(inputs, list) else inputs)
        tensors = pytree.tree_leaves(call)
        if not tensors or not all(isinstance(x, torch.Tensor) and x.dim() for x in tensors):
            raise _error(
                "the inputs are not tensors with a batch dimension",
                "the networks run on them in batches",
                "pass a tensor [n, ...], or a tuple or mapping of such tensors",
                f"inputs: {', '.join(type(x).__name__ for x in tensors) or 'none'}",
            )
        lengths = [len(x) for x in tensors]
        if len(set(lengths)) > 1:
            raise _error(
                f"the inputs differ in length: {lengths}",
                "the n-th entries of all inputs make the n-th example",
                "pass tensors of the same first dimension",
                "inputs",
            )
        if lengths[0] < _LEAST:
            raise _error(
                f"at least {_LEAST} inputs are needed, got {lengths[0]}",
                "normalisation computes its statistics over a batch of two or more",
                "pass a few hundred unlabelled inputs",
                "inputs",
            )
        return CalibrationBatches(_cut(call, lengths[0], batch), lengths[0])

    def moved(self, device: torch.device) -> CalibrationBatches:
        """The inputs on a device."""
        move = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), self.batches)
        return replace(self, batches=move)

    def shuffled(self, seed: int) -> CalibrationBatches:
        """The inputs in another order."""
        generator = torch.Generator().manual_seed(seed)
        if self.undivided:
            return self._calls(torch.randperm(len(self.batches), generator=generator).tolist())
        return self.rows(torch.randperm(self.size, generator=generator))

    @cached_property
    def whole(self) -> Call:
        """The inputs of all calls in one: positional, and by keyword."""
        found: Call = join_rows(self.batches)
        return found

    def split(self, share: float) -> tuple[CalibrationBatches, CalibrationBatches]:
        """Two parts with no input in common, the second with about `share` of the inputs.

        Both are the whole where there is nothing to divide.
        """
        first = self.size - max(round(share * self.size), 2)
        first -= first % self.unit
        if first < 2:
            return self, self
        return self.rows(slice(0, first)), self.rows(slice(first, self.size))

    def parts(self, count: int) -> list[CalibrationBatches]:
        """Parts of about the same size, of two inputs or more each, at most `count` of them."""
        least = max(2, self.unit)
        count = max(1, min(count, self.size // least))
        ends = [self.size * i // count for i in range(count + 1)]
        ends = [end - end % self.unit for end in ends]
        return [self.rows(slice(*pair)) for pair in pairwise(ends)]

    def first(self, count: int, batch: int) -> CalibrationBatches:
        """The first inputs, in batches of at most `batch`; all as they are where batches are fixed.

        A last batch of one is left out: operators that squeeze would take it for a constant.
        """
        step = max(count_rows(self.batches[0]), 1)
        if self.fixed or self.undivided or (count >= self.size and batch >= step):
            return self
        count, batch = min(count, self.size), max(2, min(batch, step))
        if count > 1 and count % batch == 1:
            count -= 1
        return self.rows(slice(0, count), batch)

    def together(self, *others: CalibrationBatches) -> CalibrationBatches:
        """These inputs and others, in their batches."""
        parts = (self, *others)
        return replace(
            self,
            batches=tuple(batch for part in parts for batch in part.batches),
            size=sum(part.size for part in parts),
            labels=tuple(each for part in parts for each in part.labels),
        )

    @property
    def unit(self) -> int:
        """How many inputs go together."""
        return max(count_rows(self.batches[0]), 1) if self.fixed or self.undivided else 1

    def _calls(self, chosen: Sequence[int]) -> CalibrationBatches:
        """Some of the calls."""
        batches = tuple(self.batches[i] for i in chosen)
        labels = tuple(self.labels[i] for i in chosen) if self.labels else ()
        return replace(self, batches=batches, size=sum(map(count_rows, batches)), labels=labels)

    def rows(self, chosen: slice | torch.Tensor, batch: int | None = None) -> CalibrationBatches:
        """Some of the inputs, in batches."""
        if self.undivided and isinstance(chosen, slice):
            first = np.cumsum([0, *map(count_rows, self.batches[:-1])])
            inside = (first >= chosen.start) & (first < chosen.stop)
            return self._calls(np.flatnonzero(inside).tolist())
        whole = pick_rows(self.whole, chosen)
        step = batch or max(count_rows(self.batches[0]), 1)
        batches = _cut(whole, count_rows(whole), step, fixed=self.fixed)
        sizes = list(map(count_rows, batches))
        labels: tuple[torch.Tensor, ...] = ()
        if self.labels:
            labels = pick_rows(torch.cat(self.labels), chosen)[: sum(sizes)].split(sizes)
        return replace(self, batches=batches, size=sum(sizes), labels=labels)

    @staticmethod
    def of(
        program: Program,
        inputs: Any,
        *,
        batch: int = 128,
        shuffle: bool = True,
    ) -> CalibrationBatches:
        """Check inputs and cut them into batches.

        Args:
            program: The network.
            inputs: Calibration inputs, or a `Calibration`.
            batch: Inputs per call; a graph with a fixed batch has its own.
            shuffle: Whether inputs are taken in a random order (always the same one): data that are
                sorted by class would otherwise show a part of the classes only.

        Raises:
            InputError: There are none, or they are not what the network was captured with, or not
                finite; or augmented copies are asked for of what is neither images nor signals.

        Warns of fewer than `FEW` inputs, and of more than the limit.
        """
        given = Calibration.of(inputs)
        limit = given.limit
        found, cut = _calls(given.inputs, program, limit)
        calls = [call for call, _ in found]
        if not calls:
            raise _error(
                "there are no calibration inputs", "the iterable is empty", "pass 100 to 1,000"
            )
        for args, kwargs in calls:
            _check(program, args, kwargs)
        if given.augmentations:
            _augment(calls[0])
        if not _divides(program, calls[0]):
            return _undivided(found, given, shuffle=shuffle)
        fixed = None if program.dynamic_batch else count_rows(program.example_inputs)
        whole: Call = join_rows(calls)
        labels = _labels(found)
        if shuffle:
            order = torch.randperm(count_rows(whole), generator=torch.Generator().manual_seed(0))
            whole = pick_rows(whole, order)
            labels = None if labels is None else labels[order]
        count, size = count_rows(whole), min(count_rows(whole), limit)
        if cut or count > limit:
            which = f"the first {size:,}" if cut else f"{size:,} of {count:,}"
            warnings.warn(
                f"{which} calibration inputs are used; Calibration(inputs, limit=...) allows more.",
                stacklevel=3,
            )
        if not size:
            raise _error("there are no calibration inputs", "they are empty", "pass 100 to 1,000")
        batches = _cut(whole, size, fixed or batch, fixed=fixed is not None)
        if not batches:
            raise _error(
                f"at least {fixed} calibration inputs are needed, got {size}",
                f"the graph has a fixed batch of {fixed}",
                f"pass a multiple of {fixed}, or capture with a dynamic batch",
            )
        # A last batch of one would be taken for a constant by operators that squeeze.
        if len(batches) > 1 and count_rows(batches[-1]) == 1:
            batches = batches[:-1]
        size = sum(count_rows(b) for b in batches)
        if size < FEW:
            warnings.warn(
                f"{size} calibration inputs are few: regressions are drawn more strongly towards "
                f"small weights. Pass {FEW} to 1,000.",
                stacklevel=3,
            )
        copies = given.augmentations
        if copies is None:
            copies = int(size < _MANY and default_augment(batches[0]) is not None)
        sizes = [count_rows(b) for b in batches]
        parts = () if labels is None else labels[:size].split(sizes)
        return CalibrationBatches(
            batches,
            size,
            parts,
            fixed is not None,
            augmentations=copies,
            held_out=given.held_out,
            evaluate=given.evaluate,
        )


def _divides(program: Program, call: Call) -> bool:
    """Tell whether a part of the rows of a call is a call, which is answered as within the whole.

    Tensors of other lengths go with each row, or they tell how rows belong together.
    """
    count = count_rows(call)
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor) and x.dim()]
    if all(len(x) == count for x in tensors):
        return True
    if not program.dynamic_batch or program.source is None:
        return False
    try:
        args, kwargs = pick_rows(call, slice(0, max(count // 2, 1)))
        part = tensors_in(answers(program.source, {}, args, kwargs))
        whole = tensors_in(answers(program.source, {}, *call))
    except Exception:
        # Edges of nodes that are not there any more.
        return False
    return all(
        torch.allclose(x, y[: len(x)], rtol=_ROUNDING, atol=_ROUNDING)
        for x, y in zip(part, whole, strict=True)
    )


def _undivided(
    found: Sequence[tuple[Call, Any]], given: Calibration, *, shuffle: bool
) -> CalibrationBatches:
    """Calls that stay as they are, up to the limit of inputs."""
    labels = _labels(list(found))
    sizes = [count_rows(call) for call, _ in found]
    parts = () if labels is None else labels.split(sizes)
    batches = CalibrationBatches(
        tuple(call for call, _ in found),
        sum(sizes),
        parts,
        undivided=True,
        held_out=given.held_out,
        evaluate=given.evaluate,
    )
    batches = batches.shuffled(0) if shuffle else batches
    return batches.rows(slice(0, given.limit))


def _augment(call: Call) -> Augment:
    """What makes copies of inputs."""
    found = default_augment(call)
    if found is None:
        raise _error(
            "these calibration inputs cannot be augmented",
            "only one floating tensor of images [n, c, h, w] or signals [n, c, l] can be shifted "
            "and mixed",
            "leave the copies out, or add your own copies to the inputs",
        )
    return found


def _calls(inputs: Any, program: Program, limit: int) -> tuple[list[tuple[Call, Any]], bool]:
    """What the network is called with, and labels or None; whether there is more of an iterable."""
    if isinstance(inputs, torch.Tensor | tuple):
        return [(_call(inputs), None)], False
    n_inputs = sum(isinstance(x, torch.Tensor) for x in program.example_inputs[0])
    if isinstance(inputs, TensorDataset) and n_inputs:
        tensors, last = inputs.tensors[:n_inputs], inputs.tensors[n_inputs:]
        return [(_call(tensors), last[0] if last else None)], False
    if isinstance(inputs, Mapping):
        given, labels = _without_labels(inputs, program)
        return [(_call(given), labels)], False
    if isinstance(inputs, str | Path):
        raise _error(
            "calibration inputs are no path",
            f"{str(inputs)!r:.99} was passed, and files are read by the command line only",
            "pass a tensor [n, ...], or a DataLoader that reads the files",
        )
    if not isinstance(inputs, Iterable):
        raise _error(
            f"a {type(inputs).__name__} holds no calibration inputs",
            "it is not a tensor, tuple, mapping or iterable of batches",
            "pass a tensor [n, ...], or a DataLoader, DataLoader(dataset, batch_size=64)",
        )
    found: list[tuple[Call, Any]] = []
    count = 0
    for batch in inputs:
        if count >= limit:
            return found, True
        given, labels = _without_labels(batch, program)
        call = _call(tuple(given) if isinstance(given, list) else given)
        count += count_rows(call)
        found.append((call, labels))
    return found, False


def _without_labels(batch: Any, program: Program) -> tuple[Any, Any]:
    """Return inputs and labels of a pair, or of a mapping with labels that are no input."""
    args, kwargs = program.example_inputs
    n_inputs = sum(isinstance(x, torch.Tensor) for x in args)
    if isinstance(batch, Mapping):
        name = next((name for name in _LABELS if name in batch and name not in kwargs), None)
        if name is None or not kwargs:
            return batch, None
        labels = batch[name]
        # Labels of tokens may be shifted, and -100 where none counts: only training knows.
        single = isinstance(labels, torch.Tensor) and labels.dim() == 1
        return {k: v for k, v in batch.items() if k != name}, labels if single else None
    if isinstance(batch, list | tuple) and len(batch) == 2:
        by_keyword = isinstance(batch[0], Mapping) and not n_inputs
        if n_inputs == 1 or by_keyword:
            return batch[0], batch[1]
    return batch, None


def _labels(found: list[tuple[Call, Any]]) -> torch.Tensor | None:
    """The labels of all batches in one tensor, or None where there are none."""
    given = [labels for _, labels in found]
    if not found or all(labels is None for labels in given):
        return None
    for number, (call, labels) in enumerate(found):
        where = f"batch {number} of the calibration inputs"
        if not isinstance(labels, torch.Tensor):
            raise _error(
                f"labels are a {type(labels).__name__}",
                "of a pair (inputs, labels) the second part is a tensor [n, ...]",
                "pass a tensor for each batch, or the inputs alone",
                where,
            )
        if not labels.dim() or len(labels) != count_rows(call):
            raise _error(
                f"there are {list(labels.shape)} labels for {count_rows(call)} inputs",
                "the n-th label is that of the n-th input",
                "pass one for each input, or the inputs alone",
                where,
            )
    return torch.cat(given)


def _call(inputs: Any) -> Call:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _check(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    wanted, structure = pytree.tree_flatten(program.example_inputs)
    given, own = pytree.tree_flatten((args, dict(kwargs)))
    if structure != own:
        like = _form(*program.example_inputs)
        raise _error(
            "calibration inputs differ in structure from the example inputs",
            f"they are {_form(args, kwargs)}, the example is {like}",
            f"pass them in the form of the example, {like}",
        )
    for number, (x, like) in enumerate(zip(given, wanted, strict=True)):
        if not isinstance(like, torch.Tensor) or not isinstance(x, torch.Tensor):
            continue
        where = f"tensor {number} of the inputs"
        if x.is_meta:
            why = "they are on the meta device, which keeps shapes but no values"
            raise _error("calibration inputs have no values", why, "pass real inputs", where)
        if x.shape[1:] != like.shape[1:]:
            why = f"shape {tuple(x.shape)}, the example has {tuple(like.shape)}"
            how = "resize them, or pass an example of their shape"
            raise _error("calibration inputs have the wrong shape", why, how, where)
        if x.dtype != like.dtype:
            why = f"{x.dtype}, the example is {like.dtype}"
            how = f"convert them with .to({like.dtype})"
            raise _error("calibration inputs have the wrong dtype", why, how, where)
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise _error(
                "calibration inputs are not finite",
                "NaN or infinity would reach every activation",
                "leave these inputs out",
                where,
            )


def _form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return how inputs stand, in words."""
    named = ", ".join(f"{name!r}: {type(x).__name__.lower()}" for name, x in kwargs.items())
    placed = ", ".join(type(x).__name__.lower() for x in args)
    parts = [f"({placed})" if len(args) > 1 else placed] * bool(args)
    return " and ".join(parts + [f"{{{named}}}"] * bool(kwargs)) or "nothing"


def count_rows(batch: Any) -> int:
    """Return the number of inputs of a call, or of what a network answers to them."""
    leaves = pytree.tree_leaves(batch)
    return next((len(x) for x in leaves if isinstance(x, torch.Tensor) and x.dim()), 0)


def join_rows(batches: Sequence[Any]) -> Any:
    """Return calls, or answers, in one; what is no batch is that of the first."""

    def join(*parts: Any) -> Any:
        first = parts[0]
        if len(parts) == 1 or not isinstance(first, torch.Tensor) or not first.dim():
            return first
        return torch.cat(parts)

    return pytree.tree_map(join, *batches)


def _cut(whole: Any, size: int, step: int, *, fixed: bool = False) -> tuple[Call, ...]:
    """The first `size` inputs in batches of `step`; with `fixed` no batch is smaller."""
    starts = range(0, size - (step - 1 if fixed else 0), step)
    return tuple(pick_rows(whole, slice(start, min(start + step, size))) for start in starts)


def pick_rows(whole: Any, chosen: slice | torch.Tensor) -> Any:
    """Return some of the inputs of a call, or answers; what is no batch stays whole."""
    n = count_rows(whole)

    def pick(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.dim() and len(x) == n:
            return x[chosen.to(x.device) if isinstance(chosen, torch.Tensor) else chosen]
        return x

    return pytree.tree_map(pick, whole)


def _error(what: str, why: str, how: str, where: str = "calibration inputs") -> InputError:
    return InputError(what, where=where, why=why, how=how)
