"""The examples run, and do what they say."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch

from examples import distill_with_accelerate, distill_with_trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
#: What the Trainer of Lightning is told to leave out.
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("main", "length"),
    [(distill_with_trainer.main, {"steps": 60}), (distill_with_accelerate.main, {"epochs": 15})],
    ids=["Trainer", "Accelerate"],
)
def test_distilling_with_loops_of_hugging_face(main, length) -> None:
    found = main(**length)
    members = max(found["member 0"], found["member 1"])
    assert found["ensemble"] > members + 5
    assert found["fused, distilled"] > members + 5


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_the_checkpoints_of_lightning_become_one() -> None:
    pytest.importorskip("lightning")
    found = importlib.import_module("examples.fuse_with_lightning").main(epochs=4)
    assert found["members"] == 3
    assert found["fused"] > found["last"] - 5
    assert found["distilled"] > found["last"] - 5


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_lightning_distils_the_ensemble(weight: float) -> None:
    """Each step is the one that the mixed loss asks for, and the module is as before."""
    pl = pytest.importorskip("lightning.pytorch")
    from fxfuse.api.lightning import DistilMembers

    class Logged(importlib.import_module("examples.fuse_with_lightning").Digits):
        def training_step(self, batch, index):
            return {"loss": super().training_step(batch, index), "kept": 1}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = torch.randn(8, 8, 8), torch.arange(8)
    members, module = [Logged().net for _ in range(2)], Logged()
    wanted = copy.deepcopy(module.net)
    mean = torch.stack([member(x) for member in members]).mean(0)
    soft = (mean / 2).softmax(1) * ((mean / 2).log_softmax(1) - (wanted(x) / 2).log_softmax(1))
    own = torch.nn.functional.cross_entropy(wanted(x), y)
    ((1 - weight) * own + weight * 4 * soft.sum() / len(x)).backward()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter -= 0.1 * parameter.grad
    before = [copy.deepcopy(member.state_dict()) for member in members]
    trainer = pl.Trainer(
        max_steps=1,
        callbacks=[DistilMembers(members, network="net", weight=weight, temperature=2.0)],
        **QUIET,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8))
    torch.testing.assert_close(module.net.state_dict(), wanted.state_dict())
    assert "training_step" not in vars(module)
    for member, state in zip(members, before, strict=True):
        assert member.training
        torch.testing.assert_close(member.state_dict(), state, rtol=0, atol=0)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_the_callback_of_lightning_says_what_it_needs(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from fxfuse.api.lightning import DistilMembers, FuseCheckpoints
    from fxfuse.errors import MemberError, OptionError

    module = importlib.import_module("examples.fuse_with_lightning").Digits()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 8, 8), torch.zeros(8, dtype=torch.int64)), 4
    )
    x, other, keep = torch.randn(2, 8, 8), type(module)().net, pl.callbacks.ModelCheckpoint
    for callbacks, error, said in (
        ([FuseCheckpoints(x, network="net")], OptionError, "nothing keeps checkpoints"),
        ([FuseCheckpoints(x, network="nothing")], OptionError, "has no network 'nothing'"),
        ([keep(tmp_path), FuseCheckpoints(x, network="net")], MemberError, "needs 2"),
        ([DistilMembers([], network="net")], MemberError, "no members to learn from"),
        ([DistilMembers([module.net], network="net")], MemberError, "one of its own members"),
        ([DistilMembers([other], network="nothing")], OptionError, "has no network 'nothing'"),
        ([DistilMembers([other])], OptionError, "never calls the network"),
    ):
        # Lightning keeps a checkpoint of its own where checkpointing is on.
        own = {"enable_checkpointing": isinstance(callbacks[0], keep)}
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **QUIET | own)
        with pytest.raises(error, match=said):
            trainer.fit(module, data)
        assert "training_step" not in vars(module)
    for given, said in ({"weight": 0}, "weight must be"), ({"temperature": 0}, "temperature must"):
        with pytest.raises(OptionError, match=said):
            DistilMembers([other], **given)


@pytest.mark.nightly
def test_the_notebook_runs() -> None:
    """What it shows is what comes out, but for numbers."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "tutorial.ipynb", as_version=4)
    assert all(cell.outputs for cell in notebook.cells if "print(" in cell.source)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    texts = [o.text for c in notebook.cells for o in c.get("outputs", ()) if "text" in o]
    found = dict(line.split(": ") for line in "".join(texts).splitlines())
    percent = {name: float(text.removesuffix(" %")) for name, text in found.items()}
    best = max(value for name, value in percent.items() if name.startswith("member"))
    assert percent["fused"] > best + 10
