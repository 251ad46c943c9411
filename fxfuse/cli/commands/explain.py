"""`fxfuse explain`: why a dimension is free, frozen, or tied to another one."""

from __future__ import annotations

from typing import Annotated

import typer

import fxfuse
from fxfuse.cli.flags import CONSTRAINTS, Given, takes
from fxfuse.cli.load import load_model
from fxfuse.cli.options import Input, Json, Model, ModelArg
from fxfuse.cli.show import err, out, print_json

Tensor = Annotated[str, typer.Argument(help="Name in the model's `state_dict()`.")]
Dim = Annotated[int, typer.Argument(help="Dimension of that tensor.")]
OtherTensor = Annotated[str | None, typer.Argument(help="A second tensor.", show_default=False)]
OtherDim = Annotated[int | None, typer.Argument(help="Its dimension.", show_default=False)]


@takes(CONSTRAINTS)
def explain(
    tensor: Tensor,
    dim: Dim,
    model: Model,
    input: Input,
    given: Given,
    other_tensor: OtherTensor = None,
    other_dim: OtherDim = None,
    model_arg: ModelArg = None,
    json: Json = False,
) -> None:
    """Explain one dimension of a parameter, or what couples it with another one."""
    if other_tensor is not None and other_dim is None:
        raise typer.BadParameter(f"the dimension of {other_tensor} is missing")
    network, inputs = load_model(model, model_arg, input)
    constraints = given.make(CONSTRAINTS)
    with err.status("analysing"):
        graph = fxfuse.analyze(network, inputs, constraints)
    if other_tensor is None or other_dim is None:
        text = graph.explain(tensor, dim)
    else:
        text = graph.explain((tensor, dim), (other_tensor, other_dim))
    if json:
        print_json({"tensor": tensor, "dim": dim, "explanation": text})
    else:
        out.print(text, markup=False, highlight=False)
