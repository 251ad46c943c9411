"""Flags and arguments that several commands share; those of option classes are in `cli.flags`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.forms import unreadable
from fxfuse.cli.sources import is_text
from fxfuse.errors import OptionError

#: Parts of a command's help behind the essentials, in their order.
CALIBRATION_PANEL, EXPERT = "Calibration", "Expert"
PANELS = ("Size", CALIBRATION_PANEL, "Heads", EXPERT)

Model = Annotated[
    str,
    typer.Option(
        help="The network: `torchvision:NAME`, `timm:NAME`, `hf:FOLDER`, `hf:USER/NAME`, or an "
        "importable factory, `package.module:factory`.",
        metavar="NETWORK",
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
        help="Keyword argument for the factory of one member, counted from 0, such as "
        "`1:classes=5`; may be repeated.",
        metavar="NUMBER:KEY=VALUE",
        rich_help_panel=EXPERT,
    ),
]
Input = Annotated[
    str,
    typer.Option(
        help="Shape of one example without the batch dimension, such as `3,224,224`; "
        "`ids:LENGTH` or `ids:LENGTH:VOCABULARY` for token ids; or a `.safetensors` or `.pt` file "
        "with the example inputs.",
        metavar="SHAPE|FILE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_WEIGHTS = "`.safetensors`, `.pt`, an index of several files, or a folder with these."
Checkpoint = Annotated[
    Path,
    typer.Argument(help=f"Weights: {_WEIGHTS}", metavar="CHECKPOINT", show_default=False),
]
Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        help=f"Weights of the members: {_WEIGHTS}", metavar="CHECKPOINT", show_default=False
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
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The members' network, in place of the one that the folder names. One that is no "
        "library's needs this or `--trust`.",
        metavar="NETWORK",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import and run the functions that the folder names. Only for folders whose maker you "
        "trust.",
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")]
Report = Annotated[
    bool,
    typer.Option("--report", help="Write `report.html` too: what was fused, as one page."),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the oracles.", rich_help_panel=EXPERT)
]
_DATA = (
    "a .npy, .npz, .safetensors or .pt file, a .txt file of texts for `hf:` networks, a folder of "
    "images, or with one for each class, torchvision:CLASS:ROOT, datasets:FOLDER, or "
    "module:function."
)
OptionalCalibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help=f"100 to 1,000 inputs from the members' own domain: {_DATA}",
        metavar="DATA",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Texts to calibrate on, a `.txt` file with one per line, for `hf:` networks; the same "
        "as `--calibration FILE`.",
        metavar="FILE",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
DataSpec = Annotated[str, typer.Option("--data", help=f"Inputs: {_DATA}", metavar="DATA")]
EvaluationSpec = Annotated[
    str | None,
    typer.Option("--data", help=f"Inputs, with labels for accuracies: {_DATA}", metavar="DATA"),
]


def calibration_source(calibration: str | None, text: Path | None) -> str | None:
    """Return the source of calibration inputs that `--calibration` or `--text` names."""
    if text is None:
        return calibration
    if calibration is not None:
        how = "leave one of them out"
        raise OptionError("--text and --calibration contradict each other", how=how)
    if not is_text(str(text)):
        raise unreadable("--text", str(text), "its name does not end in .txt", "rename the file")
    return str(text)


def parse_member_args(texts: Iterable[str], count: int) -> list[list[str]]:
    """Read `--member-arg`: for each member, its arguments of the form KEY=VALUE."""
    found: list[list[str]] = [[] for _ in range(count)]
    for text in texts:
        number, _, argument = text.partition(":")
        if not number.isdecimal() or int(number) >= count:
            why = f"{number!r} is not the number of one of the {count} networks, counted from 0"
            raise unreadable("--member-arg", text, why, "write it like 1:classes=5")
        found[int(number)].append(argument)
    return found
