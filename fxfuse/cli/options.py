"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
