"""Tasks: what an output means, what its ensemble answers, and how far another network is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

import fxfuse
from fxfuse import (
    Classification,
    Custom,
    Embedding,
    Match,
    MultiLabel,
    NextToken,
    Refit,
    Regression,
    Task,
)
from fxfuse.errors import FxfuseError, InputError, MemberError, OptionError
from fxfuse.refine.infer_task import infer_task
from fxfuse.refine.task import as_task


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS = [drawn(6, 3, seed=0), drawn(6, 3, seed=1), drawn(6, 3, seed=2)]


# --- What the ensemble answers ------------------------------------------------------------------


def test_an_ensemble_of_classifiers_is_what_the_user_runs():
    """Two members that are sure of different classes, and a third: each rule by hand."""
    p = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.8, 0.1]], [[0.6, 0.3, 0.1]]])
    members = [row.log() + shift for row, shift in zip(p, (0.0, 5.0, -2.0), strict=True)]

    def answer(**options: Any) -> torch.Tensor:
        return Classification(**options).combine(members).exp()

    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(answer(), p.mean(0), **close)
    geometric = p.log().mean(0).exp()
    torch.testing.assert_close(
        answer(combine_by="logits"), geometric / geometric.sum(1, keepdim=True), **close
    )
    torch.testing.assert_close(
        answer(combine_by="vote"), torch.tensor([[2 / 3, 1 / 3, 0.0]]), **close
    )
    weighted = torch.tensor([[0.25 * 0.7 + 0.75 * 0.6, 0.25 * 0.2 + 0.75 * 0.3, 0.1]])
    torch.testing.assert_close(answer(weights=(1.0, 0.0, 3.0)), weighted, **close)
    torch.testing.assert_close(
        answer(weights=(1.0, 0.0, 3.0), combine_by="vote"), torch.tensor([[1.0, 0, 0]]), **close
    )
    # Logits, probabilities and log-probabilities of one network are one network.
    for outputs, given in (("probabilities", p), ("log_probabilities", p.log())):
        found = Classification(outputs=outputs).combine(list(given)).exp()
        torch.testing.assert_close(found, p.mean(0), **close)


def test_votes_of_a_tie_are_shared():
    found = Classification(combine_by="vote").combine([torch.tensor([[1.0, 1.0, 0.0]])])
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0.5, 0.0]]), rtol=0, atol=1e-6)


def test_other_ensembles_by_hand():
    values = [
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[3.0], [4.0]]),
        torch.tensor([[8.0], [0.0]]),
    ]
    assert Regression().combine(values).flatten().tolist() == [4.0, 2.0]
    assert Regression(combine_by="median").combine(values).flatten().tolist() == [3.0, 2.0]
    assert Regression(weights=(1, 1, 0)).combine(values).flatten().tolist() == [2.0, 3.0]
    labels = MultiLabel().combine([torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -2.0]])])
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.0, 1.0)]
    torch.testing.assert_close(labels, torch.tensor([[sum(sigmoid) / 2, 0.5]]))
    vectors = Embedding().combine([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.1]])])
    torch.testing.assert_close(vectors, torch.tensor([[0.5**0.5, 0.5**0.5]]))


# --- How far a network is -----------------------------------------------------------------------

# Each with what members answer.
KINDS: dict[str, tuple[Task, Callable[[int], Any]]] = {
    "logits": (Classification(), lambda seed: drawn(6, 3, seed=seed)),
    "mean of logits": (Classification(combine_by="logits"), lambda seed: drawn(6, 3, seed=seed)),
    "weights": (Classification(weights=(1, 3)), lambda seed: drawn(6, 3, seed=seed)),
    "probabilities": (
        Classification(outputs="probabilities"),
        lambda seed: drawn(6, 3, seed=seed).softmax(1),
    ),
    "log-probabilities": (
        Classification(outputs="log_probabilities"),
        lambda seed: drawn(6, 3, seed=seed).log_softmax(1),
    ),
    "dense": (
        Classification(outputs="probabilities"),
        lambda seed: drawn(6, 3, 10, seed=seed).softmax(1),
    ),
    "dense images": (Classification(), lambda seed: drawn(6, 3, 4, 4, seed=seed)),
    "tokens": (NextToken(), lambda seed: drawn(6, 5, 7, seed=seed)),
    "labels": (MultiLabel(), lambda seed: drawn(6, 4, seed=seed)),
    "labels after a sigmoid": (
        MultiLabel("probabilities"),
        lambda seed: drawn(6, 4, seed=seed).sigmoid(),
    ),
    "values": (Regression(), lambda seed: drawn(6, 4, seed=seed)),
    "a value": (Regression(), lambda seed: drawn(6, seed=seed)),
    "medians": (Regression(combine_by="median"), lambda seed: drawn(6, 4, 5, seed=seed)),
    "vectors": (Embedding(), lambda seed: drawn(6, 8, seed=seed)),
    "vectors of tokens": (Embedding(dim=1), lambda seed: drawn(6, 8, 3, seed=seed)),
    "own": (
        Custom(lambda answers: sum(answers) / len(answers), lambda a, b: (a - b).abs().mean(1)),
        lambda seed: drawn(6, 4, seed=seed),
    ),
    "several": (
        as_task({"boxes": Regression(), "classes": Classification(), "aux": None}),
        lambda seed: {"boxes": drawn(6, 4, seed=seed), "classes": drawn(6, 3, seed=seed + 9)},
    ),
}


def as_answer(task: Task, wanted: Any) -> Any:
    """What a network returns that is the ensemble."""
    if isinstance(wanted, dict):
        return {name: as_answer(task.tasks[name], part) for name, part in wanted.items()}
    if isinstance(task, Classification) and task.outputs == "probabilities":
        return wanted.exp()
    if isinstance(task, MultiLabel) and task.outputs == "logits":
        return wanted.logit()
    return wanted


@pytest.mark.parametrize("name", KINDS)
def test_the_ensemble_is_no_distance_from_itself_and_its_members_are(name: str):
    task, make = KINDS[name]
    members = [make(0), make(1)]
    task.check(members[0])
    wanted = task.target(members, {})
    task = task.prepared(wanted)
    far = task.distance(as_answer(task, wanted), wanted)
    assert far.shape == (6,)
    assert float(far.abs().max()) < 1e-6
    for member in members:
        away = task.distance(member, wanted)
        assert away.shape == (6,)
        assert float(away.min()) > 1e-4
        assert float(task.loss(member, wanted)) > 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_leads_to_the_ensemble(name: str):
    task, make = KINDS[name]
    wanted = task.target([make(0), make(1)], {})
    task = task.prepared(wanted)
    start = make(2)
    leaves = start if isinstance(start, dict) else {"": start}
    moved = {k: nn.Parameter(x.clone()) for k, x in leaves.items()}
    answer = moved if isinstance(start, dict) else moved[""]
    before = float(task.distance(answer, wanted).mean())
    optimizer = torch.optim.SGD(moved.values(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(answer, wanted).backward()
        optimizer.step()
    assert float(task.distance(answer, wanted).mean()) < before


def test_distances_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    far = Classification().distance(q.log() + 3, p.log())
    assert float(far) == pytest.approx(kl, rel=1e-5)
    dense = Classification(outputs="probabilities").distance(
        torch.stack([q, p], 2), torch.stack([p, p], 2).log()
    )
    assert float(dense) == pytest.approx(kl / 2, rel=1e-5)
    binary = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    far = MultiLabel().distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.8, 0.5]]))
    assert float(far) == pytest.approx(binary / 2, rel=1e-5)
    vectors = Embedding().distance(torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(vectors) == pytest.approx(1 - 0.5**0.5, rel=1e-5)
    # Of two outputs, one varies ten times as much: an error of its spread counts as much.
    wanted = torch.tensor([[-1.0, -10.0], [1.0, 10.0]])
    task = Regression().prepared(wanted)
    far = task.distance(wanted + torch.tensor([1.0, 10.0]), wanted)
    assert far.tolist() == pytest.approx([1.0, 1.0])


def test_a_constant_of_all_logits_is_no_difference():
    wanted = Classification().combine(LOGITS)
    shifted = LOGITS[0] + drawn(6, 1, seed=5)
    torch.testing.assert_close(
        Classification().distance(shifted, wanted), Classification().distance(LOGITS[0], wanted)
    )


def test_outputs_count_by_how_far_the_members_are_in_each():
    """One output in metres, one in millimetres: neither outweighs the other."""
    task = as_task({"near": Regression(), "far": Regression()})
    members = [{"near": drawn(6, 2, seed=i), "far": 1000 * drawn(6, 2, seed=i)} for i in (0, 1)]
    wanted = task.combine(members)
    task = task.prepared(wanted, members)
    found = torch.stack([task.distance(member, wanted) for member in members])
    assert float(found.mean()) == pytest.approx(1.0)
    only = {"near": members[0]["near"], "far": wanted["far"]}
    half = float(task.distance(only, wanted).mean())
    assert half == pytest.approx(float(task.distance(members[0], wanted).mean()) / 2, rel=1e-4)


# --- Masks of tokens ----------------------------------------------------------------------------


def test_positions_behind_the_mask_do_not_count():
    members = [drawn(4, 5, 7, seed=0), drawn(4, 5, 7, seed=1)]
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2] = 0
    task = NextToken()
    wanted = task.target(members, {"attention_mask": mask})
    answer = members[0].clone()
    far, loss = task.distance(answer, wanted), task.loss(answer, wanted)
    answer[1, 3:] += drawn(2, 7, seed=3)
    answer[2] *= 9
    assert torch.equal(task.distance(answer, wanted), far)
    assert torch.equal(task.loss(answer, wanted), loss)
    assert float(far[2]) == 0
    # Where it counts, it is the mean over what counts.
    whole = task.target(members, {})
    each = functional.kl_div(
        members[0].log_softmax(-1), whole, reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(far[[0, 3]], each[[0, 3]].mean(1))
    torch.testing.assert_close(far[1], each[1, :3].mean())
    assert not torch.equal(task.distance(answer, whole), far)
    other = NextToken(mask="seen")
    assert torch.equal(other.target(members, {"attention_mask": mask}), whole)
    assert isinstance(other.target(members, {"seen": mask}), dict)
    with pytest.raises(OptionError, match="does not fit") as caught:
        task.target(members, {"attention_mask": mask[:, :4]})
    assert "[4, 4]" in caught.value.why


class Language(nn.Module):
    """A next token from the one before, and a mask that the network does not need."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 9)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * attention_mask.unsqueeze(-1)
        return self.head(self.hidden(x).relu())


