"""Networks on calibration inputs: inputs, layers as rows, lanes, targets, elimination."""

from __future__ import annotations

import importlib
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from benchmarks.plain_models import NETWORKS
from fxfuse import Calibration, Refit, Transplant
from fxfuse.activations import NodeRunner, elimination, unit_activations
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.elimination import eliminate
from fxfuse.activations.layers import layers_of
from fxfuse.errors import InputError, OptionError
from fxfuse.refine.targets import Targets
from tests.models import excite
from tests.nets import SmallResNet

aten = torch.ops.aten


def images(n: int = 120) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """One layer of every kind that can be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 6, (3, 2), padding="same", dilation=(2, 1))
        self.grouped = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.back = nn.ConvTranspose2d(8, 4, (3, 2), (2, 3), (1, 2), (1, 0), dilation=(1, 2))
        self.flat_back = nn.ConvTranspose1d(4, 8, 2, padding=1, bias=False)
        self.parted_back = nn.ConvTranspose1d(8, 12, 3, stride=2, groups=4)
        self.line = nn.Conv1d(12, 5, 3, padding="valid")
        self.linear = nn.Linear(5, 7)
        self.transposed = nn.Parameter(torch.randn(7, 6))
        self.shift = nn.Parameter(torch.randn(6))
        self.last = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.same(x)).relu()).relu()
        x = self.parted_back(self.flat_back(self.back(x).flatten(2)))
        x = self.linear(self.line(x).mean(2))
        return torch.addmm(self.shift, x, self.transposed) @ self.last


def test_layers_are_rows_times_a_matrix():
    model = Layers().double().eval()
    program = fxfuse.capture(model, images(4).double())
    layers = layers_of(program)
    assert [layer.weight for layer in layers] == [
        *(f"{n}.weight" for n in ("same", "grouped", "depthwise")),
        *(f"{n}.weight" for n in ("back", "flat_back", "parted_back", "line", "linear")),
        "transposed",
        "last",
    ]
    state = program.state()
    runner = NodeRunner(program, state, CalibrationBatches.of(program, images().double()))
    for layer in layers:
        runner.held.add(layer.input)
        runner.run_to(layer.node)
        y = runner.value(layer.node)[0]
        chosen = torch.randperm(layer.n_rows(y))[:40]
        matrix = layer.matrix(state[layer.weight])
        rows = layer.input_rows(runner.value(layer.input)[0], chosen)
        answer = torch.einsum("ngf,gfo->ngo", rows, matrix).flatten(1)
        if layer.bias:
            answer = answer + state[layer.bias]
        torch.testing.assert_close(answer, layer.output_rows(y)[chosen])
        weight = state[layer.weight]
        torch.testing.assert_close(layer.weight_of(matrix, weight), weight)


def test_weights_that_are_used_twice_make_no_layer():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(self.twice(self.once(x)).relu())

    program = fxfuse.capture(Twice(), torch.randn(3, 4))
    assert [layer.weight for layer in layers_of(program)] == ["once.weight"]


def test_a_lane_computes_what_the_network_does_and_frees_what_is_read():
    model = excite(SmallResNet(), images(4))
    program = fxfuse.capture(model, images(4))
    alone = Calibration(images(), augmentations=0)
    calibration = CalibrationBatches.of(program, alone, batch=50, shuffle=False)
    assert [len(args[0]) for args, _ in calibration.batches] == [50, 50, 20]
    runner = NodeRunner(program, program.state(), calibration)
    (output,) = program.outputs()
    runner.run_to(output)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(runner.value(output))), model(images()))
    tensors = [n for n in runner.values if isinstance(n.meta.get("val"), torch.Tensor)]
    assert len([n for n in tensors if n.op == "call_function"]) <= 2


def test_targets_are_the_kept_units_of_the_members():
    members = [excite(SmallResNet(), images(4)) for _ in range(3)]
    result = fxfuse.fuse(members, images(4))
    graph, plan = result.graph, result.plan
    calibration = CalibrationBatches.of(graph.program, images())
    held = set(graph.program.graph.nodes)
    runners = [NodeRunner(graph.program, m.state_dict(), calibration, held=held) for m in members]
    (output,) = graph.program.outputs()
    for runner in runners:
        runner.run_to(output)
    targets, seen = Targets(graph, plan), 0
    for layer in layers_of(graph.program):
        values = [runner.value(layer.node)[0] for runner in runners]
        merged = targets.merge(layer.node, values)
        place = (layer.weight, layer.facts.outputs)
        for group in graph.group_of.get(place, ()):
            unit_map, rows = plan.map_of(group.name), group.index[place]
            for target, member, unit in zip(
                unit_map.target, unit_map.member, unit_map.unit, strict=True
            ):
                for to, source in zip(rows[target], rows[unit], strict=True):
                    ours, theirs = (layer.channels_last(t) for t in (merged, values[member]))
                    torch.testing.assert_close(ours[..., to], theirs[..., source])
                    seen += 1
    assert seen > 20
    mean = torch.stack([runner.value(output)[0] for runner in runners]).mean(0)
    torch.testing.assert_close(targets.merge(output, [x.value(output)[0] for x in runners]), mean)


def test_unit_activations_are_what_the_reader_gets():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(150, 4)
    graph = fxfuse.analyze(model, x[:3])
    found = unit_activations(
        graph, [model.state_dict()], CalibrationBatches.of(graph.program, x, shuffle=False)
    )
    torch.testing.assert_close(found["0.weight:0"][0], model[:2](x).detach())


def test_units_of_heads_and_flattened_images_are_blocks_and_rows():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * 16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1))

    model = Flat().eval()
    graph = fxfuse.analyze(model, images(4))
    alone = Calibration(images(110), augmentations=0)
    calibration = CalibrationBatches.of(graph.program, alone, shuffle=False)
    found = unit_activations(graph, [model.state_dict()], calibration)["conv.weight:0"][0]
    assert found.shape == (110 * 16, 5)
    with torch.no_grad():
        pooled = nn.functional.max_pool2d(model.conv(images(110)).relu(), 2)
    torch.testing.assert_close(found, pooled.flatten(2).movedim(1, 2).flatten(0, 1))


def test_units_that_no_layer_reads():
    """A weight that is used twice makes no layer; its units are taken where they stand."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(self.twice(self.first(x)).relu()).tanh().sum(1, keepdim=True)

    model, x = Twice().eval(), torch.randn(150, 4)
    graph = fxfuse.analyze(model, x[:3])
    (group,) = graph.groups
    found = unit_activations(
        graph, [model.state_dict()] * 2, CalibrationBatches.of(graph.program, x, shuffle=False)
    )
    with torch.no_grad():
        expected = model.twice(model.twice(model.first(x)).relu()).tanh()
    torch.testing.assert_close(found[group.name][1], expected)


