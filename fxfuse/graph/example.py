"""Example inputs: what they must be, what a model answers, and that there are two of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from keyword import iskeyword
from typing import Any

import torch
from torch import nn

from fxfuse.errors import CaptureError, InputError
from fxfuse.graph.run import answers
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import FakeTensor, pytree

#: Answers to one example and to two of it differ by rounding: kernels depend on the batch.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Example:
    """Example inputs of a network, with a batch of at least 2.

    Attributes:
        args: Positional inputs: a tuple, or the only one.
        kwargs: Keyword inputs by name.
        dynamic_shapes: Passed to `torch.export.export` unchanged. None: dimension 0 of every tensor
            input is dynamic.
    """

    args: Any = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None

    def __post_init__(self) -> None:
        """Make the only positional input a tuple."""
        if not isinstance(self.args, tuple):
            object.__setattr__(self, "args", (self.args,))
        object.__setattr__(self, "kwargs", dict(self.kwargs))

    @staticmethod
    def of(given: Any) -> Example:
        """What a caller gave: a tensor, a tuple of inputs, a mapping of keyword inputs, or this."""
        if isinstance(given, Example):
            return given
        return Example(kwargs=given) if isinstance(given, Mapping) else Example(given)


def check_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check example inputs before a model is run on them."""
    for name in kwargs:
        if not name.isidentifier() or iskeyword(name):
            # torch.fx writes it into Python code.
            why = "the name of a keyword input is no identifier of Python"
            raise _rejected("named so", f"{name!r:.99}", why, "rename the input")
    for number, x in enumerate(tensors_in((args, dict(kwargs)))):
        where = f"tensor {number} of the inputs, shape {tuple(x.shape)}, {x.dtype}"
        if x.is_quantized or x.layout is not torch.strided:
            form = "quantised" if x.is_quantized else f"in the layout {x.layout}"
            how = "x.dequantize()" if x.is_quantized else "x.to_dense()"
            raise _rejected("not dense", where, f"it is {form}", f"pass {how}")
        if x.dim() and x.shape[0] == 0:
            raise _rejected("empty", where, "its batch has size 0", "pass a batch of 2 or more")
        if not (x.is_meta or isinstance(x, FakeTensor)) and bool(x.isnan().any()):
            why = "every output would be NaN, so nothing could be verified"
            raise _rejected("NaN", where, why, "pass finite inputs")


def _rejected(what: str, where: str, why: str, how: str) -> InputError:
    return InputError(f"an example input is {what}", where=where, why=why, how=how)


def try_example(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a model on its example inputs.

    Returns:
        What it answers.
    """
    try:
        answer = answers(model, {}, args, kwargs)
    except Exception as error:
        shapes = pytree.tree_map(_told, (args, dict(kwargs)))
        call = f"{type(model).__name__} called with shapes {shapes[0]} {shapes[1] or ''}"
        raise InputError(
            "the model rejects the example inputs",
            where=call.rstrip(),
            why=first_line(error),
            how=_conversion(model, args, kwargs)
            or _form(model, args, kwargs)
            or "pass inputs that the model accepts, with their batch dimension",
        ) from error
    _register_dataclasses(answer)
    if not tensors_in(answer):
        raise CaptureError(
            f"{type(model).__name__} returns no tensor",
            why=f"it returns a {type(answer).__name__}, in which torch.export finds no tensor",
            how="return a tensor, or a tuple, list, dict or dataclass of tensors",
        )
    return answer


def _register_dataclasses(answer: Any) -> None:
    """Tell torch of the dataclasses in what a network answers: their fields are all they hold."""
    for leaf in pytree.tree_leaves(answer):
        if is_dataclass(leaf) and register_dataclass(type(leaf)):
            _register_dataclasses([getattr(leaf, each.name) for each in fields(leaf)])


def register_dataclass(kind: type) -> bool:
    """Tell torch of a dataclass; False where one cannot be made of its fields alone."""
    if not is_dataclass(kind) or not all(each.init for each in fields(kind)):
        return False
    if kind in pytree.SUPPORTED_NODES:
        return True
    name = f"{kind.__module__}.{kind.__qualname__}"
    torch.export.register_dataclass(kind, serialized_type_name=name)
    return True


def first_line(error: BaseException) -> str:
    """Return the type and first line of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _told(x: Any) -> Any:
    """Return what of an input a message shows."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    return x if isinstance(x, int | float | str | None) else type(x).__name__


def _form(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Say so where inputs are no tensors, or not what `forward` is called with."""
    if any(hasattr(x, "__array__") and not isinstance(x, torch.Tensor) for x in args):
        return "pass tensors, such as torch.from_numpy(x)"
    try:
        taken = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return ""
    try:
        taken.bind(*args, **kwargs)
    except TypeError:
        needed = [p for p in taken.parameters.values() if p.default is p.empty]
        names = [p.name for p in needed if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        shown = ", ".join(f"{name!r}: tensor" for name in names or list(taken.parameters)[:1])
        positional = all(p.kind is not p.KEYWORD_ONLY for p in needed)
        one = f"tensor{',' * (len(names) == 1)}"
        parts = f"({one if len(names) < 2 else ', '.join(names)})"
        by_place = f", or positional inputs as a tuple, {parts}" if positional else ""
        return f"forward takes {taken}: pass keyword inputs as a mapping, {{{shown}}}{by_place}"
    return ""


def _conversion(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Say so where inputs and parameters differ in device or floating-point dtype."""
    inputs, parameters = tensors_in((args, dict(kwargs))), list(model.parameters())
    devices = {p.device for p in parameters}
    elsewhere = {x.device for x in inputs} - devices
    if len(devices) == 1 and elsewhere:
        here, there = devices.pop(), elsewhere.pop()
        return f"move both to one device: the model is on {here}, an input on {there}"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    others = {x.dtype for x in inputs if x.is_floating_point()} - dtypes
    if len(dtypes) == 1 and others:
        ours, theirs = dtypes.pop(), others.pop()
        return f"convert the input with .to({ours}): it is {theirs}, the model is {ours}"
    return ""


def is_single(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether dimension 0 of every input that has one is 1."""
    sizes = {x.shape[0] for x in tensors_in((args, dict(kwargs))) if x.dim()}
    return sizes == {1}


def at_least_two(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], answer: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a single example, because `torch.export` takes a batch of 1 for a constant.

    Returns:
        The inputs with every tensor repeated along dimension 0, when all of them have size 1 there
        and the model answers both examples as it answers one; else the inputs as they are.
    """
    given = (args, dict(kwargs))
    if not is_single(args, kwargs):
        return given
    twice = pytree.tree_map_only(torch.Tensor, _repeated, given)
    try:
        found = tensors_in(answers(model, {}, *twice))
    except Exception:
        # The model does not take two: dimension 0 is no batch.
        return given
    expected = [_repeated(y) for y in tensors_in(answer)]
    if len(found) != len(expected) or not all(map(_is_close, found, expected)):
        return given
    return twice[0], twice[1]


def _repeated(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.is_meta:
        return found.shape == expected.shape
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=_ROUNDING, atol=_ROUNDING * scale, equal_nan=True)
