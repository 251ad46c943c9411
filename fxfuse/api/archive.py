"""Graphs of torch.export in files: written without pickle, and looked at before they are read.

`torch.export.load` unpickles tensors that a file says are pickled, imports what a file names,
evaluates its size expressions as Python, and looks operators up anywhere in `torch`. So a file is
checked first: only what `write_graph` writes comes through.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram

from fxfuse.errors import CheckpointError
from fxfuse.graph.example import first_line

#: Names of sizes that torch.export gives.
_SYMBOL = re.compile(r"[suzf]+\d+")
#: What size expressions are made of.
_FUNCTIONS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Abs", "Max", "Min", "Mod"),
    *(
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "ceiling",
        "floor",
        "FloorToInt",
        "CeilToInt",
    ),
    *(
        "TruncToInt",
        "ToFloat",
        "IntTrueDiv",
        "FloatTrueDiv",
        "Identity",
        "Where",
        "ModularIndexing",
    ),
    *("Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan"),
    *("Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not"),
}
_PARTS = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Compare),
    *(ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv),
    *(ast.Mod, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BitAnd, ast.BitOr),
)
#: Longest text of a size expression, and largest power in it.
_LONGEST, _HIGHEST = 4096, 64
#: Entries of a file: example inputs, descriptions in JSON, and what is only numbers or compared.
_INPUTS = "data/sample_inputs/model.pt"
_DESCRIPTION = re.compile(r"models/model\.json|data/(weights|constants)/model_\w+_config\.json")
_NUMBERS = re.compile(
    r"data/(weights|constants)/\w+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)"
)
#: Functions of Python that graphs call on sizes.
_ON_SIZES = {
    *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
}
#: Where the classes are that networks of transformers return.
_OUTPUTS = "transformers.modeling_outputs"
#: Operators that reach out of the process.
_OUTSIDE = {"aten::from_file"}


def write_graph(program: ExportedProgram, path: Path) -> None:
    """Writes a program, in the format of `torch.export.save`.

    What torch notes beside the operators (source lines, names of files) is left out.

    Args:
        program: The program, which loses those notes.
        path: The file, `.pt2`.
    """
    for node in program.graph_module.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    program._guards_code = []
    # On a full disk torch's own writer ends the process.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def read_graph(path: str | Path) -> ExportedProgram:
    """Reads what `write_graph` wrote; nothing in the file is unpickled, imported or evaluated.

    Args:
        path: The file.

    Raises:
        CheckpointError: There is no such file.
        CheckpointError: It is damaged, was written by an incompatible version of torch, or
            holds what `write_graph` does not write.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no graph {path.name}", where=str(path), how="check the path"
        )
    said = _Heard()
    log = logging.getLogger(torch.export.__name__)
    log.addFilter(said)
    try:
        _check(path)
        program = torch.export.load(path)
        _tie(program)
        return program
    except CheckpointError:
        raise
    # A damaged file breaks torch's reader, JSON and zip in many ways.
    except Exception as error:
        cause = said.error or error
        raise CheckpointError(
            f"{path.name} cannot be read",
            where=str(path),
            why=f"{type(cause).__name__}: {first_line(cause)}",
            how="write it again, with this version of torch; a class that the network returns must "
            "have been imported before",
        ) from error
    finally:
        log.removeFilter(said)


class _Heard(logging.Filter):
    """Keeps the error that torch's reader only logs, with a traceback, and lets nothing through."""

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            self.error = record.exc_info[1] or self.error
        return False


def _tie(program: ExportedProgram) -> None:
    """Lets names of one tensor in the file be one tensor again."""
    first: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in program.state_dict.items():
        if tensor.numel():
            place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            program.state_dict[name] = first.setdefault(place, tensor)


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        # What is not compressed cannot be larger than the file.
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            _refuse(path, "it is compressed, which torch.export never does")
        # torch's reader does not look at the checksums.
        if archive.testzip() is not None:
            _refuse(path, f"{archive.testzip()} is damaged")
        for info in infos:
            _, _, name = info.filename.partition("/")
            if name == _INPUTS:
                torch.load(io.BytesIO(archive.read(info)), weights_only=True)
            elif _DESCRIPTION.fullmatch(name):
                _check_json(path, json.loads(archive.read(info)))
            elif not _NUMBERS.fullmatch(name):
                _refuse(path, f"it holds {info.filename}")


