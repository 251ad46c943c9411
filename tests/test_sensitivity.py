"""What a refit weighs its rows by: how much the task depends on what stands there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.graph.capture import capture
from fxfuse.refine import refit
from fxfuse.refine.regression.place import Place
from fxfuse.refine.regression.sensitivity import _CONVOLUTIONS, Sensitivity, drawn
from fxfuse.refine.task import (
    Classification,
    Embedding,
    MultiLabel,
    NextToken,
    Outputs,
    Regression,
    Task,
)


class Padded(nn.Module):
    """Tokens are mixed with weights of a mask, so that padding reaches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.relu_(self.first(x))
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.second(mean)


def scores_of(network: nn.Module, inputs: tuple[Tensor, ...], operator: str, task: Task) -> Tensor:
    program = capture(network, tuple(x[:2] for x in inputs))
    batches = CalibrationBatches.plain(inputs, len(inputs[0]))
    runner = NodeRunner(program, program.state(), batches)
    node = next(n for n in program.graph.nodes if operator in str(n.target))
    place = Place(node, -1)
    return Sensitivity(task, 0).scores(runner, 0, [place])[0][place]


def test_padding_counts_nothing_and_all_inputs_count_alike():
    torch.manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [4], [3]])).float()
    inputs = (torch.randn(4, 6, 5), mask)
    score = scores_of(Padded().eval(), inputs, "linear", Classification())
    assert score.shape == (24,)
    assert torch.isfinite(score).all()
    assert torch.equal(score.reshape(4, 6) > 0, mask > 0)
    torch.testing.assert_close(score.mean(), torch.tensor(1.0))


def test_positions_that_the_output_depends_on_count_more():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.where(torch.arange(20) == 7, 10.0, 0.1)
            return self.second(torch.tanh(self.first(x))) * scale[:, None]

    torch.manual_seed(0)
    inputs = (torch.randn(8, 20, 4),)
    score = scores_of(Positions().eval(), inputs, "linear", Regression()).reshape(8, 20)
    others = torch.arange(20) != 7
    assert (score[:, 7] > 3 * score[:, others].amax(1)).all()


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (Classification(), (4, 3)),
        (Classification(dim=1, outputs="probabilities"), (4, 3, 5)),
        (NextToken(), (4, 5, 7)),
        (MultiLabel(), (4, 3)),
        (MultiLabel("probabilities"), (4, 3)),
        (Regression(), (4, 3)),
        (Embedding(), (4, 3)),
        (Outputs({"a": Regression(), "b": Classification()}), (4, 3)),
    ],
    ids=lambda value: str(value) if isinstance(value, Task) else "",
)
def test_a_probe_of_every_task_has_a_gradient(task: Task, shape: tuple[int, ...]):
    torch.manual_seed(0)
    leaf = torch.randn(*shape)
    if getattr(task, "outputs", "") == "probabilities":
        leaf = leaf.softmax(1)
    leaf.requires_grad_()
    answer = dict.fromkeys(task.tasks, leaf) if isinstance(task, Outputs) else leaf
    task.probe(answer, {}, torch.Generator().manual_seed(0)).backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert float(leaf.grad.abs().sum()) > 0


def test_the_mean_of_probes_is_the_fisher_information():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, dtype=torch.double, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(4, 4, dtype=torch.double)
    for _ in range(4000):
        (g,) = torch.autograd.grad(Classification().probe(logits, {}, generator), logits)
        total += g[0, :, None] * g[0, None, :]
    p = logits.detach()[0].softmax(0)
    torch.testing.assert_close(total / 4000, torch.diag(p) - p[:, None] * p, atol=0.02, rtol=0)


def test_positions_that_do_not_count_have_no_gradient():
    logits, mask = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[1, 1, 0], [1, 0, 0]])
    NextToken().probe(logits, {"attention_mask": mask}, torch.Generator().manual_seed(0)).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(2) > 0, mask > 0)


def test_rows_that_count_more_are_drawn_more_often_and_stand_for_fewer():
    scores = torch.tensor([0.0] * 10 + [0.5] * 80 + [6.0] * 10)
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(100)
    for _ in range(300):
        rows, ratio = drawn(scores / scores.mean(), 20, generator)
        assert len(rows) == len(rows.unique()) == 20
        seen[rows] += 1
    assert seen[:10].sum() == 0
    assert seen[90:].mean() > 3 * seen[10:90].mean()
    assert float(ratio[95]) < float(ratio[50]) / 3
    rows, _ = drawn(scores, 500, generator)
    assert torch.equal(rows.sort().values, torch.arange(10, 100))


def test_a_refit_does_not_look_at_padding():
    """What stands in padding changes nothing of the refit."""
    torch.manual_seed(0)
    members = [Padded().eval() for _ in range(2)]
    mask = (torch.arange(6)[None] < torch.randint(1, 6, (200, 1))).float()
    x = torch.randn(200, 6, 5)
    garbage = torch.where(mask[..., None] > 0, x, 100 * torch.randn(200, 6, 5))
    found = []
    for given in (x, garbage):
        result = fxfuse.fuse(members, (x[:2], mask[:2]), verify=False)
        refit(result, members, (given, mask), task=Classification())
        found.append(result.module.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])


def test_where_there_is_no_derivative_rows_count_alike_and_it_is_said():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(torch.special.zeta(h.abs() + 2, h.abs() + 1)).mean(1)

    torch.manual_seed(0)
    members, x = [Counted().eval() for _ in range(2)], torch.randn(200, 8, 4)
    result = fxfuse.fuse(members, x[:4], verify=False)
    with pytest.warns(UserWarning, match="all positions count alike in the refit: member 0 has no"):
        report = refit(result, members, x, task=Classification())
    assert any(fit.fitted for fit in report.layers)


@pytest.mark.parametrize("dilation", [[3], [1, 2]])
def test_the_gradient_of_a_dilated_convolution_is_torchs_own(dilation):
    space = len(dilation)
    operator = getattr(torch.ops.aten, f"conv{space}d").default
    shapes = ((2, 3, *[12] * space), (4, 3, *[3] * space), (4,))
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for padding in ([0], [2]):
        given = []
        for each in (operator, _CONVOLUTIONS[operator]):
            own = x.clone().requires_grad_()
            answer = each(own, weight, bias, [1], padding, dilation)
            given.append((answer, *torch.autograd.grad(answer.square().sum(), own)))
        torch.testing.assert_close(given[1], given[0])
