"""The Dynamo backend: members of an ensemble run as one, answer the same and train the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import fxfuse
from fxfuse.errors import OptionError
from fxfuse.runtime import StackBranches, fxfuse_backend

aten = torch.ops.aten
ALWAYS = {"backend": "aot_eager", "always": True}


class Mlp(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(0, (1, -1)).unflatten(2, (-1, 1)).expand(-1, -1, -1, 4)
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(
            (0, 3)
        )


class Ensemble(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], how: str = "mean", n: int = 3) -> None:
        super().__init__()
        self.members, self.how = nn.ModuleList(make() for _ in range(n)), how

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 2.0  # what all members share
        answers = [member(x) for member in self.members]
        if self.how == "mean":
            return torch.stack(answers).mean(0)
        if self.how == "sum":
            return sum(answers) / len(answers)
        if self.how == "vote":
            return torch.stack([a.softmax(-1) for a in answers]).amax(0)
        return answers


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[PassResult]:
    """What every run of the pass did."""
    seen: list[PassResult] = []
    original = StackBranches.call

    def call(self: StackBranches, graph_module: fx.GraphModule) -> PassResult:
        seen.append(original(self, graph_module))
        return seen[-1]

    monkeypatch.setattr(StackBranches, "call", call)
    torch._dynamo.reset()
    return seen


def loss(answer: Any) -> torch.Tensor:
    tensors = [answer] if isinstance(answer, torch.Tensor) else answer
    return sum((t.square() * (i + 1)).sum() for i, t in enumerate(tensors))


def count(result: PassResult, target: Any) -> int:
    return sum(node.target is target for node in result.graph_module.graph.nodes)


@pytest.mark.parametrize("how", ["mean", "sum", "vote", "list"])
def test_answers_and_gradients_are_the_same(passes: list[PassResult], how: str):
    torch.manual_seed(0)
    ensemble = Ensemble(Mlp, how).double()
    compiled = torch.compile(ensemble, backend=fxfuse_backend, options=ALWAYS, fullgraph=True)
    for batch in (4, 7):
        x = torch.randn(batch, 5, dtype=torch.float64)
        expected, found = ensemble(x), compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        own = torch.autograd.grad(loss(expected), list(ensemble.parameters()))
        new = torch.autograd.grad(loss(found), list(ensemble.parameters()))
        torch.testing.assert_close(new, own, rtol=1e-10, atol=1e-10)
    assert passes[0].modified
    # Six layers became two products.
    assert (count(passes[0], aten.bmm.default), count(passes[0], aten.linear.default)) == (2, 0)


def test_training_steps_are_the_same(passes: list[PassResult]):
    torch.manual_seed(0)
    ensemble = Ensemble(Mlp).double()
    twin = copy.deepcopy(ensemble)
    compiled = torch.compile(twin, backend=fxfuse_backend, options=ALWAYS)
    x = torch.randn(4, 5, dtype=torch.float64)
    for module, own in ((ensemble, ensemble), (compiled, twin)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(module(x)).backward()
            optimizer.step()
    for a, b in zip(twin.parameters(), ensemble.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert passes[0].modified


@pytest.mark.parametrize("make", [Mlp, lambda: Ensemble(Mlp, "mean", 1)])
def test_no_branches_no_change(passes: list[PassResult], make: Callable[[], nn.Module]):
    module = make()
    received: list[fx.GraphModule] = []

    def inner(graph_module: fx.GraphModule, inputs: Any) -> Any:
        received.append(graph_module)
        return graph_module.forward

    def outer(graph_module: fx.GraphModule, inputs: Any) -> Any:
        torch._dynamo.backends.registry._COMPILER_FNS["kept"] = inner
        torch._dynamo.backends.registry._BACKENDS["kept"] = None
        try:
            return fxfuse_backend(graph_module, inputs, options={"backend": "kept", "always": True})
        finally:
            torch._dynamo.backends.registry._COMPILER_FNS.pop("kept")
            torch._dynamo.backends.registry._BACKENDS.pop("kept")
            handed.append(graph_module)

    handed: list[fx.GraphModule] = []
    x = torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(module, backend=outer)(x), module(x))
    assert not passes[0].modified
    # The very graph that Dynamo made.
    assert received[0] is handed[0]


def test_members_that_differ_are_no_members(passes: list[PassResult]):
    """One activation, one constant or one order of arguments is enough."""

    class Different(nn.Module):
        def __init__(self, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.a, self.b, self.other = nn.Linear(5, 5), nn.Linear(5, 5), other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = torch.sigmoid(self.a(x)) - x
            return torch.stack([first, self.other(self.b(x))]).mean(0)

    x = torch.randn(4, 5)
    for other in (
        lambda y: torch.tanh(y) - x.to(y),
        lambda y: x.to(y) - torch.sigmoid(y),
        lambda y: torch.sigmoid(y * 2.0) - x.to(y),
    ):
        torch._dynamo.reset()
        module = Different(other)
        compiled = torch.compile(module, backend=fxfuse_backend, options=ALWAYS)
        torch.testing.assert_close(compiled(x), module(x))


def test_batch_statistics_stay_the_members_own(passes: list[PassResult]):
    """In training a batch norm writes into its statistics: such a graph is left alone."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    torch.manual_seed(0)
    ensemble = Ensemble(make).double()
    twin = copy.deepcopy(ensemble)
    x = torch.randn(6, 5, dtype=torch.float64)
    compiled = torch.compile(twin, backend=fxfuse_backend, options=ALWAYS)
    torch.testing.assert_close(compiled(x), ensemble(x))
    for (name, a), b in zip(twin.named_buffers(), ensemble.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not passes[0].modified
    torch.testing.assert_close(compiled.eval()(x), ensemble.eval()(x))
    assert passes[-1].modified


def test_convolutions_and_attention(passes: list[PassResult]):
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    for make, shape in ((Conv, (2, 2, 5, 5)), (Attention, (4, 5))):
        torch._dynamo.reset()
        torch.manual_seed(0)
        ensemble = Ensemble(make).double().eval()
        x = torch.randn(shape, dtype=torch.float64)
        compiled = torch.compile(ensemble, backend=fxfuse_backend, options=ALWAYS)
        torch.testing.assert_close(compiled(x), ensemble(x), rtol=1e-12, atol=1e-12)
    assert passes[0].modified


def test_a_number_that_all_members_read(passes: list[PassResult]):
    """A tensor without dimensions has no batch to look at."""

    class Scaled(Ensemble):
        def __init__(self) -> None:
            super().__init__(Mlp)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([member(x) * self.scale for member in self.members]).mean(0)

    torch.manual_seed(0)
    ensemble, x = Scaled(), torch.randn(4, 5)
    compiled = torch.compile(ensemble, backend=fxfuse_backend, options=ALWAYS)
    torch.testing.assert_close(compiled(x), ensemble(x))
    assert passes[0].modified


def test_what_pays_decides(passes: list[PassResult]):
    """Weights that are inputs would be put together at every call, which was measured to cost."""
    torch.manual_seed(0)
    ensemble = Ensemble(Mlp)
    x = torch.randn(2, 5)
    compiled = torch.compile(ensemble, backend=fxfuse_backend, options={"backend": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ensemble(x))
        # The graph was not even traced.
        assert not passes
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=True):
            torch.testing.assert_close(compiled(x), ensemble(x))
    assert passes[-1].modified


def test_regions_are_left_alone(passes: list[PassResult]):
    class Region(Ensemble):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = x * 3.0
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    module = Region(Mlp)
    x = torch.randn(4, 5)
    compiled = torch.compile(module, backend=fxfuse_backend, options=ALWAYS)
    torch.testing.assert_close(compiled(x), module(x))
    assert not passes


def test_the_entry_point_leads_here():
    (found,) = entry_points(group="torch_dynamo_backends", name="fxfuse")
    assert found.load() is fxfuse_backend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "nobody"}, "unknown backend 'nobody'"),
        ({"backend": "fxfuse"}, "unknown backend 'fxfuse'"),
        ({"backend": "eager", "max_autotune": True}, "takes no options"),
        ({"max_autotun": True}, "unknown option 'max_autotun'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    module = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(OptionError, match=message):
        fxfuse_backend(module, [torch.randn(2, 2)], options=options)


def test_the_pass_on_a_captured_graph():
    """The same pass in one's own pipeline, where the weights are tensors of the module."""
    torch.manual_seed(0)
    ensemble = Ensemble(Mlp).eval()
    x = torch.randn(4, 5)
    module = fxfuse.capture(ensemble, x).module
    assert StackBranches(always=True)(module).modified
    torch.testing.assert_close(module(x), ensemble(x))
    assert sum(node.target is aten.bmm.default for node in module.graph.nodes) == 2
