"""Activations that do not fit into memory."""

from __future__ import annotations

import gc
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

import fxfuse
from fxfuse import Refit
from fxfuse.activations import NodeRunner, node_runner, unit_activations
from fxfuse.activations.calibration import Calibration, CalibrationBatches
from fxfuse.activations.spill_store import SpillStore
from fxfuse.refine import refit
from fxfuse.refine.regression import run
from tests.forked import Child
from tests.test_refit import NETWORKS, inputs_for, members_for


def files(store: SpillStore) -> int:
    return 0 if store._folder is None else len(list(store._folder.iterdir()))


def spill(folder: Path) -> None:
    """Stores values in a folder until the process is killed."""
    tempfile.tempdir = str(folder)
    store = SpillStore(memory=0)
    stored = store.put([torch.ones(1000)])
    print(store._folder, flush=True)
    time.sleep(600)
    del stored


def test_what_a_killed_process_left_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = [Child(spill, tmp_path) for _ in range(3)]
    killed, alive, interrupted = (Path(child.first_line()) for child in children)
    assert {killed, alive, interrupted} < set(tmp_path.iterdir())
    children[0].send_signal(signal.SIGKILL)
    children[2].send_signal(signal.SIGINT)
    children[0].ended()
    children[2].ended()
    assert killed.is_dir()
    assert not interrupted.exists()
    (tmp_path / "fxfuse-spill-link").symlink_to(Path.home())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = SpillStore(memory=0)
    kept = ours.put([torch.ones(3)])
    other = SpillStore(memory=0)
    also = other.put([torch.zeros(3)])
    assert torch.equal(kept[0], also[0] + 1)
    assert not killed.exists()
    assert alive.is_dir()
    children[1].send_signal(signal.SIGKILL)
    children[1].ended()
    del ours, kept, other, also
    SpillStore(memory=0).put([torch.ones(3)])
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["fxfuse-spill-link"]


def test_values_that_do_not_fit_are_written_and_read():
    base = torch.randn(4, 6)
    values = [base, (base.bfloat16(), 3), base.t()[1:3], base[:1].expand(50, 6), 7]
    store = SpillStore(memory=100)
    stored = store.put(values)
    # The first takes 96 bytes; a view counts as what it is a view of, a number as nothing.
    assert (store.left, files(store)) == (4, 3)
    assert stored[4] == 7
    assert stored[1][1] == 3
    assert torch.equal(stored[1][0], base.bfloat16())
    for found, value in ((stored[0], base), (stored[2], values[2]), (stored[3], values[3])):
        assert torch.equal(found, value)
    assert stored[2].untyped_storage().nbytes() == values[2].nbytes
    stored.free_all()
    assert (store.left, files(store)) == (100, 0)


def test_never_more_than_one_value_is_there_beside_what_is_kept():
    alive: list[int] = []

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive.remove(id(self))

    def made() -> torch.Tensor:
        assert len(alive) <= 1
        tensor = torch.zeros(100).as_subclass(Counted)
        alive.append(id(tensor))
        return tensor

    class Dropping(SpillStore):
        def keep(self, value: torch.Tensor) -> int:
            return len(value)

    assert list(Dropping().put(made() for _ in range(5))) == [100] * 5


def test_a_lane_keeps_its_budget():
    model, x = members_for("ResNet", 1)[0], inputs_for("ResNet")
    graph = fxfuse.analyze(model, x[:4])
    given = Calibration(x, augmentations=0)
    calibration = CalibrationBatches.of(graph.program, given, shuffle=False)
    (last,) = graph.program.outputs()
    runner = NodeRunner(
        graph.program, graph.program.state(), calibration, memory=300_000, held=[last]
    )
    for node in runner.nodes:
        runner.run_to(node)
        assert 0 <= runner.store.left <= 300_000
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(runner.value(last))), model(x))
    runner.drop(last)
    assert (runner.store.left, files(runner.store)) == (300_000, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_refit_in_little_memory_is_the_same(name: str):
    members, x = members_for(name), inputs_for(name, 120)
    states = []
    for memory in (2**30, 0):
        result = fxfuse.fuse(members, x[:4])
        report = refit(result, members, x, Refit(memory=memory))
        states.append((result.state_dict(), report.layers))
    assert states[0][1] == states[1][1]
    for tensor, again in zip(states[0][0].values(), states[1][0].values(), strict=True):
        assert torch.equal(tensor, again)


def test_normalisations_are_fitted_to_a_sample(monkeypatch: pytest.MonkeyPatch):
    members, x = members_for("transformer"), inputs_for("transformer")
    fits = []
    for rows in (run.ROWS, 500):
        monkeypatch.setattr(run, "ROWS", rows)
        report = refit(fxfuse.fuse(members, x[:4]), members, x)
        fits.append(next(fit for fit in report.layers if fit.weight == "blocks.0.norm1.weight"))
    # 1,500 rows, or a third of them.
    assert fits[0].before != fits[1].before
    assert fits[0].fitted
    assert fits[1].fitted
    assert fits[1].before == pytest.approx(fits[0].before, rel=0.1)
    assert fits[1].after == pytest.approx(fits[0].after, rel=0.1)


def test_units_are_measured_in_little_memory(monkeypatch: pytest.MonkeyPatch):
    members, x = members_for("ResNet"), inputs_for("ResNet")
    graph = fxfuse.analyze(members[0], x[:4])
    calibration = CalibrationBatches.of(graph.program, x)
    states = [member.state_dict() for member in members]
    found = unit_activations(graph, states, calibration)
    monkeypatch.setattr(node_runner, "SpillStore", lambda _: SpillStore(0))
    again = unit_activations(graph, states, calibration)
    for name, tensors in found.items():
        assert all(map(torch.equal, tensors, again[name]))