def brute_force(covariance: torch.Tensor, weights: torch.Tensor, kept: list[int]) -> float:
    """The least squared error of the outputs when only `kept` inputs are there."""
    full = (weights.T @ covariance @ weights).trace()
    inner, cross = covariance[kept][:, kept], covariance[kept] @ weights
    return float(full - (cross.T @ torch.linalg.solve(inner, cross)).trace())


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("collected", [1, 6, 128])
def test_each_step_of_the_elimination_is_the_cheapest(width, collected, monkeypatch):
    """However many columns are collected before the matrices are written."""
    monkeypatch.setattr(importlib.import_module(eliminate.__module__), "_COLLECTED", collected)
    generator = torch.Generator().manual_seed(3)
    n = 8 * width
    x = torch.randn(400, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    weights = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    covariance = x.T @ x / 400
    exist = np.ones(8, dtype=bool)
    exist[2] = False
    ranks, losses = eliminate(covariance, weights @ weights.T, width, exist)
    assert ranks[2] == -1
    # The ridge is a share of the mean of all neurons.
    ridged = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(n)
    kept = np.flatnonzero(exist).tolist()
    there = neurons_of(kept, width)
    ridged, weights = ridged[there][:, there], weights[there]

    def cost_of(units):
        return brute_force(ridged, weights, [there.index(k) for k in neurons_of(units, width)])

    before = 0.0
    for step, unit in enumerate(np.argsort(ranks).tolist()[1:-1]):
        costs = {u: cost_of([k for k in kept if k != u]) for u in kept}
        assert unit == min(costs, key=costs.__getitem__)
        assert losses[step] == pytest.approx(costs[unit] - before)
        before = costs[unit]
        kept.remove(unit)


def neurons_of(units: list[int], width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


@pytest.mark.parametrize("together", [2048, 8])
def test_a_copy_of_a_unit_goes_before_any_other(together, monkeypatch):
    """What members have in common counts once; also where a group is divided into blocks."""
    monkeypatch.setattr(importlib.import_module(eliminate.__module__), "_MOST", together)
    members = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(2)]
    members[1].load_state_dict(members[0].state_dict())
    x = torch.randn(300, 4)
    graph = fxfuse.analyze(members[0], x[:3])
    states = [m.state_dict() for m in members]
    kept = {i: {g.name: np.arange(g.n_units) for g in graph.groups} for i in range(2)}
    found = elimination(graph, states, CalibrationBatches.of(graph.program, x), kept)
    units, rank = found["0.weight:0"]
    left = units[np.argsort(-rank)[:6], 1]
    assert sorted(left.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(120, 3, 9, 8), "the wrong shape"),
        (torch.randn(120, 3, 8, 8).double(), "the wrong dtype"),
        (torch.full((120, 3, 8, 8), torch.nan), "not finite"),
        ((torch.randn(120, 3, 8, 8),) * 2, "differ in structure"),
        ([], "no calibration inputs"),
        (7, "holds no calibration inputs"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, message: str):
    program = fxfuse.capture(excite(SmallResNet(), images(4)), images(4))
    with pytest.raises(InputError, match=message) as caught:
        CalibrationBatches.of(program, inputs)
    assert caught.value.how


def test_few_inputs_are_warned_of():
    program = fxfuse.capture(excite(SmallResNet(), images(4)), images(4))
    with pytest.warns(UserWarning, match="20 calibration inputs are few"):
        CalibrationBatches.of(program, images(20))


def test_as_many_inputs_as_are_allowed():
    program = fxfuse.capture(excite(SmallResNet(), images(4)), images(4))
    assert CalibrationBatches.of(program, Calibration(images(1500), limit=1500)).size == 1500
    endless = itertools.repeat(images(50))
    with pytest.warns(UserWarning, match=r"the first 150 calibration inputs are used"):
        assert CalibrationBatches.of(program, Calibration(endless, limit=150)).size == 150
    with pytest.raises(OptionError, match="limit must be at least 1, got 0"):
        Calibration(images(4), limit=0)


def test_copies_are_looked_at_beside_the_inputs():
    """The measured values are those of inputs and copies, and a wrong copy would show."""
    model = SmallResNet()
    program = fxfuse.capture(model, images(2))
    x, labels = images(150), torch.zeros(150)
    calibration = CalibrationBatches.of(
        program, Calibration([(x, labels)], augmentations=2), shuffle=False
    )
    assert (calibration.size, len(calibration.labels)) == (150, 2)
    seen = calibration.with_copies
    assert (seen.size, seen.augmentations, seen.labels) == (450, 0, ())
    assert [len(args[0]) for args, _ in seen.batches] == 3 * [128, 22]
    parts = torch.cat([args[0] for args, _ in seen.batches]).split(150)
    assert torch.equal(parts[0], x)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(parts, 2))
    again = CalibrationBatches.of(program, Calibration(x, augmentations=2), shuffle=False)
    assert all(
        torch.equal(a[0][0], b[0][0])
        for a, b in zip(seen.batches, again.with_copies.batches, strict=True)
    )
    runner = NodeRunner(program, program.state(), calibration)
    last = list(program.graph.nodes)[-1]
    runner.run_to(last.all_input_nodes[0])
    answers = torch.cat(list(runner.value(last.all_input_nodes[0])))
    torch.testing.assert_close(answers, model.eval()(torch.cat(parts)))


