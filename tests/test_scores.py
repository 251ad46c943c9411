"""Importance scores, each against its definition written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Transplant
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.gradients import gradients
from fxfuse.errors import InputError, OptionError, RuleError
from fxfuse.graph.capture import capture_eagerly
from fxfuse.planning.scores import check_score, degree_of, note_of, score, scores
from tests.fusing import activations
from tests.nets import images, resnets
from tests.options import planned, scored


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(7, 4), torch.randint(3, (7,))) for _ in range(n)]


def whole(graph: fxfuse.CouplingGraph, n: int) -> dict[int, dict[str, np.ndarray]]:
    return {i: {g.name: np.arange(g.n_units) for g in graph.groups} for i in range(n)}


def scored_members(
    members: list[nn.Module], x: torch.Tensor, options: dict[str, Any]
) -> dict[int, dict[str, np.ndarray]]:
    program = [fxfuse.capture(m, x) for m in members]
    graph = fxfuse.analyze(program[0])
    return scored(graph, [c.state() for c in program], whole(graph, len(members)), **options)


def test_registered_scores():
    assert set(scores()) == {"l1", "l2", "bn_scale", "activation", "obs", "taylor", "fisher"}
    with pytest.raises(RuleError, match="twice"):
        score("l2")(lambda *_: {})
    with pytest.raises(OptionError, match="activation, bn_scale, fisher, l1, l2, obs, taylor"):
        check_score("l3")
    assert (degree_of("l1"), degree_of("l2")) == (1, 2)
    with pytest.raises(OptionError, match="not a norm of weights"):
        degree_of("taylor")


@pytest.mark.parametrize(("name", "degree"), [("l1", 1), ("l2", 2)])
def test_norms(name: str, degree: int):
    members = [mlp(), mlp()]
    found = scored_members(members, torch.randn(3, 4), {"score": name})
    for i, m in enumerate(members):
        own, reader = m[2].weight.detach().abs(), m[4].weight.detach().abs()
        # The output layer of the concatenation is scaled by 1/N.
        expected = (own**degree).sum(1) + ((reader / 2) ** degree).sum(0)
        np.testing.assert_allclose(found[i]["2.weight:0"], expected, rtol=1e-5)


def test_bn_scale():
    members = resnets(2)
    found = scored_members(members, images(), {"score": "bn_scale"})
    for i, m in enumerate(members):
        inner = m.block1.bn1.weight.detach().abs()
        np.testing.assert_allclose(found[i]["block1.conv1.weight:0"], inner, rtol=1e-6)
        stream = sum(n.weight.detach().abs() for n in (m.bn, m.block1.bn2, m.block2.bn2))
        np.testing.assert_allclose(found[i]["stem.weight:0"], stream, rtol=1e-6)


class PartlyNormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu())


def test_groups_without_a_normalisation_fall_back_and_the_plan_says_so():
    members, x = [PartlyNormalised(), PartlyNormalised()], torch.randn(3, 4)
    found, by_norm = (scored_members(members, x, {"score": s}) for s in ("bn_scale", "l2"))
    for i, m in enumerate(members):
        scale = m.norm.weight.detach().abs()
        np.testing.assert_allclose(found[i]["first.weight:0"], scale, rtol=1e-6)
        assert (found[i]["second.weight:0"] == by_norm[i]["second.weight:0"]).all()
    plan = fxfuse.fuse(members, x, method=Transplant(score="bn_scale")).plan
    assert plan.options == {"score": "bn_scale", "scored by l2": "second.weight:0"}
    assert "scored by l2 `second.weight:0`" in plan.summary()
    graph = fxfuse.analyze(resnets(1)[0], images())
    assert note_of("bn_scale", graph) == {}


def test_activation_is_the_root_mean_square():
    members, x = [mlp(), mlp()], torch.randn(50, 4)
    program = [fxfuse.capture(m, x) for m in members]
    graph, states = fxfuse.analyze(program[0]), [c.state() for c in program]
    options = {"score": "activation", "activations": activations(graph, states, x)}
    found = scored(graph, states, whole(graph, 2), **options)
    for i, m in enumerate(members):
        answers = m[0](x).detach()
        expected = answers.pow(2).mean(0).sqrt()
        np.testing.assert_allclose(found[i]["0.weight:0"], expected, rtol=1e-5)


# --- gradients ---


def by_autograd(model: nn.Module, given: list[Any]) -> dict[str, torch.Tensor]:
    """The gradient of each batch, stacked, by parameter name."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, labels in given:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        for name, parameter in model.named_parameters():
            found[name].append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def test_gradients_are_those_of_autograd():
    model, given = mlp(), batches()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = gradients(fxfuse.capture(model, torch.randn(3, 4)), given)
    for name, each in by_autograd(model, given).items():
        torch.testing.assert_close(found.mean[name], each.mean(0))
        torch.testing.assert_close(found.square[name], each.pow(2).mean(0))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_in_eval_mode_whatever_the_model_is_in():
    model = resnets(1)[0]
    given = [(images(), torch.randint(4, (4,))) for _ in range(2)]
    expected = by_autograd(model, given)
    program = fxfuse.capture(model.train(), images())
    found = gradients(program, given)
    for name, each in expected.items():
        torch.testing.assert_close(found.mean[name], each.mean(0))
    assert model.training