def test_masked_positions_count_nowhere_on_the_way():
    """Padding with other tokens changes no distance, and nothing that matching learns."""
    members = [Language(0), Language(1)]
    ids = torch.randint(9, (120, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 3:] = 0
    given = {"ids": ids, "attention_mask": mask}
    example = {name: x[:4] for name, x in given.items()}
    result = fxfuse.fuse(members, example, calibration=given, refine=[Refit(), Match(steps=30)])
    assert result.history is not None
    assert result.history.task.startswith("NextToken()")
    chosen = result.history[result.history.chosen]
    assert chosen.judged <= min(c.judged for c in result.history.starts)
    padded = {"ids": torch.where(mask == 0, 8 - ids, ids), "attention_mask": mask}
    other = fxfuse.fuse(members, example, calibration=padded, refine=[Match(steps=5)])
    same = fxfuse.fuse(members, example, calibration=given, refine=[Match(steps=5)])
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for one, two in zip(same.history.candidates, other.history.candidates, strict=True):
        assert (one.name, one.judged) == (two.name, two.judged)


# --- What a network says of itself --------------------------------------------------------------


class Ends(nn.Module):
    """A layer, and what comes behind it."""

    def __init__(self, end: Callable[[torch.Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.end = layer or nn.Linear(4, 3), end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.layer(x))


FLAT, SIGNAL = drawn(4, 4), drawn(4, 2, 9)


def conv() -> nn.Module:
    return nn.Conv1d(2, 3, 3)


GRAPHS: dict[str, tuple[nn.Module, torch.Tensor, Task]] = {
    "a layer": (Ends(lambda x: x), FLAT, Classification()),
    "softmax": (Ends(lambda x: x.softmax(1)), FLAT, Classification(outputs="probabilities")),
    "softmax of the last": (
        Ends(lambda x: x.softmax(-1)),
        FLAT,
        Classification(outputs="probabilities"),
    ),
    "log-softmax": (
        Ends(lambda x: x.log_softmax(1)),
        FLAT,
        Classification(outputs="log_probabilities"),
    ),
    "softmax at every position": (
        Ends(lambda x: x.softmax(1), conv()),
        SIGNAL,
        Classification(outputs="probabilities"),
    ),
    "softmax, transposed": (
        Ends(lambda x: x.softmax(1).transpose(1, 2), conv()),
        SIGNAL,
        Classification(2, "probabilities"),
    ),
    "softmax, permuted": (
        Ends(lambda x: x.softmax(1).permute(0, 2, 1), conv()),
        SIGNAL,
        Classification(2, "probabilities"),
    ),
    "softmax, cropped": (
        Ends(lambda x: x.softmax(1)[:, :, 2:-2], conv()),
        SIGNAL,
        Classification(outputs="probabilities"),
    ),
    "sigmoid": (Ends(torch.sigmoid), FLAT, MultiLabel("probabilities")),
    "normalised": (Ends(lambda x: functional.normalize(x, dim=-1)), FLAT, Embedding(1)),
    "divided by its norm": (Ends(lambda x: x / x.norm(dim=1, keepdim=True)), FLAT, Embedding(1)),
    "one value": (Ends(lambda x: x, nn.Linear(4, 1)), FLAT, Regression()),
    "values at every position": (Ends(lambda x: x, conv()), SIGNAL, Regression()),
    "tanh": (Ends(torch.tanh), FLAT, Regression()),
    "logits in a mapping": (
        Ends(lambda x: {"logits": x.softmax(1), "hidden": x}),
        FLAT,
        Classification(outputs="probabilities"),
    ),
    "tokens": (
        nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)),
        torch.randint(9, (4, 5)),
        NextToken(),
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_says_what_the_output_means(name: str):
    network, x, task = GRAPHS[name]
    found, why = infer_task(fxfuse.capture(network.eval(), x))
    assert (type(found), found) == (type(task), task)
    assert why


def test_a_network_with_several_outputs_has_to_be_told():
    program = fxfuse.capture(Ends(lambda x: {"first": x, "second": x.tanh()}), FLAT)
    with pytest.raises(OptionError, match="returns 2 tensors") as caught:
        infer_task(program)
    assert "first, second" in caught.value.where
    assert "task={" in caught.value.how


# --- From one end to the other ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed: int, end: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.end = nn.Linear(4, 12), nn.Linear(12, 6), end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.last(self.first(x).relu()))


ENDS: dict[str, tuple[Callable[[torch.Tensor], Any], Any, str]] = {
    "logits": (lambda x: x, None, "Classification()"),
    "vote": (lambda x: x, Classification(combine_by="vote"), "combine_by='vote'"),
    "weights": (lambda x: x, Classification(weights=(1.0, 2.0)), "weights=(1.0, 2.0)"),
    "dense": (
        lambda x: x.unflatten(1, (3, 2)).softmax(1),
        None,
        "Classification(outputs='probabilities')",
    ),
    "labels": (torch.sigmoid, None, "MultiLabel(outputs='probabilities')"),
    "values": (torch.tanh, None, "Regression()"),
    "vectors": (lambda x: functional.normalize(x, dim=1), None, "Embedding(dim=1)"),
    "own": (
        lambda x: x,
        Custom(lambda answers: sum(answers) / len(answers), lambda a, b: (a - b).square().mean(1)),
        "Custom(",
    ),
    "several": (
        lambda x: {"scores": x[:, :4], "box": x[:, 4:], "noise": 1e3 * x.sin()},
        {"scores": Classification(), "box": Regression(), "noise": None},
        "{'scores': Classification(), 'box': Regression()}",
    ),
    "a tuple": (lambda x: (x[:, :3], x[:, 3:]), {"1": Classification()}, "{'1': Classification()}"),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_task_from_one_end_to_the_other(name: str):
    end, task, said = ENDS[name]
    members, x = [Net(0, end).eval(), Net(1, end).eval()], drawn(200, 4)
    result = fxfuse.fuse(
        members, x[:4], calibration=x, task=task, refine=[Refit(), Match(steps=40)]
    )
    history = result.history
    assert history is not None
    assert said in history.task
    best = min(c.judged for c in history.starts)
    assert 0 < history[history.chosen].judged <= best
    assert any(c.accepted for c in history.candidates)
    # What the judge says is the task's own distance on fresh inputs, too, and it is smaller there.
    meant, fresh = (
        as_task(task) or infer_task(fxfuse.capture(members[0], x[:4]))[0],
        drawn(300, 4, seed=9),
    )
    with torch.no_grad():
        answers = [meant.read(member(fresh)) for member in members]
        found = meant.read(result.module(fresh))
    wanted = meant.combine(answers)
    meant = meant.prepared(wanted)
    if hasattr(meant, "scaled"):
        meant = meant.scaled(answers, wanted)
    far = float(meant.distance(found, wanted).mean())
    assert far < min(float(meant.distance(answer, wanted).mean()) for answer in answers)


def test_an_output_that_is_ignored_changes_nothing():
    x, ends = drawn(150, 4), [lambda x: {"a": x, "b": x.exp()}, lambda x: {"a": x, "b": x * 0 + 1}]
    found = [
        fxfuse.fuse(
            [Net(0, end).eval(), Net(1, end).eval()],
            x[:4],
            calibration=x,
            task={"a": Classification(), "b": None},
            refine=[Match(steps=5)],
        )
        for end in ends
    ]
    for name, tensor in found[0].state_dict().items():
        assert torch.equal(tensor, found[1].state_dict()[name])


def test_outputs_are_found_in_objects_tuples_and_outputs_of_outputs():
    output = SimpleNamespace(heads=({"boxes": FLAT}, 3), logits=FLAT[:, :2])
    task = as_task({"heads.0.boxes": Regression(), "logits": Classification()})
    found = task.read(output)
    assert found["heads.0.boxes"] is FLAT
    assert found["logits"] is output.logits


@dataclass
class Boxes:
    scores: torch.Tensor
    boxes: torch.Tensor


@dataclass
class Scene:
    """A dataclass in which there is another."""

    found: Boxes
    nothing: None = None


@dataclass
class SceneOutput(ModelOutput):
    scores: torch.Tensor | None = None
    boxes: torch.Tensor | None = None


class Pair(NamedTuple):
    scores: torch.Tensor
    boxes: torch.Tensor


#: How a network returns two tensors, and the names of both.
FORMS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], str, str]] = {
    "dict": (lambda a, b: {"scores": a, "boxes": b}, "scores", "boxes"),
    "tuple": (lambda a, b: (a, b), "0", "1"),
    "nested": (lambda a, b: [(a,), {"b": b, "n": None}], "0.0", "1.b"),
    "named tuple": (Pair, "scores", "boxes"),
    "dataclass": (lambda a, b: Scene(Boxes(a, b)), "found.scores", "found.boxes"),
    "model output": (SceneOutput, "scores", "boxes"),
}


class Detector(nn.Module):
    """Two heads; `x` is a keyword only."""

    def __init__(self, seed: int, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.scores, self.boxes = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(12, 4)
        self.form = form

    def forward(self, *, x: torch.Tensor, scale: torch.Tensor) -> Any:
        h = (self.body(x) * scale).relu()
        return self.form(self.scores(h), self.boxes(h))


@pytest.mark.parametrize("name", FORMS)
def test_outputs_of_every_form_on_the_whole_way(name: str):
    """By keyword inputs; the form of the output changes nothing in what is fused."""
    inputs = {"x": drawn(120, 4), "scale": drawn(120, 1, seed=1)}
    example = {key: value[:3] for key, value in inputs.items()}

    def members(name: str) -> list[nn.Module]:
        return [Detector(seed, FORMS[name][0]).eval() for seed in range(2)]

    def fused(name: str, **options: Any) -> fxfuse.FusionResult:
        _, scores, boxes = FORMS[name]
        return fxfuse.fuse(
            members(name),
            example,
            calibration=inputs,
            task={scores: Classification(), boxes: Regression()},
            refine=[Refit(), Match(steps=3)],
            **options,
        )

    one, usual = fused(name, size=0.5), fused("dict", size=0.5)
    assert one.history is not None
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, usual.state_dict()[key])
    expected = pytree.tree_leaves(one.module(**inputs))
    assert len(expected) >= 2
    for network in (one.to_module(), fxfuse.compile(one)):
        found = pytree.tree_leaves(network(**inputs))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    own = members(name)
    stacked = pytree.tree_leaves(fxfuse.stack(own, example, reduce="mean")(**inputs))
    each = zip(*(pytree.tree_leaves(member(**inputs)) for member in own), strict=True)
    for found, answers in zip(stacked, each, strict=True):
        if found is not None:
            torch.testing.assert_close(found, sum(answers) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda y: {"out": y}, lambda y: [y], lambda y: [{"a": (y,)}]])
