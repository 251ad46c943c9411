"""Calls that are wrong, in Python and on the command line, and what fxfuse says to them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import fxfuse
from fxfuse.cli.app import app
from fxfuse.errors import FxfuseError

#: The module that the calls on the command line name.
NETS = """
from torch import nn

def net(width=8, classes=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))

def number():
    return 3
"""
#: `a`, `b` and `c` are trained networks of one class, `x` is an example batch.
PYTHON = (
    "fxfuse.fuse(a, x)",
    "fxfuse.fuse([a], x)",
    "fxfuse.fuse([a.state_dict(), b.state_dict()], x)",
    'fxfuse.fuse(["a.safetensors", "b.safetensors"], x)',
    'fxfuse.fuse(fxfuse.Members.from_files(["a.safetensors", "gone.pt"], a), x)',
    'fxfuse.fuse(fxfuse.Members.from_files(["a.safetensors", "nets.py"], a), x)',
    "fxfuse.fuse([a, deeper], x)",
    "fxfuse.fuse([a, more_classes], x)",
    "fxfuse.fuse([a, in_float64], x)",
    "fxfuse.fuse([a, not_finite], x)",
    "fxfuse.fuse([a, b], x[:, :4])",
    "fxfuse.fuse([a, b], x.double())",
    "fxfuse.fuse([a, b], x.to('meta'))",
    'fxfuse.fuse([a, b], "x.pt")',
    'fxfuse.fuse([a, b], x, method="tranplant")',
    'fxfuse.fuse([a, b], x, method=fxfuse.Transplant(score="l3"))',
    'fxfuse.fuse([a, b], x, method=fxfuse.Transplant(score="obs"))',
    'fxfuse.fuse([a, b], x, method=fxfuse.Transplant(score="taylor"), calibration=many)',
    "fxfuse.fuse([a, b], x, size=0)",
    "fxfuse.fuse([a, b], x, size=3)",
    "fxfuse.fuse([a, b], x, size=fxfuse.Size(max_params=5))",
    'fxfuse.fuse([a, b], x, size={"layer1.*": 0.5})',
    'fxfuse.fuse([a, b], x, constraints=fxfuse.Constraints(freeze=["stem.*"]))',
    "fxfuse.fuse([a, b], x, constraints=fxfuse.Constraints(base_member=2))",
    'fxfuse.fuse([a, b], x, heads=fxfuse.Heads(["fc"]))',
    "fxfuse.fuse([a, b], x, calibration=many[:, :4])",
    "fxfuse.fuse([a, b], x, calibration=many.double())",
    "fxfuse.fuse([a, b], x, calibration=fxfuse.Calibration(many, held_out=1.5))",
    "fxfuse.fuse([a, b], x, refine=[fxfuse.Refit()])",
    "fxfuse.fuse([a, b], x, calibration=many, refine=[fxfuse.Match(steps=0)])",
    "fxfuse.fuse([a, b], x, task=fxfuse.Classification(dim=7), calibration=many)",
    "fxfuse.prune([a, b], x, size=0.5)",
    'fxfuse.save(result, "kept")',
    'fxfuse.save(a, "saved")',
    "fxfuse.compile(a)",
    'fxfuse.export_onnx(a, "a.onnx")',
    'fxfuse.load("gone")',
    'fxfuse.analyze(a, x).explain("0.wieght", 0)',
    "fxfuse.FusionPlan.from_json('{\"method\": 3}')",
    "fxfuse.build(result.plan, [a, c], x)",
    'fxfuse.stack([a, b], x, reduce="median")',
    "result.load_into(deeper)",
    "result.load_into(None)",
    "fxfuse.plan(a, [a, b])",
    "fxfuse.build(None, [a, b], x)",
    "fxfuse.refine.refit(a, [a, b], many)",
    "fxfuse.load(None)",
    "fxfuse.Refit(alpha=-1)",
    'fxfuse.Match(seconds="60")',
    'fxfuse.Size(width="half")',
)
#: What is in the folder: checkpoints `a.safetensors` and `b.safetensors`, `nets.py`, `kept`.
COMMANDS = (
    "fuse a.safetensors b.safetensors",
    "fuse a.safetensors b.safetensors --model nets:net",
    "fuse a.safetensors --model nets:net --input 5 --out out",
    "fuse a.safetensors gone.pt --model nets:net --input 5 --out out",
    "fuse a.safetensors nets.py --model nets:net --input 5 --out out",
    "fuse a.safetensors b.safetensors --model resnet18 --input 5 --out out",
    "fuse a.safetensors b.safetensors --model torchvision:resnet81 --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:nett --input 5 --out out",
    "fuse a.safetensors b.safetensors --model gone:net --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:number --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:net --model-arg width --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:net --model-arg widht=8 --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:net --model-arg width=9 --input 5 --out out",
    "fuse a.safetensors b.safetensors --model nets:net --input 4 --out out",
    "fuse a.safetensors b.safetensors --model nets:net --input five --out out",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out kept",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out nets.py",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --method tranplant",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --score l3",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --score obs",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --width 3",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --width half",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --freeze stem.*",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --heads fc",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --calibration gone.npy",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --calibration wrong.npy",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --refine refit",
    "fuse a.safetensors b.safetensors --model nets:net --input 5 --out out --refine refine",
    "fuse a.safetensors b.safetensors --modle nets:net --input 5 --out out",
    "fues a.safetensors b.safetensors",
    "explain 0.wieght 0 --model nets:net --input 5",
    "explain 0.weight 5 --model nets:net --input 5",
    "run gone.yaml",
    "run wrong.yaml",
    "compare gone --data wrong.npy",
    "compare kept",
    "report nets.py",
    "refit kept",
    "prune a.safetensors b.safetensors --model nets:net --input 5 --width 0.5 --out out",
    "prune a.safetensors --model nets:net --input 5 --width 2 --out out",
)


class Answer(NamedTuple):
    """What fxfuse says to a call.

    Attributes:
        call: The call, as a user writes it.
        what: What went wrong, and why.
        how: How to fix it.
    """

    call: str
    what: str
    how: str


def in_python() -> Iterator[Answer]:
    """Make the calls.

    Raises:
        RuntimeError: A call raises no error of fxfuse.
    """
    with _folder() as names:
        for call in PYTHON:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(call, dict(names))
            except FxfuseError as error:
                yield Answer(call, _shown(error.what, error.why), error.how)
            except Exception as error:
                raise RuntimeError(f"{call} raises {error!r}") from error
            else:
                raise RuntimeError(f"{call} raises nothing")


def on_the_command_line() -> Iterator[Answer]:
    """Run the commands.

    Raises:
        RuntimeError: A command does not exit with 2.
    """
    runner = CliRunner()
    with _folder():
        for command in COMMANDS:
            done = runner.invoke(app, command.split(), env={"COLUMNS": "400"})
            if done.exit_code != 2:
                raise RuntimeError(f"{command} exits with {done.exit_code}: {done.stderr}")
            yield Answer(f"fxfuse {command}", *_parts(done.stderr))


def _parts(printed: str) -> tuple[str, str]:
    """What is wrong and how to fix it, as fxfuse prints it, or the parser of options."""
    lines = dict(re.findall(r"^ *(error|why|how to fix): (.*)$", printed, re.MULTILINE))
    if lines:
        return _shown(lines["error"], lines.get("why", "")), lines.get("how to fix", "")
    (what,) = re.findall(r"^│ (.*?) *│$", printed, re.MULTILINE)
    (how,) = re.findall(r"^(Try .*)$", printed, re.MULTILINE)
    return what, how


def _shown(what: str, why: str) -> str:
    return f"{what} ({why})" if why else what


@contextlib.contextmanager
def _folder() -> Iterator[dict[str, Any]]:
    """Be in a new folder with the files that the calls name, and yield the names."""
    before = Path.cwd(), list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield _prepared()
        finally:
            os.chdir(before[0])
            sys.path[:] = before[1]
            sys.modules.pop("nets", None)


def _prepared() -> dict[str, Any]:
    names: dict[str, Any] = {"fxfuse": fxfuse}
    exec(NETS, names)
    net = names["net"]
    Path("nets.py").write_text(NETS, encoding="utf-8")
    Path("wrong.yaml").write_text("model: nets:net\nmembres: [a, b]\n", encoding="utf-8")
    np.save("wrong.npy", np.zeros((20, 4), dtype="float32"))
    torch.manual_seed(0)
    for name in "abc":
        names[name] = net().eval()
        save_file(names[name].state_dict(), f"{name}.safetensors")
    names["deeper"] = nn.Sequential(*net(), nn.ReLU(), nn.Linear(3, 3)).eval()
    names["more_classes"] = net(classes=4).eval()
    names["in_float64"] = net().double().eval()
    names["not_finite"] = net().eval()
    names["not_finite"][0].weight.data[0, 0] = float("nan")
    names |= {"x": torch.randn(4, 5), "many": torch.randn(200, 5)}
    names["result"] = fxfuse.fuse([names["a"], names["b"]], names["x"])
    fxfuse.save(names["result"], "kept")
    return names
