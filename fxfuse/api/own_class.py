"""A network of another size in the user's own class: a copy whose numbers follow its tensors.

Torch's own layers say what their tensors decide (`layer_sizes`). Of other modules, a number
may have to change where it equals a size that changed in the module's own operators or tensors.
That is a guess, so what comes out runs against the network that it has to equal, and numbers that
the forward pass does not need changed keep their value.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import nn

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.api.literal_changes import Changes, changes_of
from fxfuse.api.own_config import configured
from fxfuse.errors import RewriteError
from fxfuse.graph.capture import Program
from fxfuse.graph.eager import alone
from fxfuse.graph.example import first_line
from fxfuse.graph.layer_sizes import sizes_of_layer
from fxfuse.graph.run import answers
from fxfuse.graph.tensors import is_constant, tensors_in
from fxfuse.graph.torch_compat import pytree
from fxfuse.transform.emit import FusedModule
from fxfuse.verify.check import relative_error

#: Relative to the largest output.
_TOLERANCE = 1e-5
#: The same with random weights, which amplify how numbers are rounded.
_ROUGH = 1e-3
#: Ways of setting the numbers that are tried: each costs a run of the network.
_TRIES = 64


@dataclass
class _Attribute:
    """One number (or tuple of numbers) that all modules of a class have, and what it could become.

    Attributes:
        ways: Functions that set it in all these modules; the preferred way first.
        leave: Which of them leaves it as it was.
    """

    name: str
    ways: list[Callable[[], None]]
    leave: int


@dataclass(frozen=True)
class _Place:
    """An attribute of one module.

    Attributes:
        candidates: What the attribute could become.
        likely: Whether the module's own operators or tensors say so, not only its submodules'.
    """

    part: nn.Module
    candidates: list[Any]
    likely: bool


@alone
def copy_source(source: nn.Module) -> nn.Module:
    """Copy the user's module."""
    try:
        return copy.deepcopy(source)
    except Exception as error:
        raise RewriteError(
            f"{type(source).__name__} cannot be copied",
            why=f"{type(error).__name__}: {error}",
            how="build a second model and call result.load_into(model)",
        ) from error


def resized_copy(
    source: nn.Module,
    program: Program,
    module: FusedModule,
    state: Mapping[str, torch.Tensor],
    graph: CouplingGraph,
) -> nn.Module:
    """Return a copy of a module of the user's own class whose tensors have the sizes of `state`.

    It is in the mode of `source` and answers what `module` answers to the example inputs, and to
    another number of them where the batch is dynamic. If no way of setting its numbers gives that,
    a `RewriteError` says what was tried.
    """
    missing = next((name for name in program.names if name not in state), None)
    if missing is not None:
        raise RewriteError(
            f"{type(source).__name__} cannot hold this network",
            where=missing,
            why="each member keeps its own tensor there, and members run one by one",
            how="use result.module, or fuse with mixing='joint'",
        )
    reference = _Reference(program, module, state)
    own = _changed_sizes(program, state, graph)
    built = configured(source, state, _all_sizes(own), reference.difference)
    if built is not None:
        return built
    model = copy_source(source)
    _put_tensors(model, program, state)
    reference.move(model)
    attributes = _attributes(model, changes_of(program.graph, module.graph), own)
    reason, tried = "", 0
    for chosen in _choices(attributes):
        _set(attributes, chosen)
        found = reference.difference(model)
        tried += 1
        if not found:
            _set(attributes, _needed(attributes, chosen, lambda: not reference.difference(model)))
            return model
        reason = reason or found
    names = ", ".join(attribute.name for attribute in attributes)
    unread = ", ".join(program.unread_modules())
    raise RewriteError(
        f"{type(source).__name__} cannot be built at this width",
        why=f"with the fused tensors it does not answer like result.module: {reason}"
        + (f"; {tried} ways to set {names} were tried" if names else "")
        + (f"; no output depends on {unread}, which kept their sizes" if unread else ""),
        how="use result.module, or build the model with sizes that fit and call "
        "result.load_into(model)",
    )


