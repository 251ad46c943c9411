"""What an oracle reports, and how outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxfuse.common.readable import Description, Readable, counted
from fxfuse.graph.capture import Program, capture
from fxfuse.graph.eager import alone
from fxfuse.graph.module_checks import check_values, state_of
from fxfuse.graph.run import answers, same_random_state
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import pytree
from fxfuse.transform.emit import FusedModule
from fxfuse.verify.in_double import (
    Changed,
    InDouble,
    lifted,
    made_in_double,
    names_lower_precision,
    to_double,
)

#: Relative to the largest output, in float64.
EXACT = 1e-9
#: A permuted network rounds at every sum, not once per weight.
_MARGIN = 100.0
#: A network that amplifies rounding further than this cannot be judged: the oracle fails.
_UNDECIDABLE, _UNDECIDABLE_IN_SINGLE = 1e-4, 1e-2
_DOUBLE = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Check:
    """What an oracle found.

    Attributes:
        name: Name of the oracle.
        error: Largest difference, relative to the largest reference value.
        tolerance: Largest error that passes.
        passed: Whether the oracle holds.
        detail: What else is worth knowing.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True, repr=False)
class Verification(Readable):
    """The oracles that ran before a fused network was returned."""

    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all of them hold."""
        return all(check.passed for check in self.checks)

    def described(self) -> Description:
        """Return which oracles hold, and how exactly."""
        failed = [check.name for check in self.checks if not check.passed]
        title = f"Verification: all {counted(len(self.checks), 'check')} passed"
        if failed:
            title = f"Verification: FAILED: {', '.join(failed)}"
        elif not self.checks:
            title = "Verification: no check ran"
        return title, {check.name: _found(check) for check in self.checks}


def _found(check: Check) -> str:
    most = "any" if check.tolerance == float("inf") else f"at most {check.tolerance:.2g}"
    said = f"error {check.error:.2g} ({most} passes)"
    return (
        ("" if check.passed else "FAILED: ") + said + (f"; {check.detail}" if check.detail else "")
    )


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest absolute difference over the largest expected magnitude; inf for NaN.

    Also inf where numbers or shapes of tensors differ: sizes may depend on the data.
    """
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        if b.dtype is torch.bool:
            a, b = a.int(), b.int()
        scale = max(float(b.abs().max()), 1e-30)
        error = float((a.to(b.dtype) - b).abs().max()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def as_program(model: Any, example: Any) -> Program:
    """Capture a model, unless it is captured already."""
    return model if isinstance(model, Program) else capture(model, example)


def as_double(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating-point tensors in float64, complex ones in complex128, the others unchanged."""
    return {n: to_double(t) for n, t in state.items()}


def inputs_of(program: Program, *, flip: bool = False, double: bool = True) -> Any:
    """Return the example inputs in float64; flipped: other inputs of the same kind."""

    def other(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            # A copy, since the network may write into it.
            x = (to_double(x) if double else x).clone()
        if flip and isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.flip(-1) * 0.5 + 0.25
        return x.flip(-1) if flip and isinstance(x, torch.Tensor) and x.dim() else x

    return pytree.tree_map(other, program.example_inputs)


def run(
    program: Program, state: Mapping[str, torch.Tensor], *, flip: bool = False
) -> list[torch.Tensor]:
    """Return the outputs of the captured network with other tensors, in float64.

    The captured graph runs where it is a program, and reads each tensor when it needs it; a copy of
    the user's own module runs elsewhere. A network that cannot run in float64 (it makes tensors in
    float32) runs as it is: then `tolerance_of` its outputs is that of its own precision.
    """

    def outputs(*, double: bool) -> list[torch.Tensor]:
        args, kwargs = inputs_of(program, flip=flip, double=double)
        if program.source is not None and not program.is_exported:
            check_values(state)
            return _run_eagerly(program.source, program.once(state), args, kwargs, double=double)
        with torch.no_grad(), same_random_state():
            return tensors_in(InDouble(program, state, double=double).answer(args, kwargs))

    return in_best_precision(lambda: outputs(double=True), lambda: outputs(double=False))


def in_best_precision(
    in_double: Callable[[], list[torch.Tensor]], as_it_is: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return what a network answers in float64, or in its own precision if it cannot run in it."""
    try:
        return in_double()
    # torch may reject, or the user's code, which is free to assert the precision.
    except Exception as error:
        try:
            return as_it_is()
        except Exception:
            # It is not the precision.
            raise error from None


def rounding_of(outputs: Sequence[torch.Tensor]) -> float:
    """Return half a unit in the last place of the lowest precision that outputs have."""
    dtypes = {x.dtype for x in outputs if x.is_floating_point() or x.is_complex()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=_DOUBLE) / 2


def is_double(outputs: Sequence[torch.Tensor]) -> bool:
    """Tell whether no output is in a lower precision than float64."""
    return rounding_of(outputs) <= _DOUBLE


def precision_in_words(outputs: Sequence[torch.Tensor]) -> str:
    """Say so where outputs are not in float64."""
    if is_double(outputs):
        return ""
    return "in the network's own precision, since it does not run in float64; "


def tolerance_of(
    program: Program, state: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]
) -> float:
    """Return the largest error that passes: 1e-9, or what rounding does in a lower precision."""
    if is_double(outputs):
        return EXACT
    return tolerated(rounding_error(program, state, outputs), outputs)


def tolerated(floor: float, outputs: Sequence[torch.Tensor]) -> float:
    """Return the largest error that passes where one rounding of the weights makes `floor`."""
    return min(_MARGIN * floor, _UNDECIDABLE if is_double(outputs) else _UNDECIDABLE_IN_SINGLE)


def rounding_error(
    program: Program,
    state: Mapping[str, torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    seed: int = 0,
) -> float:
    """Return how far the outputs move if each weight is rounded once more."""
    generator, size = torch.Generator().manual_seed(seed), rounding_of(outputs)
    if not program.is_exported and names_lower_precision(program.graph):
        # The user's own code runs, and may round to float32 on its way.
        size = max(size, torch.finfo(torch.float32).eps / 2)

    def rounded(_: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = to_double(tensor)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor * (1 + size * noise)

    return max(relative_error(run(program, Changed(state, rounded)), outputs), size)


def in_double(module: FusedModule) -> FusedModule:
    """The module in float64, and its graph's own casts to a lower precision lifted to float64."""
    for node in module.graph.nodes:
        node.args = lifted(node.args)
        node.kwargs = {**lifted(node.kwargs), **made_in_double(node)}
    module.recompile()
    for tensor in (*module.parameters(), *module.buffers()):
        # Not `module.double()`, which leaves complex tensors single.
        tensor.data = to_double(tensor.data)
    return module


@alone
def _run_eagerly(
    source: nn.Module, state: Mapping[str, torch.Tensor], args: Any, kwargs: Any, *, double: bool
) -> list[torch.Tensor]:
    if not double:
        own = {n: t.to(state_of(source)[n].dtype) for n, t in state.items()}
        return tensors_in(answers(source, own, args, kwargs))
    # Tensors that the module makes without naming a dtype have to be float64 too.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        own = as_double(state)
        return tensors_in(answers(copy.deepcopy(source).double(), own, args, kwargs))
    finally:
        torch.set_default_dtype(before)
