"""What a network of some width costs, known before it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.activations.calibration import count_rows, pick_rows
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.common.measure import least_cpu_milliseconds, milliseconds
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    is_operator,
    pytree,
)
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import RoleKind
from fxfuse.transform.layout import copies_of, default_layout
from fxfuse.transform.resizing import blank

#: Seconds for which a network and one operator are timed.
_NETWORK_TIME, _OPERATOR_TIME = 0.3, 0.01
#: Milliseconds of each operator that was timed in this process, by what it was called with.
_OPERATORS: dict[tuple[Any, ...], float] = {}
#: Milliseconds of networks that were timed, by the graph that they were rewritten from.
_NETWORKS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], float]] = WeakKeyDictionary()


def parameters_of(
    graph: CouplingGraph, sizes: Mapping[str, int], plan: FusionPlan | None = None
) -> int:
    """Return the elements of the parameters of the network of these sizes, tied ones once."""
    program, copies = graph.program, copies_of(graph, sizes)

    def elements(name: str) -> int:
        if plan is not None and plan.roles[name].kind is RoleKind.PER_MEMBER:
            members = (graph.of_member(member) for member in range(plan.n_members))
            return sum(member.program.tensor(name).numel() for member in members)
        places = [(name, dim) for dim in range(program.tensor(name).dim())]
        return prod(default_layout(graph, place, copies).size for place in places)

    names = dict.fromkeys(program.canonical[name] for name in program.names)
    return sum(elements(n) for n in names if isinstance(program.tensor(n), nn.Parameter))


def operations_of(
    graph: CouplingGraph, sizes: Mapping[str, int], plan: FusionPlan | None = None
) -> int | None:
    """Return the floating-point operations of the network of these sizes for the example inputs.

    As `torch.utils.flop_counter` counts them, a multiplication and an addition as two. No memory is
    used and nothing is computed. None where shapes depend on the values of the inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    module = blank(graph, sizes, empty, plan)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, graph.program.example_inputs
        )
        try:
            with counter, mode:
                module(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
    return counter.get_total_flops()


def latency_of(module: nn.Module, program: Program, batch: int | None) -> float:
    """Return the milliseconds of a network for its example inputs, or `batch` of them.

    The median; on one thread of the CPU the least CPU time, which other processes change least.
    """
    return _timed(module, *_timed_inputs(program, batch), _NETWORK_TIME)


class Latency:
    """What networks of some sizes take where the members are, in milliseconds.

    What is known stays known in the process, so that the same sizes always take as long.

    Attributes:
        graph: The analysis of the members.
        batch: Number of inputs; None: as many as the example has.
    """

    def __init__(self, graph: CouplingGraph, batch: int | None) -> None:
        self.graph, self.batch = graph, batch
        self._known = _NETWORKS.setdefault(graph.program.module, {})

    def of_operators(self, sizes: Mapping[str, int]) -> float:
        """Return the sum over operators, each of which is timed once for each shape."""
        return self._once("operators", sizes, self._operators)

    def of_network(self, sizes: Mapping[str, int]) -> float:
        """Return what the whole network takes: also Python, and memory that left the cache."""
        return self._once(
            "network", sizes, lambda module: latency_of(module, self.graph.program, self.batch)
        )

    def _once(
        self, kind: str, sizes: Mapping[str, int], time: Callable[[nn.Module], float]
    ) -> float:
        asked = repr(self.graph.constraints)
        key = (kind, self.batch, torch.get_num_threads(), asked, *sizes.items())
        if key not in self._known:
            self._known[key] = time(self._network(sizes))
        return self._known[key]

    def _network(self, sizes: Mapping[str, int]) -> nn.Module:
        device = _device(self.graph.program)
        generator = torch.Generator().manual_seed(0)

        def drawn(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            # As networks are initialised, since operators are faster on zeros; variances and scales
            # are positive.
            if not (dtype.is_floating_point or dtype.is_complex):
                return torch.zeros(shape, dtype=dtype)
            if len(shape) < 2:
                return torch.rand(shape, generator=generator).to(dtype)
            values = torch.randn(shape, generator=generator)
            return (values / sqrt(max(prod(shape[1:]), 1))).to(dtype)

        return blank(self.graph, sizes, drawn).to(device)

    def _operators(self, module: nn.Module) -> float:
        args, kwargs = _timed_inputs(self.graph.program, self.batch)
        with torch.no_grad(), _Operators() as operators:
            module(*args, **kwargs)
        total: float = operators.milliseconds
        return total


class _Operators(TorchFunctionMode):
    """Adds up what the operators take that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.milliseconds: float = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_operator(func):
            told = pytree.tree_map_only(torch.Tensor, _layout, (args, kwargs))
            key = (str(func), str(told), torch.get_num_threads())
            if key not in _OPERATORS:
                _OPERATORS[key] = _timed(func, args, kwargs, _OPERATOR_TIME)
            self.milliseconds += _OPERATORS[key]
        return func(*args, **kwargs)


def _layout(tensor: torch.Tensor) -> str:
    """What of a tensor decides how long an operator takes."""
    return f"{tensor.dtype} {tensor.device} {list(tensor.shape)} {tensor.stride()}"


def _timed(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], run_time: float
) -> float:
    on_cpu = all(x.device.type == "cpu" for x in tensors_in((args, dict(kwargs))))
    clock = least_cpu_milliseconds if on_cpu and torch.get_num_threads() == 1 else milliseconds
    return clock(call, args, run_time, kwargs)


def _device(program: Program) -> torch.device:
    tensors = (x for x in tensors_in(program.example_inputs) if not x.is_meta)
    return next((x.device for x in tensors), torch.device("cpu"))


def _timed_inputs(program: Program, batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a copy of the example inputs, of another batch size if one is given."""
    rows = count_rows(program.example_inputs)
    if batch not in (None, rows) and not program.dynamic_batch:
        raise OptionError(
            f"batch={batch} does not work with this network",
            where="Size(batch=...)",
            why=f"it was captured for a batch of {rows} only",
            how="leave batch out, or pass an example with as many inputs",
        )

    def real(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x.clone()

    inputs = pytree.tree_map_only(torch.Tensor, real, program.example_inputs)
    if batch is not None:
        inputs = pick_rows(inputs, torch.arange(batch) % rows)
    args, kwargs = inputs
    return args, kwargs