def test_a_part_keeps_its_copies_and_gradients_have_none():
    program = fxfuse.capture(SmallResNet(), images(2))
    labelled = [(images(120), torch.zeros(120, dtype=torch.long))]
    calibration = CalibrationBatches.of(program, Calibration(labelled, augmentations=1))
    fitting, choosing = calibration.split(0.25)
    assert (fitting.size, choosing.size) == (90, 30)
    assert (fitting.with_copies.size, choosing.with_copies.size) == (180, 60)
    members = [SmallResNet(), SmallResNet()]
    plans = [
        fxfuse.fuse(
            members,
            images(2),
            calibration=Calibration(labelled, augmentations=copies),
            refine=[],
            method=Transplant(score=score),
        ).plan
        for score in ("taylor", "obs")
        for copies in (0, 1)
    ]
    units = [[(m.member.tolist(), m.unit.tolist()) for m in plan.maps] for plan in plans]
    assert units[0] == units[1]
    assert units[2] != units[3]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(4, 2), torch.randn(120, 4)),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.randint(5, (120, 3))),
    ],
)
def test_no_copies_are_made_of_other_inputs(module: nn.Module, inputs: torch.Tensor):
    program = fxfuse.capture(module, inputs[:2])
    with pytest.raises(InputError, match="cannot be augmented"):
        CalibrationBatches.of(program, Calibration(inputs, augmentations=1))
    with pytest.raises(OptionError, match="augmentations must be at least 0, got -1"):
        Calibration(inputs, augmentations=-1)