def test_gradients_of_a_network_that_is_only_traced():
    model, given = mlp(), batches()
    with torch.no_grad():
        traced = capture_eagerly(model, torch.randn(3, 4), refusal="asked for")
    found = gradients(traced, given)
    for name, each in by_autograd(model, given).items():
        torch.testing.assert_close(found.mean[name], each.mean(0))


def test_tied_weights_have_one_gradient():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
            self.inner = nn.Linear(6, 6)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.words(x)).tanh().mean(1))

    model = Tied()
    given = [(torch.randint(5, (7, 3)), torch.randint(5, (7,)))]
    found = gradients(fxfuse.capture(model, torch.zeros(2, 3, dtype=torch.long)), given)
    expected = by_autograd(model, given)
    assert found.mean.keys() == expected.keys()
    torch.testing.assert_close(found.mean["words.weight"], expected["words.weight"][0])


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_damage_by_the_gradient(name: str):
    members, given = [mlp(), mlp()], batches()
    program = [fxfuse.capture(m, torch.randn(3, 4)) for m in members]
    options = {"score": name, "gradients": [gradients(c, given) for c in program]}
    graph, states = fxfuse.analyze(program[0]), [c.state() for c in program]
    found = scored(graph, states, whole(graph, 2), **options)
    for i, m in enumerate(members):
        each = by_autograd(m, given)
        damage = {}
        for tensor, gradient in each.items():
            weight = m.get_parameter(tensor).detach()
            if name == "taylor":
                damage[tensor] = (weight * gradient.mean(0)).abs()
            else:
                damage[tensor] = (weight * gradient).pow(2).mean(0)
        expected = damage["0.weight"].sum(1) + damage["0.bias"] + damage["2.weight"].sum(0)
        np.testing.assert_allclose(found[i]["0.weight:0"], expected, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(scores()))
@pytest.mark.parametrize("variant", [None, "iterative", "hierarchical"])
def test_every_score_chooses_units(name: str, variant: str | None):
    members, x = resnets(3), images()
    program = [fxfuse.capture(m, x) for m in members]
    graph, states = fxfuse.analyze(program[0]), [c.state() for c in program]
    given = [(images(), torch.randint(4, (4,)))]
    options = dict(
        name,
        variant,
        calibration=CalibrationBatches.of(graph.program, torch.cat([images()] * 30)),
        activations=activations(graph, states),
        gradients=[gradients(c, given) for c in program],
    )
    plan = planned(graph, states, "transplant", **options)
    values = scored(graph, states, whole(graph, 3), **options)
    for unit_map in plan.maps:
        pairs = list(zip(unit_map.member.tolist(), unit_map.unit.tolist(), strict=True))
        assert len(set(pairs)) == unit_map.n_units
        if variant is None:
            kept = min(values[i][unit_map.group][u] for i, u in pairs)
            everything = np.concatenate([values[i][unit_map.group] for i in range(3)])
            assert (everything > kept).sum() < unit_map.n_units


def test_units_that_are_gone_do_not_count():
    """Weights towards them are left out, and they never win."""
    members = [mlp()]
    program = fxfuse.capture(members[0], torch.randn(3, 4))
    graph = fxfuse.analyze(program)
    kept = {0: {"0.weight:0": np.array([0, 2]), "2.weight:0": np.array([1, 3, 4])}}
    found = scored(graph, [program.state()], kept, "l1")[0]
    assert np.isneginf(found["2.weight:0"][[0, 2]]).all()
    weight, reader = members[0][2].weight.detach(), members[0][4].weight.detach()
    expected = weight[:, [0, 2]].abs().sum(1) + reader.abs().sum(0)
    np.testing.assert_allclose(found["2.weight:0"][[1, 3, 4]], expected[[1, 3, 4]], rtol=1e-5)


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("activation", "score 'activation' needs calibration inputs"),
        ("obs", "score 'obs' needs calibration inputs"),
        ("taylor", "score 'taylor' needs labelled calibration inputs"),
        ("fisher", "score 'fisher' needs labelled calibration inputs"),
    ],
)
def test_scores_without_what_they_need(name: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        fxfuse.fuse(resnets(2), images(), method=Transplant(score=name))
    assert "calibration=" in caught.value.how


def test_gradients_of_too_few_members():
    program = fxfuse.capture(mlp(), torch.randn(3, 4))
    options = {"score": "taylor", "gradients": [gradients(program, batches())]}
    with pytest.raises(InputError, match="passed for 1 members"):
        scored_members([mlp(), mlp()], torch.randn(3, 4), options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(7, 4), "labels are missing"),
        ((torch.randn(7, 4),), "labels are missing"),
        ((torch.randn(7, 4), None), "labels are missing"),
        ((torch.randn(7, 4), torch.zeros(5, dtype=torch.long)), "a labelled batch does not fit"),
        ((torch.randn(7, 4), torch.full((7,), 3)), "a labelled batch does not fit"),
        ((torch.randn(7, 5), torch.zeros(7, dtype=torch.long)), "a labelled batch does not fit"),
        (
            (torch.full((7, 4), float("nan")), torch.zeros(7, dtype=torch.long)),
            "loss .* is not finite",
        ),
    ],
)
def test_batches_that_are_no_good(batch: Any, message: str):
    program = fxfuse.capture(mlp(), torch.randn(3, 4))
    with pytest.raises(InputError, match=message):
        gradients(program, [batch])


def test_no_batches():
    with pytest.raises(InputError, match="no labelled calibration inputs"):
        gradients(fxfuse.capture(mlp(), torch.randn(3, 4)), [])