def _put_tensors(model: nn.Module, program: Program, state: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters and buffers; tied ones stay one."""
    put: dict[str, torch.Tensor] = {}
    for name in program.names:
        path, _, leaf = name.rpartition(".")
        owner, first = model.get_submodule(path), program.canonical[name]
        if first not in put:
            before, tensor = getattr(owner, leaf), state[name].detach().clone()
            if isinstance(before, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
            put[first] = tensor
        setattr(owner, leaf, put[first])


class _Reference:
    """What the network in another size answers: to the example, and with other inputs and weights.

    Other weights, since a network may hide what it computes, behind a head of zeros for instance.
    """

    def __init__(
        self, program: Program, module: FusedModule, state: Mapping[str, torch.Tensor]
    ) -> None:
        floats = (n for n in program.names if state[n].is_floating_point())
        name = next(floats, program.names[0])
        self.before, self.now = program.tensor(name), state[name]
        # Heads that became one layer are in the network one by one, so they stay as they are.
        held = module.state_dict().keys()
        other = program.once({name: state[name] for name in program.names if name in held})
        inputs = (self._moved(x) for x in (program.example_inputs, _longer(program)))
        example, longer = inputs
        eps = torch.finfo(self.now.dtype).eps if self.now.is_floating_point() else 0.0
        close, rough = max(_TOLERANCE, 8 * eps), max(_ROUGH, 64 * eps)
        # Made anew for every run: kept, each would be as large as the network.
        calls: list[tuple[Any, Callable[[], dict[str, torch.Tensor]], float]] = [
            (example, dict, close),
            (longer, partial(_shaken, other), close),
            (example, partial(_random, other), rough),
        ]
        #: Inputs, tensors in place of the network's, the outputs, and how close others must be.
        self.calls = [(x, s, tensors_in(answers(module, s(), *x)), near) for x, s, near in calls]
        if not all(bool(x.isfinite().all()) for x in self.calls[-1][2]):
            self.calls.pop()

    def move(self, model: nn.Module) -> None:
        """Take a model to where the network has been taken since it was captured."""
        if self.now.device != self.before.device:
            model.to(self.now.device)
        if self.now.dtype != self.before.dtype:
            model.to(self.now.dtype)

    def _moved(self, inputs: Any) -> Any:
        def moved(x: torch.Tensor) -> torch.Tensor:
            dtype = self.now.dtype if x.dtype == self.before.dtype else x.dtype
            return x.to(self.now.device, dtype)

        return pytree.tree_map_only(torch.Tensor, moved, inputs)

    def difference(self, model: nn.Module) -> str:
        """Return how a model answers otherwise; empty where it does not."""
        for (args, kwargs), state, expected, tolerance in self.calls:
            try:
                found = tensors_in(answers(model, state(), args, kwargs))
            except Exception as error:
                return first_line(error)
            shapes = [[tuple(x.shape) for x in outputs] for outputs in (found, expected)]
            if shapes[0] != shapes[1]:
                return f"outputs of shapes {shapes[0]} instead of {shapes[1]}"
            distance = relative_error(found, expected)
            if not distance <= tolerance:
                return f"outputs differ by {distance:.1e}"
        return ""


def _longer(program: Program) -> Any:
    """Return the example inputs with one more example, which is the first again, in reverse order.

    Where the batch is static, the example inputs as they are.
    """
    if not program.dynamic_batch:
        return program.example_inputs
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]

    def longer(leaf: Any, value: Any) -> Any:
        tensor = isinstance(value, torch.Tensor) and value.dim()
        batched = tensor and isinstance(value.shape[0], torch.SymInt)
        return torch.cat([leaf, leaf[:1]]).flip(0) if batched else leaf

    pairs = zip(leaves, nodes, strict=True)
    return pytree.tree_unflatten([longer(x, node.meta.get("val")) for x, node in pairs], spec)


def _shaken(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors a tenth away, or a little away from zero; integers stay."""
    generator = torch.Generator().manual_seed(0)

    def shaken(tensor: torch.Tensor) -> torch.Tensor:
        if is_constant(tensor):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).clamp(-3, 3).to(tensor)
        return tensor * (1 + 0.1 * noise) if bool(tensor.any()) else 0.02 * noise

    return {name: shaken(tensor) for name, tensor in state.items()}


def _random(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return matrices of random numbers, so large that an attention looks at single positions.

    With small weights it looks at all alike, and the number of its heads does not show.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if is_constant(tensor) or tensor.dim() < 2:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).mul_(
            2 / math.sqrt(tensor[0].numel())
        )
        return noise.to(tensor)

    return {name: drawn(tensor) for name, tensor in state.items()}


