"""A captured network in float64, of whose weights no copy in float64 is kept."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.graph.arguments import argument_names
from fxfuse.graph.capture import Program
from fxfuse.graph.module_checks import check_values
from fxfuse.graph.torch_compat import flatten_inputs, pytree

#: Bytes of copies from which on they are no longer in the cache.
_CACHED = 2**23
_HIGHER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


def to_double(value: Any) -> Any:
    """Return a floating-point tensor in float64, a complex one in complex128; all else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def lifted(value: Any) -> Any:
    """Return the arguments of an operator, with a lower precision that they name lifted to double.

    What a network rounds on purpose (norms in float32, say) would hide what an oracle looks for.
    """
    return pytree.tree_map_only(torch.dtype, lambda x: _HIGHER.get(x, x), value)


def names_lower_precision(graph: fx.Graph) -> bool:
    """Tell whether an operator asks for a precision that `lifted` would raise."""
    return any(
        n.op == "call_function" and lifted((n.args, n.kwargs)) != (n.args, n.kwargs)
        for n in graph.nodes
    )


def made_in_double(node: fx.Node) -> dict[str, Any]:
    """Return the arguments with which an operator makes a tensor in float64, from no tensor.

    `torch.zeros(3)` names no precision; the network ran in float32, torch's default.
    """
    made = node.meta.get("val")
    dtype = _HIGHER.get(made.dtype) if isinstance(made, torch.Tensor) else None
    makes = node.op == "call_function" and not node.kwargs.get("dtype")
    if dtype is None or not makes or "dtype" not in argument_names(node.target):
        return {}
    reads = any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
    return {} if reads else {"dtype": dtype}


def conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> torch.Tensor:
    """Convolve as `aten.conv1d`: [b, c, l] → [b, o, m], one product for each tap of the kernel.

    In float64, torch on the CPU copies what each output reads before it multiplies. For a long
    sequence these copies outgrow the cache, and take several times as long as the products.
    """
    taps = weight.shape[2]
    copied = taps * x[0].numel() * x.element_size()
    if copied < _CACHED or x.dim() != weight.dim() or groups > 1 or x.device.type != "cpu":
        given = (x, weight, bias, stride, padding, dilation, groups)
        result: torch.Tensor = torch.ops.aten.conv1d.default(*given)
        return result
    (step, gap), sides = (s[0] for s in (stride, dilation)), [padding[0]] * 2
    x = torch.nn.functional.pad(x, sides)
    length = (x.shape[2] - gap * (taps - 1) - 1) // step + 1
    result = x.new_zeros(len(x), len(weight), length)
    if bias is not None:
        result += bias[:, None]
    for tap in range(taps):
        first = tap * gap
        read = x[:, :, first : first + (length - 1) * step + 1 : step]
        result.baddbmm_(weight[:, :, tap].expand(len(x), -1, -1), read)
    return result


#: What runs in place of an operator in float64, with the same answer but for rounding.
_FASTER: Mapping[Any, Callable[..., Any]] = {torch.ops.aten.conv1d.default: conv1d}


def hasten(module: fx.GraphModule) -> None:
    """Let a module that runs in float64, and is analyzed no more, use the faster operators."""
    for node in module.graph.nodes:
        node.target = _FASTER.get(node.target, node.target)
    module.recompile()


class Changed(Mapping[str, torch.Tensor]):
    """Tensors that are changed when they are read, and not kept.

    Args:
        state: Tensors by name.
        change: From a name and its tensor to the one that is handed out.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        change: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> None:
        self._state, self._change = state, change

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the changed tensor, a new one each time."""
        return self._change(name, self._state[name])

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a tensor; it is not changed."""
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def doubled(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors in float64, each converted when it is read."""
    return Changed(state, lambda _, tensor: to_double(tensor))


class InDouble(fx.Interpreter):
    """Runs a captured graph in float64 with other tensors, each read at its first use.

    An exported graph names all of its tensors at its top; to read them there would hold all of them
    at once. The tensors may have any precision; none is written to. Unless `double`, the network
    runs in its own precision.
    """

    def __init__(
        self, program: Program, state: Mapping[str, torch.Tensor], *, double: bool = True
    ) -> None:
        super().__init__(program.module)
        self._captured, self._state, self._double = program, state, double
        names = Counter(self._first(n.target) for n in program.graph.nodes if n.op == "get_attr")
        #: What several nodes read is one tensor: they see what one of them writes into it.
        self._shared: dict[str, torch.Tensor | None] = {
            name: None for name, count in names.items() if count > 1
        }

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the network answers, called as the captured module is."""
        bound = inspect.signature(self._captured.module.forward).bind(*args, **kwargs)
        graph = self._captured.graph
        flat = flatten_inputs(graph, list(bound.arguments.values()))
        return graph.process_outputs(super().run(*flat, enable_io_processing=False))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor, still to be read."""
        return _Unread(self._first(target))

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Return the values of arguments; tensors that nobody has read yet are read."""

        def value(node: fx.Node) -> Any:
            if isinstance(self.env[node], _Unread):
                self.env[node] = self._read(self.env[node].name)
            return self.env[node]

        return fx.map_arg(args, value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator."""
        faster = _FASTER.get(target, target) if self._double else target
        return super().call_function(faster, args, kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return an operator's arguments in float64, also where it names another precision."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if not self._double:
            return args, kwargs
        return lifted(args), {**lifted(kwargs), **made_in_double(n)}

    def _first(self, target: Any) -> str:
        return self._captured.canonical.get(str(target), str(target))

    def _read(self, name: str) -> torch.Tensor:
        known = self._shared.get(name)
        if known is not None:
            return known
        own = self._state[name] if name in self._state else self._captured.tensor(name)
        check_values({name: own})
        made: torch.Tensor = to_double(own.detach())
        if not self._double:
            made = own.detach().to(self._captured.tensor(name).dtype)
        # The network may write into what it reads.
        made = made.clone() if made.data_ptr() == own.data_ptr() else made
        if name in self._shared:
            self._shared[name] = made
        return made


class _Unread:
    """Stands for a tensor by its canonical name."""

    def __init__(self, name: str) -> None:
        self.name = name