def test_the_only_tensor_of_an_output_is_what_counts(wrap: Callable[[torch.Tensor], Any]):
    """Whatever it is in, and whatever it is called."""
    x = drawn(120, 4)
    results = [
        fxfuse.fuse(
            [Net(0, end).eval(), Net(1, end).eval()],
            x[:4],
            calibration=x,
            refine=[Refit(), Match(steps=3)],
        )
        for end in (wrap, lambda y: y)
    ]
    for name, tensor in results[0].state_dict().items():
        assert torch.equal(tensor, results[1].state_dict()[name])
    assert results[0].history is not None
    assert results[0].history.task == results[1].history.task  # type: ignore[union-attr]


def test_outputs_that_are_not_told_are_named_as_they_are_to_be():
    for form, scores, boxes in FORMS.values():
        members = [Detector(seed, form).eval() for seed in range(2)]
        inputs = {"x": drawn(120, 4), "scale": drawn(120, 1)}
        with pytest.raises(OptionError, match="not clear which") as caught:
            fxfuse.fuse(members, inputs, calibration=inputs)
        assert caught.value.where == f"outputs: {scores}, {boxes}"


# --- Bad input ----------------------------------------------------------------------------------


def told(task: Any, end: Callable[[torch.Tensor], Any] = lambda x: x) -> None:
    members, x = [Net(0, end).eval(), Net(1, end).eval()], drawn(120, 4)
    fxfuse.fuse(members, x[:4], calibration=x, task=task, refine=[Refit(), Match(steps=2)])


