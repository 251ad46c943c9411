"""The closed-form refit, and `auto`, at widths other than a member's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import fx, nn

import fxfuse
from fxfuse import Match, Refit, Regression, Size, Transplant
from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.analysis.labels import AbstractTensor
from fxfuse.errors import OptionError
from fxfuse.refine import refit
from fxfuse.refine.regression.counterpart import counterparts
from fxfuse.refine.regression.fit_target import routes_of
from fxfuse.refine.targets import Targets
from fxfuse.transform.resizing import resized_of
from tests.nets import Samples, SmallResNet
from tests.options import unjudged
from tests.test_refit import Depthwise, Transformer, distance


class Flat(nn.Module):
    """Two branches side by side, flattened with their pixels before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.hidden = nn.BatchNorm2d(10), nn.Linear(10 * 4, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.head(self.hidden(nn.functional.max_pool2d(x, 4).flatten(1)).relu())


class Shuffled(nn.Module):
    """A channel shuffle between grouped convolutions, beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.first = nn.Conv2d(12, 12, 1, groups=3)
        self.second, self.head = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.first(x).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2).relu()
        return self.head((x + self.second(y)).relu().mean((2, 3)))


#: Networks without an operator that mixes members.
PLAIN = {
    "ResNet": (SmallResNet, (3, 8, 8)),
    "depthwise": (Depthwise, (3, 8, 8)),
    "flat": (Flat, (3, 8, 8)),
}
NETWORKS = {
    **PLAIN,
    "shuffled": (Shuffled, (3, 6, 6)),
    "transformer": (Transformer, (5, 6)),
}


SAMPLES = Samples(NETWORKS, 200)
inputs_for, members_for = SAMPLES.inputs, SAMPLES.members


@pytest.mark.parametrize(
    ("name", "n"), [("ResNet", 3), ("depthwise", 2), ("flat", 3), ("shuffled", 2)]
)
def test_targets_stand_where_the_wide_network_has_the_units(name: str, n: int):
    """With every unit of every member, the target of each node is what the wide network computes.

    Each node on its own: a wrong order at one of them cannot be made up for by another one.
    """
    members, x = members_for(name, n), inputs_for(name, 6)
    result = fxfuse.fuse(members, x, size=Size(n, mixing="joint"))
    graph, resized = result.graph, resized_of(result.graph, result.plan)
    assert resized is not None
    nodes = [node for node, value in graph.values.items() if isinstance(value, AbstractTensor)]
    nodes = [node for node in nodes if node.op == "call_function" and node in resized.nodes]
    with pytest.warns(UserWarning, match="few"):
        calibration = CalibrationBatches.of(graph.program, x)
    runners = [NodeRunner(graph.program, m.state_dict(), calibration, held=nodes) for m in members]
    student = NodeRunner(
        graph.program,
        result.state_dict(),
        calibration,
        held=resized.nodes.values(),
        graph=resized.graph,
        constants=resized.constants,
    )
    targets, compared = Targets(graph, result.plan, resized.layouts), 0
    for node in nodes:
        for runner in runners:
            runner.run_to(node)
        student.run_to(resized.nodes[node])
        wanted = targets.merge(node, [runner.value(node)[0] for runner in runners])
        if wanted is not None:
            torch.testing.assert_close(student.value(resized.nodes[node])[0], wanted)
            compared += 1
    assert compared > 0.8 * len(nodes), (compared, len(nodes))


@pytest.mark.parametrize("name", PLAIN)
def test_the_wide_network_stays_what_it_is(name: str):
    """It is the members' mean already, so every error is rounding and no fit is kept."""
    members, x = members_for(name), inputs_for(name)
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        size=2,
        refine=[Refit()],
        method=Transplant(score="l2"),
    )
    assert result.refit is not None
    assert all(fit.after < 1e-9 for fit in result.refit.layers), result.refit.layers
    assert distance(result.module, members, inputs_for(name, seed=5)) < 1e-10