def test_batches_with_labels_and_parts():
    program = fxfuse.capture(excite(SmallResNet(), images(4)), images(4))
    batches = [(images(60), torch.arange(60)), (images(60), torch.arange(60))]
    calibration = CalibrationBatches.of(program, batches, batch=100, shuffle=False)
    assert calibration.size == 120
    assert [len(labels) for labels in calibration.labels] == [100, 20]
    fitting, choosing = calibration.split(0.25)
    assert (fitting.size, choosing.size) == (90, 30)
    joined = torch.cat([a[0] for part in (fitting, choosing) for a, _ in part.batches])
    torch.testing.assert_close(joined, torch.cat([images(60)] * 2))


def test_keyword_batches_with_labels():
    """As loaders of text give them, in pairs or under a key that is no input of the network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, *, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(x)

    x, labels = torch.randn(120, 4), torch.arange(120) % 3
    program = fxfuse.capture(Net().eval(), {"x": x[:2]})
    for given in ({"x": x, "labels": labels}, [{"x": x, "label": labels}], [({"x": x}, labels)]):
        calibration = CalibrationBatches.of(program, given, shuffle=False)
        assert torch.equal(torch.cat(calibration.labels), labels)
        assert calibration.batches[0][1].keys() == {"x"}
    tokens = CalibrationBatches.of(program, {"x": x, "labels": labels[:, None].expand(-1, 5)})
    assert tokens.labels == ()
    # A network that was captured with labels takes them as an input.
    program = fxfuse.capture(Net().eval(), {"x": x[:2], "labels": labels[:2]})
    taken = CalibrationBatches.of(program, {"x": x, "labels": labels})
    assert taken.batches[0][1].keys() == {"x", "labels"}
    assert taken.labels == ()


def test_sorted_inputs_are_shuffled_with_their_labels():
    program = fxfuse.capture(excite(SmallResNet(), images(4)), images(4))
    x, labels = images(2000), torch.arange(2000)
    with pytest.warns(UserWarning, match=r"1,000 of 2,000 calibration inputs are used"):
        calibration = CalibrationBatches.of(
            program, [(x[:900], labels[:900]), (x[900:], labels[900:])]
        )
    taken = torch.cat(calibration.labels)
    assert calibration.size == len(taken.unique()) == 1000
    assert int((taken >= 1000).sum()) > 400
    torch.testing.assert_close(torch.cat([args[0] for args, _ in calibration.batches]), x[taken])


def test_an_activation_that_is_nan_is_named():
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.log(self.first(x)))

    members = [Logarithm() for _ in range(2)]
    for m in members:
        nn.init.constant_(m.first.bias, 9.0)
    result = fxfuse.fuse(members, torch.rand(4, 4))
    with pytest.raises(InputError, match="an activation of member 0 is NaN") as caught:
        fxfuse.refine.refit(result, members, torch.full((200, 4), -100.0))
    assert "aten.log" in caught.value.where


def test_what_memory_held_before_it_was_written_is_no_activation():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            y = torch.cat([torch.empty_like(h), h.new_empty(h.shape)])[: len(h)]
            y[:, :3] = h[:, :3].relu()
            y[:, 3:] = h[:, 3:].tanh()
            return self.last(y)

    members, x = [Parts() for _ in range(2)], torch.randn(200, 4)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        result = fxfuse.fuse(members, x[:4], calibration=x, refine=[fxfuse.Refit()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.refit is not None
    assert not any("empty" in str(node.target) for node in result.module.graph.nodes)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.22, 0.45), (56.0, 115.0)])
def test_inputs_that_are_not_normalised_as_in_training_are_named(scale: float, offset: float):
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    members = [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
        for _ in range(2)
    ]
    for member in members:
        with torch.no_grad():
            for _ in range(30):
                member.train()(x)
        member.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxfuse.fuse(members, x[:4], calibration=x * scale + offset, refine=[Refit()])
    told = [str(w.message) for w in caught if "like those of the training" in str(w.message)]
    assert len(told) == (scale != 1)
    assert all("at batch_norm" in text and "Normalise" in text for text in told)


@pytest.mark.filterwarnings("ignore:layers are")
def test_nodes_stay_with_their_edges():
    """Calls whose tensors have no dimension in common are fitted as they are."""
    build, inputs = NETWORKS["gcn"]
    members = [excite(build(), inputs()).eval() for _ in range(2)]
    calls = [(torch.randn(8, 7), inputs()[1]) for _ in range(12)]
    batches = CalibrationBatches.of(fxfuse.capture(members[0], inputs()), calls)
    assert batches.undivided
    first, second = batches.split(0.25)
    assert (len(first.batches), len(second.batches)) == (9, 3)
    assert all(args[0].shape == (8, 7) and args[1].shape == (2, 12) for args, _ in first.batches)
    options = {"calibration": calls, "task": fxfuse.Classification()}
    result = fxfuse.fuse(members, inputs(), refine=[fxfuse.Refit()], **options)
    assert result.module(*calls[0]).shape == (8, 5)
    with pytest.raises(InputError, match="these calls cannot be divided"):
        fxfuse.fuse(members, inputs(), refine=[fxfuse.Match(steps=1)], **options)


def test_a_tensor_for_all_inputs_leaves_them_divided():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer(mask @ x).mean(1)

    x, mask = torch.randn(120, 4, 6), torch.rand(4, 4)
    program = fxfuse.capture(Masked(), (x[:3], mask))
    batches = CalibrationBatches.of(program, (x, mask), batch=60)
    assert not batches.undivided
    assert [args[0].shape[0] for args, _ in batches.batches] == [60, 60]
    assert all(torch.equal(args[1], mask) for args, _ in batches.batches)