BAD: dict[str, tuple[Callable[[], None], type[FxfuseError], str]] = {
    "no sum of one": (
        lambda: told(Classification(outputs="probabilities")),
        OptionError,
        "miss a sum of one",
    ),
    "logs without a sum of one": (
        lambda: told(Classification(outputs="log_probabilities")),
        OptionError,
        "miss a sum of one",
    ),
    "a sum of one along another dimension": (
        lambda: told(
            Classification(2, "probabilities"), lambda x: x.unflatten(1, (3, 2)).softmax(1)
        ),
        OptionError,
        "miss a sum of one",
    ),
    "no such dimension": (lambda: told(Classification(2)), OptionError, "no dimension 2"),
    "the batch's dimension": (lambda: told(Classification(0)), OptionError, "no dimension 0"),
    "the batch's, from behind": (lambda: told(Classification(-2)), OptionError, "no dimension -2"),
    "one class": (
        lambda: told(Classification(), lambda x: x[:, :1]),
        OptionError,
        "there is one class",
    ),
    "no probabilities": (lambda: told(MultiLabel("probabilities")), OptionError, "its values lie"),
    "no vector": (lambda: told(Embedding(3)), OptionError, "no dimension 3"),
    "too many weights": (
        lambda: told(Classification(weights=(1, 2, 3))),
        OptionError,
        "does not fit 2 members",
    ),
    "too few weights": (lambda: told(Regression(weights=(1,))), OptionError, "does not fit 2"),
    "a weight below zero": (
        lambda: told(MultiLabel(weights=(1, -1))),
        OptionError,
        "does not fit 2 members",
    ),
    "no weight": (lambda: told(Embedding(weights=(0, 0))), OptionError, "does not fit 2 members"),
    "an output that is not there": (
        lambda: told({"a": Regression(), "c": Regression()}, lambda x: {"a": x, "b": x}),
        OptionError,
        "no output 'c'",
    ),
    "a place that is not there": (
        lambda: told({"2": Regression()}, lambda x: (x, x)),
        OptionError,
        "no output '2'",
    ),
    "several outputs, not told": (
        lambda: told(None, lambda x: {"a": x, "b": x}),
        OptionError,
        "not clear which",
    ),
    "one task for several outputs": (
        lambda: told(Regression(), lambda x: {"a": x, "b": x}),
        MemberError,
        "not clear which part counts",
    ),
    "all outputs ignored": (lambda: told({"a": None}), OptionError, "unknown task"),
    "no task": (lambda: told("classification"), OptionError, "unknown task"),
    "an unknown word": (
        lambda: told(Classification(outputs="scores")),
        OptionError,
        "unknown outputs 'scores'",
    ),
    "inputs that are compared with each other": (
        lambda: told(None, lambda x: x @ x.mT),
        OptionError,
        "depends on how many inputs are in the batch",
    ),
    "own distance of no inputs": (
        lambda: told(Custom(lambda a: a[0], lambda a, b: (a - b).square().mean())),
        OptionError,
        "not one number for each input",
    ),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_work_starts(name: str):
    call, kind, message = BAD[name]
    with pytest.raises(FxfuseError, match=message) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.how


def test_answers_that_are_not_finite_are_named():
    end: Callable[[torch.Tensor], Any] = lambda x: x / 0.0  # noqa: E731
    with pytest.raises(InputError, match="member 0 answers NaN or infinity"):
        told(Regression(), end)


def test_losses_on_labels_by_hand():
    answer, truth = LOGITS[0], (LOGITS[1] > 0).long()
    found = MultiLabel().label_loss(answer, truth)
    wanted = functional.binary_cross_entropy_with_logits(answer, truth.float(), reduction="none")
    torch.testing.assert_close(found, wanted.mean(1))
    task = Regression().prepared(LOGITS[2])
    squares = (answer - LOGITS[1]).square() / LOGITS[2].var(0, correction=0)
    torch.testing.assert_close(task.label_loss(answer, LOGITS[1]), squares.mean(1))
    one = answer[:, :1]
    torch.testing.assert_close(Regression().label_loss(one, one[:, 0] + 2), torch.full((6,), 4.0))


@pytest.mark.parametrize("task", [MultiLabel(), Regression()])
def test_labels_of_another_shape_are_named(task: Task):
    with pytest.raises(InputError, match="the labels do not fit"):
        task.label_loss(LOGITS[0], torch.zeros(6, 2))


def test_a_label_is_true_or_false():
    with pytest.raises(InputError, match="outside 0 to 1"):
        MultiLabel().label_loss(LOGITS[0], torch.full((6, 3), 2))
