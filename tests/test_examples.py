"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from examples.distill_with_trainer import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore")
def test_distilling_with_the_trainer_of_transformers() -> None:
    found = main(steps=100)
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


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_the_callback_of_lightning_says_what_it_needs(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    torch = pytest.importorskip("torch")
    from fxfuse.api.lightning import FuseCheckpoints
    from fxfuse.errors import MemberError, OptionError

    module = importlib.import_module("examples.fuse_with_lightning").Digits()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 8, 8), torch.zeros(8, dtype=torch.int64)), 4
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for callbacks, network, error, said in (
        ([], "net", OptionError, "nothing keeps checkpoints"),
        ([], "nothing", OptionError, "has no network 'nothing'"),
        ([pl.callbacks.ModelCheckpoint(tmp_path)], "net", MemberError, "needs 2"),
    ):
        fuse = FuseCheckpoints(torch.randn(2, 8, 8), network=network)
        # Lightning keeps a checkpoint of its own where checkpointing is on.
        own = {} if callbacks else {"enable_checkpointing": False}
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[*callbacks, fuse], **quiet, **own
        )
        with pytest.raises(error, match=said):
            trainer.fit(module, data)


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