def _check_json(path: Path, content: Any) -> None:
    """Checks a description of tensors, or the graph itself."""
    for key, value in _entries(content):
        if key in ("use_pickle", "is_custom_obj") and value:
            _refuse(path, "it holds pickled objects")
        elif key in ("custom_obj_values", "guards_code") and value:
            _refuse(path, f"it holds {key}")
        elif key == "metadata" and isinstance(value, dict) and value:
            _refuse(path, "it holds notes beside its operators")
        elif key == "target" and isinstance(value, str):
            _check_operator(path, value)
        elif key == "range_constraints" and isinstance(value, dict):
            for symbol in value:
                _check_expression(path, symbol)
        elif isinstance(value, str) and key == "expr_str":
            _check_expression(path, value)
        if isinstance(value, str) and _OUTPUTS in value:
            # Its classes are known to torch once they are imported.
            with contextlib.suppress(ImportError):
                import_module(_OUTPUTS)
        if isinstance(value, str) and ("__enum__" in value or "default_factory" in value):
            _refuse(path, "its inputs or outputs are of a class of its own")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Each value that has a key, at any depth."""
    waiting = [("", content)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, each) for each in value)


def _check_operator(path: Path, target: str) -> None:
    parts = target.split(".")
    if parts[0] == "_operator" and len(parts) == 2 and parts[1] in _ON_SIZES:
        return
    found: Any = None
    if parts[:2] == ["torch", "ops"] and len(parts) == 5:
        found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
    elif parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4:
        _refuse(path, f"it calls {target}, a region of its own")
    elif parts[0] == "torch" and parts[1:] in _SYMBOLIC:
        return
    if not isinstance(found, torch._ops.OpOverload) or found._schema.name in _OUTSIDE:
        _refuse(path, f"it calls {target}, which is no operator of torch")


#: What torch itself calls on sizes.
_SYMBOLIC = [["sym_max"], ["sym_min"], ["sym_not"], ["sym_float"], ["sym_int"], ["sym_sum"]]


def _check_expression(path: Path, text: str) -> None:
    """Checks a size expression: sympy evaluates it as Python."""
    if len(text) > _LONGEST:
        _refuse(path, "a size in it is too long")
    for part in ast.walk(ast.parse(text, mode="eval")):
        if not isinstance(part, _PARTS):
            _refuse(path, f"{text!r} is no size")
        if isinstance(part, ast.Name) and not _is_known(part.id):
            _refuse(path, f"{part.id!r} in {text!r} is no size")
        if isinstance(part, ast.Constant):
            number = isinstance(part.value, int | float)
            if not number and not (isinstance(part.value, str) and _SYMBOL.fullmatch(part.value)):
                _refuse(path, f"{part.value!r} in {text!r} is no size")
        # Not even a short text may stand for a number that fills the memory.
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "Pow":
            inner = [p for p in ast.walk(part) if p is not part]
            if any(
                (isinstance(p, ast.Name) and p.id == "Pow" and p is not part.func)
                or (
                    (isinstance(p, ast.Constant) and isinstance(p.value, int | float))
                    and abs(p.value) > _HIGHEST
                )
                for p in inner
            ):
                _refuse(path, f"{text!r} is too large")


def _is_known(name: str) -> bool:
    return name in _FUNCTIONS or _SYMBOL.fullmatch(name) is not None


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{path.name} is not what fxfuse writes, and is not opened",
        where=str(path),
        why=why,
        how="where you trust the file, read it with torch.export.load yourself",
    )