def _changed_sizes(
    program: Program, state: Mapping[str, torch.Tensor], graph: CouplingGraph
) -> dict[str, Changes]:
    """Return what the sizes of each module's own tensors became, and their numbers of units.

    Of heads, a class may hold the number only, and no operator: `q.reshape(b * heads, -1, n)`.
    """
    own: dict[str, Changes] = defaultdict(Changes)
    for name in program.names:
        for before, after in zip(program.tensor(name).shape, state[name].shape, strict=True):
            if before != after:
                own[name.rpartition(".")[0]].size(before, after)
    for group in graph.groups:
        for (name, dim), slots in group.index.items():
            if name not in program.canonical:
                continue
            before, after = program.tensor(name).shape[dim], state[name].shape[dim]
            units, each = slots.shape
            if before == units * each and before != after and not after % each:
                own[name.rpartition(".")[0]].size(units, after // each)
    return own


def _all_sizes(own: Mapping[str, Changes]) -> dict[int, set[int]]:
    """Return what sizes became anywhere in the network."""
    found: dict[int, set[int]] = defaultdict(set)
    for changes in own.values():
        for before, afters in changes.sizes.items():
            found[before] |= {*afters}
    return found


def _attributes(
    model: nn.Module, changes: Mapping[str, Changes], own: Mapping[str, Changes]
) -> list[_Attribute]:
    """Set what torch's own layers decide; return what is left to be found.

    Args:
        model: The copy, with its new tensors.
        changes: What changed in the operators of each module's own code.
        own: What changed in the sizes of each module's own tensors.
    """
    found: dict[tuple[type, str], list[_Place]] = defaultdict(list)
    for path, part in model.named_modules():
        literal = changes.get(path, Changes())
        if sizes_of_layer(part) is not None:
            for name, value in literal.named.items():
                if name in vars(part) and value is not None:
                    setattr(part, name, value)
            for name, value in (sizes_of_layer(part) or {}).items():
                setattr(part, name, value)
            continue
        inner = [f"{path}.{name}".lstrip(".") for name, _ in part.named_children()]
        near = [literal, own.get(path, Changes())]
        far = [own[name] for name in inner if name in own]
        for name, value in vars(part).items():
            likely, others = _candidates(value, near), _candidates(value, far)
            others = [other for other in others if other not in likely]
            if likely or others:
                found[(type(part), name)].append(_Place(part, [*likely, *others], bool(likely)))
    return [_attribute(kind, name, places) for (kind, name), places in found.items()]


def _candidates(value: Any, changes: list[Changes]) -> list[Any]:
    """Return what an attribute could become."""
    found: list[Any] = []
    if isinstance(value, int) and not isinstance(value, bool):
        found = [new for change in changes for new in change.sizes.get(value, ())]
    elif isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        found = [s for change in changes if (s := change.shape_of(value)) is not None]
        sizes = [
            [new for change in changes for new in change.sizes.get(x, ())] or [x] for x in value
        ]
        found += [each for each in product(*(s[:2] for s in sizes)) if each != tuple(value)][:4]
        found = [type(value)(each) for each in found]
    return [new for place, new in enumerate(found) if new not in found[:place]]


def _attribute(kind: type, name: str, places: list[_Place]) -> _Attribute:
    def way(number: int) -> Callable[[], None]:
        def choose() -> None:
            for place in places:
                last = len(place.candidates) - 1
                setattr(place.part, name, place.candidates[min(number, last)])

        return choose

    before = [getattr(place.part, name) for place in places]

    def leave() -> None:
        for place, value in zip(places, before, strict=True):
            setattr(place.part, name, value)

    ways = [way(number) for number in range(max(len(place.candidates) for place in places))]
    likely = all(place.likely for place in places)
    ways.insert(len(ways) if likely else 0, leave)
    return _Attribute(f"{kind.__name__}.{name}", ways, ways.index(leave))


def _choices(attributes: list[_Attribute]) -> Iterator[list[int]]:
    """For each attribute a way, few other than the preferred ones first; not all where many are."""

    def every() -> Iterator[list[int]]:
        for count in range(len(attributes) + 1):
            for other in combinations(range(len(attributes)), count):
                for ways in product(*(range(1, len(attributes[i].ways)) for i in other)):
                    chosen = [0] * len(attributes)
                    for place, way in zip(other, ways, strict=True):
                        chosen[place] = way
                    yield chosen

    return (chosen for _, chosen in zip(range(_TRIES), every(), strict=False))


def _needed(
    attributes: list[_Attribute], chosen: list[int], holds: Callable[[], bool]
) -> list[int]:
    """Leave every attribute as it was that the forward pass does not need changed."""
    for place, attribute in enumerate(attributes):
        if chosen[place] != attribute.leave:
            without = [*chosen[:place], attribute.leave, *chosen[place + 1 :]]
            _set(attributes, without)
            chosen = without if holds() else chosen
    return chosen


def _set(attributes: list[_Attribute], chosen: list[int]) -> None:
    for attribute, way in zip(attributes, chosen, strict=True):
        attribute.ways[way]()
