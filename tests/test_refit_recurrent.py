"""The closed-form refit of recurrent layers: gates of kept units, on the network's own states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Refit, Regression, Size, Transplant
from fxfuse.refine import finetune, refit
from tests.nets import mean_of
from tests.options import flat, unjudged
from tests.test_refit import distance

#: Kinds of recurrent layers, and how each is built.
KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.1}),
    "LSTM projected": (nn.LSTM, {"num_layers": 2, "proj_size": 5, "bias": False}),
    "GRU both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "GRU without bias": (nn.GRU, {"bias": False}),
    "RNN": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Sequences(nn.Module):
    """Steps embedded, one recurrent node, mean over the steps, head."""

    def __init__(self, kind: str, *, batch_first: bool = True, hidden: int = 10) -> None:
        super().__init__()
        layer, options = KINDS[kind]
        self.embed = nn.Linear(6, 8)
        self.rnn = layer(8, hidden, batch_first=batch_first, **options)
        for weight in self.rnn.parameters():
            weight.data *= 2
        size = options.get("proj_size", hidden)
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(directions * size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.embed(x).relu()
        steps = steps if self.rnn.batch_first else steps.transpose(0, 1)
        answer, _ = self.rnn(steps)
        return self.head(answer.mean(1 if self.rnn.batch_first else 0))


def members(kind: str, n: int = 2, *, same: bool = False, **options: Any) -> list[nn.Module]:
    found = []
    for seed in range(n):
        torch.manual_seed(0 if same else seed)
        found.append(Sequences(kind, **options).eval())
    return found


def inputs(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 7, 6, generator=torch.Generator().manual_seed(seed))


#: What has an equation of its own; the others are tried nightly.
FEW = ("LSTM projected", "GRU both ways")


@pytest.mark.parametrize(
    "kind",
    [k if k in FEW else pytest.param(k, marks=pytest.mark.nightly) for k in KINDS],
)
def test_a_forgotten_layer_is_found_again(kind: str):
    """Only the right equations, from the right states in the right order, give the member back."""
    networks, x = members(kind, same=True, batch_first="both" not in kind), inputs(200)
    result = fxfuse.fuse(networks, x[:4], verify=False, method="average")
    with torch.no_grad():
        for name, weight in result.module.named_parameters():
            if name.startswith("rnn"):
                weight.copy_(torch.randn_like(weight))
    assert distance(result.module, networks, x) > 1e-1
    refit(result, networks, x, Refit(alpha=1e-7))
    assert distance(result.module, networks, inputs(100, seed=5)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        pytest.param("LSTM both ways", None, marks=pytest.mark.nightly),
        ("GRU both ways", 0.5),
        pytest.param("LSTM projected", 1.5, marks=pytest.mark.nightly),
        pytest.param("RNN relu", 0.5, marks=pytest.mark.nightly),
    ],
)
def test_a_refit_brings_it_close_and_makes_no_layer_worse(kind: str, width: float | None):
    networks, x, fresh = members(kind), inputs(300), inputs(200, seed=9)
    mixing = "joint" if width else None
    result = fxfuse.fuse(networks, x[:4], verify=False, size=Size(width, mixing=mixing))
    before = distance(result.module, networks, fresh)
    report = refit(result, networks, x, task=Regression())
    assert distance(result.module, networks, fresh) < 0.5 * before
    assert all(fit.after <= fit.before for fit in report.layers), report.layers
    layers = {n for n, _ in networks[0].named_parameters() if "weight_ih" in n}
    fits = {fit.weight: fit for fit in report.layers}
    assert all(fits[name].fitted and fits[name].after < fits[name].before for name in layers)


@pytest.mark.nightly
def test_a_network_of_twice_the_width_is_the_mean_already():
    networks, x = members("RNN relu"), inputs(200)
    result = fxfuse.fuse(
        networks,
        x[:4],
        calibration=x,
        size=Size(2, mixing="joint"),
        refine=[Refit()],
        method=Transplant(score="l2"),
    )
    assert result.refit is not None
    assert all(fit.after < 1e-9 for fit in result.refit.layers), result.refit.layers


def test_layers_that_should_stay_and_cells_are_left():
    networks, x = members("RNN"), inputs(200)
    frozen = fxfuse.fuse(
        networks,
        x[:4],
        calibration=unjudged(x),
        refine=[Refit()],
        constraints=Constraints(freeze=["rnn.bias_hh_l0"]),
        method=Transplant(score="l2"),
    ).refit
    assert frozen is not None
    assert {fit.why for fit in frozen.layers if fit.weight.startswith("rnn")} == {
        "an option asked for rnn.bias_hh_l0 to stay"
    }

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(x.shape[0], 8)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state)

    loops: list[nn.Module] = [Loop().eval(), Loop().eval()]
    report = fxfuse.fuse(
        loops, x[:4], calibration=unjudged(x), refine=[Refit()], method=Transplant(score="l2")
    ).refit
    assert report is not None
    assert {name for name in report.left if "weight" in name} == {
        "cell.weight_ih",
        "cell.weight_hh",
    }


def test_obs_sees_what_recurrent_layers_read():
    """A unit that is never awake before them goes; a state that the next step alone reads stays."""
    networks, x = members("RNN"), inputs(200)
    with torch.no_grad():
        net = networks[1]
        net.embed.bias[3] = -100
        net.embed.weight[3] *= 5
        net.rnn.weight_ih_l0[:, 3] *= 5
        net.head.weight[:, 4] = 0
        net.rnn.weight_hh_l0[:, 4] *= 10
    told: dict[str, Any] = {"width": 0.3, "verify": False, "mixing": "joint"}
    kept = {}
    for score in ("l2", "obs"):
        looked_at = {"calibration": x} if score == "obs" else {}
        plan = fxfuse.fuse(networks, x[:4], **flat(score=score, **looked_at, **told)).plan
        kept[score] = {m.group.split(".")[0]: m.units().tolist() for m in plan.maps}
    assert [1, 3] in kept["l2"]["embed"]
    assert [1, 3] not in kept["obs"]["embed"]
    assert [1, 4] in kept["obs"]["rnn"]


def test_every_head_keeps_its_recurrent_layer():
    """A head of one member aims at that member alone."""
    networks, x = members("RNN"), inputs(300)
    told: dict[str, Any] = {"example": x[:4], "heads": ["rnn", "head"]}
    plainly = fxfuse.fuse(networks, **flat(**told)).module
    result = fxfuse.fuse(networks, **flat(refit=True, calibration=x, **told))
    with torch.no_grad():
        for member, before, after in zip(networks, plainly(x), result.module(x), strict=True):
            wanted = member(x)
            assert (after - wanted).square().mean() < 0.2 * (before - wanted).square().mean()


def test_rows_of_digits():
    """Specialists on sequences of 8 rows of pixels: the refit takes them to their ensemble."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    networks: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = Rows()
        own = (((labels < 5) == (seed == 0)) | (torch.rand(len(x)) < 0.1)) & (
            torch.arange(len(x)) < 1300
        )
        order = own.nonzero().flatten().repeat(8)
        order = order[torch.randperm(len(order))]
        batches = list(zip(x[order].split(32), labels[order].split(32), strict=True))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        finetune(net, batches, steps=len(batches), optimizer=optimizer, progress=False)
        networks.append(net.eval())

    def correct(answers: torch.Tensor) -> float:
        return float((answers.argmax(1) == labels[1300:]).float().mean())

    fresh = x[1300:]
    with torch.no_grad():
        ensemble = correct(mean_of(networks, fresh))
        best = max(correct(member(fresh)) for member in networks)
        plainly = correct(fxfuse.fuse(networks, x[:4]).module(fresh))
        result = fxfuse.fuse(
            networks, x[:4], calibration=x[:500], refine=[Refit()], method=Transplant(score="l2")
        )
        refitted = correct(result.module(fresh))
    assert ensemble > best + 0.1
    assert plainly < ensemble - 0.1
    assert refitted > ensemble - 0.03
