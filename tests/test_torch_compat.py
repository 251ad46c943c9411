"""Private API of torch is used in one module only, and what that module promises holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import fxfuse
from fxfuse.graph.torch_compat import hint, overloads_of, pytree

PACKAGE = Path(fxfuse.__file__).parent
COMPAT = PACKAGE / "graph" / "torch_compat.py"
#: Methods of named tuples, which Python documents.
_PUBLIC = {"_asdict", "_replace", "_fields", "_make"}
_ROOTS = ("torch", "functorch", "torchvision", "triton")
_UNSTABLE = ("experimental",)


def private_uses(source: str) -> Iterator[str]:
    """Private and experimental names of torch that Python code imports or reads.

    What an object is cannot be seen, so every private attribute counts that is not of `self` or
    `cls`; names of operators (`torch.ops.aten._softmax`) are data and count not.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "aten", "torch.ops.aten") and node.attr not in _PUBLIC:
                yield f"{node.lineno}: {ast.unparse(node)}"
            continue
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
            and _is_private(node.args[1].value)
        ):
            yield f"{node.lineno}: {ast.unparse(node)}"
            continue
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root in _ROOTS and any(_is_private(p) or p in _UNSTABLE for p in parts):
                yield f"{node.lineno}: {name}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.utils._pytree as pytree",
        "from torch._inductor import config",
        "from torch.fx.graph import _PyTreeCodeGen",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.symbolic_shapes import free_symbols",
        "torch._dynamo.reset()",
        "node.target._schema.arguments",
        "getattr(node.target, '_schema', None)",
    ],
)
def test_private_uses_are_seen(source: str) -> None:
    assert list(private_uses(source))


@pytest.mark.parametrize(
    "source", ["import torch", "self._x", "aten._softmax.default", "layout._replace(a=1)"]
)
def test_other_names_are_not_meant(source: str) -> None:
    assert not list(private_uses(source))


def test_private_names_of_torch_are_in_one_module() -> None:
    files = sorted(set(PACKAGE.rglob("*.py")) - {COMPAT})
    found = [
        f"{file.relative_to(PACKAGE)}:{use}"
        for file in files
        for use in private_uses(file.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert list(private_uses(COMPAT.read_text(encoding="utf-8")))


def test_hints_of_sizes() -> None:
    class Sizes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.repeat(2, 1), x[x.sum(1) > 0]

    program = torch.export.export(
        Sizes(), (torch.ones(5, 4),), dynamic_shapes={"x": {0: Dim.DYNAMIC}}, strict=False
    )
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    repeated, chosen = (node.meta["val"] for node in output.args[0])
    assert [hint(size) for size in repeated.shape] == [10, 4]
    assert isinstance(chosen.shape[0], torch.SymInt)
    # Nothing is known of it, but a number is needed.
    assert isinstance(hint(chosen.shape[0]), int)
    assert hint("a") == "a"


def test_a_custom_operator_is_what_stands_in_a_graph() -> None:
    @torch.library.custom_op("fxfuse_tests::compat", mutates_args=())
    def compat(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert overloads_of(compat) == [torch.ops.fxfuse_tests.compat.default]
    assert torch.ops.aten.add.Tensor in overloads_of(torch.ops.aten.add)
    assert overloads_of(len) == [len]


def test_pytrees_are_those_of_torch_export() -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(3, 2),))
    leaves, spec = pytree.tree_flatten(((torch.ones(3, 2),), {}))
    assert len(leaves) == 1
    assert program.call_spec.in_spec == spec


# --- the core goes without the packages of the command line ---

WITHOUT = """
import sys

for name in ("typer", "rich", "pydantic", "pydantic_core", "yaml", "altair"):
    sys.modules[name] = None
"""
FUSE = """
import torch
from torch import nn

import fxfuse

members = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
result = fxfuse.fuse(members, torch.randn(2, 4))
assert result.module(torch.randn(5, 4)).shape == (5, 3)
assert fxfuse.verify.permutation(members[0], torch.randn(2, 4)).passed
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )


def test_the_core_fuses_without_the_command_line() -> None:
    done = python(FUSE)
    assert done.returncode == 0, done.stderr


def test_the_script_says_what_to_install() -> None:
    done = python("from fxfuse.cli import main\nmain()")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'fxfuse[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_core_declares_few_packages() -> None:
    with (PACKAGE.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    core = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert core == {"torch", "networkx", "numpy", "scipy", "safetensors", "filelock"}
    for extra in ("demo", "report", "test"):
        assert "fxfuse[cli]" in project["optional-dependencies"][extra]
