"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fxfuse.analysis.constraints import Patterns
from fxfuse.errors import OptionError
from fxfuse.planning.options import Reference
from fxfuse.planning.widths import Width

Model = Annotated[
    str,
    typer.Option(
        help="Importable factory of the network, `package.module:factory`.",
        metavar="MODULE:FACTORY",
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        help="Keyword argument for the factory; may be repeated. Values are Python literals.",
        metavar="KEY=VALUE",
    ),
]
MemberArg = Annotated[
    list[str] | None,
    typer.Option(
        help="Keyword argument for the factory of one network, counted from 0, such as "
        "`1:classes=5`; may be repeated.",
        metavar="NUMBER:KEY=VALUE",
    ),
]
Input = Annotated[
    str,
    typer.Option(
        help="Shape of one example without the batch dimension, such as `3,224,224`, "
        "or a `.safetensors` or `.pt` file with the example inputs.",
        metavar="SHAPE|FILE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        help="Weights of the members: `.safetensors`, or `.pt` with tensors only.",
        metavar="CHECKPOINT",
        show_default=False,
    ),
]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        help="Parameters that stay exactly as in the first network; may be repeated.",
        metavar="PATTERN",
    ),
]
Share = Annotated[
    list[str] | None,
    typer.Option(
        help="Parameters whose index means the same in all networks: their mean is taken; "
        "may be repeated.",
        metavar="PATTERN",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Submodules of which nothing is fused; may be repeated.", metavar="MODULE"),
]
OutputDims = Annotated[
    list[str] | None,
    typer.Option(
        help="Dimensions of an output that must stay in order, such as `0=1,2`; `0=` leaves the "
        "units of output 0 free. May be repeated.",
        metavar="OUTPUT=DIMS",
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        help="Modules in which each network keeps its own head; may be repeated. Or `concat` or "
        "`union`: the heads are found, and returned so.",
        metavar="MODULE",
    ),
]
HeadOutputs = Annotated[
    str | None,
    typer.Option(
        help="What a network with heads returns: `tuple`, `concat` (logits side by side) or "
        "`union` (of the classes)."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with one list of class names for each network, for `union`.", metavar="FILE"
    ),
]
Widths = Annotated[
    list[str] | None,
    typer.Option(
        "--width",
        help="For `transplant`: size of the fused network in units of one of the networks, such as "
        "`1.5`; as many as there are networks keeps everything. Or `PATTERN=WIDTH` for the "
        "coupling groups that are named after such a tensor; may be repeated.",
        metavar="WIDTH|PATTERN=WIDTH",
    ),
]
MaxParams = Annotated[
    int | None, typer.Option(help="In place of `--width`: the most parameter elements.")
]
MaxFlops = Annotated[
    int | None,
    typer.Option(help="In place of `--width`: the most floating-point operations on the input."),
]
RoundTo = Annotated[
    int, typer.Option(help="Round channels to multiples of this, 8 for most hardware.")
]
Budget = Annotated[
    str,
    typer.Option(
        help="`local`: every group gets the width; `global`: groups whose units matter more keep "
        "more of them."
    ),
]

Force = Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")]
Folder = Annotated[
    Path,
    typer.Argument(help="A folder that `fxfuse` wrote.", metavar="FOLDER", show_default=False),
]
Folders = Annotated[
    list[Path],
    typer.Argument(
        help="Folders that `fxfuse` wrote, of the same members.",
        metavar="FOLDER",
        show_default=False,
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")]
_DATA = (
    "a .npy, .npz, .safetensors or .pt file, a folder with one folder of images for each class, "
    "torchvision:CLASS:ROOT, datasets:FOLDER, or module:function."
)
CalibrationSpec = Annotated[
    str, typer.Option("--calibration", help=f"100 to 1,000 inputs: {_DATA}", metavar="DATA")
]
CalibrationLimit = Annotated[
    int, typer.Option(help="So many calibration inputs are taken at most.", metavar="N")
]
CalibrationCopies = Annotated[
    int,
    typer.Option(
        min=0,
        help="So many augmented copies of each calibration input are looked at as well: of images "
        "and signals.",
        metavar="N",
    ),
]
DataSpec = Annotated[str, typer.Option("--data", help=f"Inputs: {_DATA}", metavar="DATA")]
EvaluationSpec = Annotated[
    str | None,
    typer.Option("--data", help=f"Inputs, with labels for accuracies: {_DATA}", metavar="DATA"),
]


def parse_by_group(option: str, texts: Iterable[str]) -> Width | None:
    """Reads an option that holds a number for all coupling groups, or one for each pattern.

    Returns:
        A number, numbers by pattern, or None where the option is not given.

    Raises:
        OptionError: A text is no number and no PATTERN=WIDTH, or says of one thing two.
    """
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            if pattern in found or (found and "" in (pattern, *found)):
                raise ValueError(f"it contradicts another {option}")
            found[pattern] = float(number)
        except ValueError as error:
            how = "write one number, such as 0.5, or PATTERN=NUMBER for each pattern"
            raise _unreadable(option, text, str(error), how) from error
    return found.get("", found or None)


def parse_heads(texts: Sequence[str]) -> Patterns:
    """Reads `--heads`: patterns, or the one word that lets the heads be found."""
    return texts[0] if list(texts) in (["concat"], ["union"]) else tuple(texts)


def parse_member_args(texts: Iterable[str], count: int) -> list[list[str]]:
    """Reads `--member-arg`: for each network, its arguments of the form KEY=VALUE.

    Raises:
        OptionError: A text does not begin with the number of a network.
    """
    found: list[list[str]] = [[] for _ in range(count)]
    for text in texts:
        number, _, argument = text.partition(":")
        if not number.isdecimal() or int(number) >= count:
            why = f"{number!r} is not the number of one of the {count} networks, counted from 0"
            raise _unreadable("--member-arg", text, why, "write it like 1:classes=5")
        found[int(number)].append(argument)
    return found


def read_classes(path: Path | None) -> Any:
    """Reads `--classes`; `fxfuse.fuse` checks what the lists hold.

    Raises:
        OptionError: The file holds no JSON list.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        how = 'write one list of names for each network: [["cat", "dog"], ["dog", "fish"]]'
        raise _unreadable("--classes", str(path), str(error), how) from error
    return found


def parse_output_dims(texts: Iterable[str]) -> dict[int, tuple[int, ...]]:
    """Reads `--output-dims`.

    Raises:
        OptionError: A text is not of the form OUTPUT=DIM,DIM.
    """
    found = {}
    for text in texts:
        output, equals, dims = text.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            found[int(output)] = tuple(int(dim) for dim in dims.split(",") if dim.strip())
        except ValueError as error:
            how = "write OUTPUT=DIM,DIM with numbers, such as 0=1"
            raise _unreadable("--output-dims", text, str(error), how) from error
    return found


def parse_reference(text: str) -> Reference:
    """Reads `--reference`.

    Raises:
        OptionError: The text is neither a number nor `mean`.
    """
    if text == "mean":
        return "mean"
    if not text.isdecimal():
        why = "it is neither the number of a network, counted from 0, nor `mean`"
        raise _unreadable("--reference", text, why, "write --reference 0 or --reference mean")
    return int(text)


def _unreadable(option: str, text: str, why: str, how: str) -> OptionError:
    return OptionError(f"{option} {text!r} cannot be read", why=why, how=how)