@pytest.mark.parametrize("width", [1.5, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_what_the_student_can_represent_is_found(name: str, width: float):
    """Identical members, all units of one of them and more: the network is that member."""
    members, x = members_for(name, same=True), inputs_for(name)
    plain = fxfuse.fuse(
        members, x[:4], size=Size(width, mixing="joint"), method=Transplant(fraction=1 - 1 / width)
    )
    before = distance(plain.module, members, x)
    report = refit(plain, members, x, Refit(alpha=1e-5))
    assert all(fit.after < 1e-6 for fit in report.layers), report.layers
    assert before > 1e-2 or width == 2
    assert distance(plain.module, members, inputs_for(name, seed=5)) < 1e-5


@pytest.mark.parametrize(
    ("name", "width"),
    [*itertools.product(PLAIN, (0.5, 1.5)), ("transformer", 0.5)],
)
def test_no_layer_gets_worse_on_the_sample(name: str, width: float):
    members, x = members_for(name), inputs_for(name)
    result = fxfuse.fuse(members, x[:4], size=Size(width, mixing="joint"))
    before = distance(result.module, members, x)
    report = refit(result, members, x, task=Regression())
    assert all(fit.after <= fit.before for fit in report.layers), report.layers
    assert {fit.weight for fit in report.layers if fit.fitted}
    assert distance(result.module, members, inputs_for(name, seed=9)) < 0.5 * before


def test_both_ways_to_refit_are_one():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    one = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        size=1.5,
        refine=[Refit()],
        method=Transplant(score="l2"),
    )
    other = fxfuse.fuse(members, x[:4], size=1.5)
    refit(other, members, x)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(one.module(x), other.module(x))


def trained(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A classifier of points into eight clouds, and fresh points with their classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 10, generator=generator)
    labels = torch.randint(8, (2000,), generator=generator)
    points = centres[labels] + 0.5 * torch.randn(2000, 10, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points[:1000]), labels[:1000]).backward()
        optimizer.step()
    return model.eval(), points, labels


def test_a_refit_makes_half_the_width_work():
    (first, points, labels), (second, *_) = trained(0), trained(1)
    members, x = [first, second], points[:500]

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(points[1000:]).argmax(1) == labels[1000:]).double().mean())

    found = {
        fitted: accuracy(
            fxfuse.fuse(
                members, x[:4], calibration=unjudged(x), size=0.5, refine=[Refit()][: int(fitted)]
            ).module
        )
        for fitted in (False, True)
    }
    best = max(map(accuracy, members))
    assert found[True] > best - 0.05, (found, best)
    assert found[True] > found[False] + 0.1, (found, best)


def test_a_network_narrower_than_a_member_starts_from_the_refitted_one():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    result = fxfuse.fuse(members, x[:4], calibration=x, size=0.5, refine=[Refit(), Match(steps=20)])
    assert result.history is not None
    assert result.match is not None
    assert result.history.candidates[0].name == "refitted"
    assert "the only start" in str(result.history)
    assert result.plan.options["start"] == "refitted"
    assert dict(result.module.named_parameters())["stem.weight"].shape[0] == 4
    assert result.history[result.history.chosen].judged <= result.history["refitted"].judged


def test_a_members_width_has_every_start():
    members, x = members_for("flat"), inputs_for("flat")
    result = fxfuse.fuse(members, x[:4], calibration=x, size=1, refine=[Refit(), Match(steps=5)])
    assert result.history is not None
    assert {c.name for c in result.history.starts} == {"member 0", "member 1"}
    assert not math.isnan(result.history["refitted"].judged)


def test_alignment_stays_at_a_members_width():
    members, x = members_for("flat"), inputs_for("flat", 4)
    with pytest.raises(OptionError, match="weight_matching"):
        fxfuse.fuse(members, x, size=0.5, method="weight_matching")


def test_members_that_run_one_by_one_need_no_refit():
    members, x = members_for("flat"), inputs_for("flat")
    with pytest.raises(OptionError, match=r"nothing to refit(.|\n)*exactly their mean"):
        refit(fxfuse.fuse(members, x[:4], size=2), members, x)


def test_a_layer_without_a_counterpart_is_left_and_named():
    """The weight of a grouped convolution before a shuffle is read in another order there."""
    members, x = members_for("shuffled"), inputs_for("shuffled")
    result = fxfuse.fuse(members, x[:4], size=Size(2, mixing="joint"))
    before = result.state_dict()
    report = refit(result, members, x)
    missing = {fit.weight for fit in report.layers if "other operators" in fit.why}
    assert missing == {"first.weight"}
    assert missing <= set(report.left)
    assert all(torch.equal(result.state_dict()[name], before[name]) for name in missing)
    assert {fit.weight for fit in report.layers} == {
        *missing,
        "stem.weight",
        "second.weight",
        "head.weight",
    }


def test_operators_in_between_belong_to_the_way():
    """An index before the sum, as the rewriting of an order puts it there, is on the way."""
    graph = fxfuse.analyze(members_for("ResNet", 1)[0], inputs_for("ResNet", 4))
    program = graph.program
    copy, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(program.graph, nodes))
    routes = routes_of(program)
    route = next(r for r in routes if r.skip is not None)
    output, aim = nodes[route.output], nodes[route.aim]
    with copy.inserting_before(aim):
        order = copy.get_attr("order")
        between = copy.call_function(torch.ops.aten.index_select.default, (output, 1, order))
    aim.replace_input_with(output, between)
    own, operators, _, missing = counterparts(program, nodes, routes, ())
    assert (operators, missing) == ([], [])
    found = own[routes.index(route)]
    assert found.chain == (*(nodes[n] for n in route.chain), between)
    assert (found.skip, found.aim) == (nodes[route.skip], aim)
    assert found.cut == route.cut
