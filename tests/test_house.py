"""The house: few folders, short functions, small public functions (docs/adr/0027)."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest

import fxfuse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fxfuse"
_LINES = 60


def test_the_package_has_few_entries_and_layers():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = contracts["contracts"]
    assert len(contract["layers"]) <= 15
    folders = {path.name for path in entries if path.is_dir()}
    assert folders <= set(contract["layers"])


def test_no_folder_shares_its_name_with_a_public_function():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not folders & set(fxfuse.__all__)


@pytest.mark.parametrize("function", [fxfuse.fuse, fxfuse.prune], ids=["fuse", "prune"])
def test_a_public_function_has_few_parameters(function):
    assert len(inspect.signature(function).parameters) <= 11


def test_a_plan_has_few_fields():
    assert len(dataclasses.fields(fxfuse.FusionPlan)) <= 8


def test_contributing_has_a_row_for_each_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| folder | holds |") : text.index("## Add something")]
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) <= len(folders) + 1
    for folder in folders:
        assert f"`{folder}/`" in table


def functions(path: Path) -> list[tuple[str, int]]:
    """Each function of a file, and its lines of code: no docstring, no comments, no blank lines."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0]
        is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = first.end_lineno if is_docstring else first.lineno - 1
        code = [line.strip() for line in lines[start : node.end_lineno]]
        found.append((node.name, sum(1 for line in code if line and not line.startswith("#"))))
    return found


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT)}:{name}": count
        for path in PACKAGE.rglob("*.py")
        for name, count in functions(path)
        if count > _LINES
    }
    assert not long
