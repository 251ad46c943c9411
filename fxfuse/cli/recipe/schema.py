"""What a recipe may say. The fields of `fuse` are the arguments of `fxfuse.fuse`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from fxfuse.planning.methods.registry import methods
from fxfuse.planning.scores import scores


class Part(BaseModel):
    """A part of a recipe: nothing is converted, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _named(name: str) -> BeforeValidator:
    """Lets a part of which only the most important field is given be that field."""
    return BeforeValidator(lambda given: {name: given} if isinstance(given, str) else given)


class Member(Part):
    """A network that goes into the fusion; its path alone will do."""

    path: str = Field(description="weights: .safetensors, its index, or .pt with tensors only")
    args: dict[str, Any] = Field({}, description="arguments of the factory for this one only")


class DataSource(Part):
    """Examples for calibration, training or evaluation; the source alone will do."""

    source: str = Field(
        description="a file, a folder of images, torchvision:CLASS:ROOT, datasets:FOLDER, or "
        "module:function"
    )
    limit: int | None = Field(None, gt=0, description="so many examples, spread over the source")
    size: list[int] | None = Field(
        None, min_length=2, max_length=2, description="height and width that images are resized to"
    )
    mean: list[float] = Field([], description="for each channel, subtracted from images in [0, 1]")
    std: list[float] = Field([], description="for each channel, by which they are divided then")


#: Parts that may be a text.
AnyMember = Annotated[Member, _named("path")]
AnySource = Annotated[DataSource, _named("source")]


class Fuse(Part):
    """How members are fused: the arguments of `fxfuse.fuse`."""

    method: str = Field("transplant", description="transplant, average, ..., or auto")
    score: str | None = Field(None, description="importance of a unit: l1, l2, bn_scale, ...")
    variant: str | None = Field(None, description="iterative or hierarchical, for transplant")
    base_member: int = Field(0, ge=0, description="the member that keeps what is frozen")
    fraction: float | dict[str, float] | None = Field(
        None, description="share of units of other members, for all groups or by pattern"
    )
    reference: int | Literal["mean"] = Field(0, description="member that others are aligned to")
    regularisation: float | None = Field(None, description="of optimal_transport")
    calibration_limit: int = Field(1000, gt=0, description="so many inputs are taken at most")
    calibration_copies: int = Field(0, ge=0, description="augmented copies of each input")
    refit: bool = Field(False, description="fit every layer in closed form; needs calibration")
    outputs: Literal["logits", "values"] | None = Field(None, description="what the output is")
    steps: int | None = Field(None, gt=0, description="of matching, for auto")
    seconds: float | None = Field(
        None, gt=0, description="CPU seconds of matching, for auto; not reproducible bit for bit"
    )
    width: float | dict[str, float] | None = Field(
        None, description="in units of a member, for all groups or by pattern"
    )
    max_params: int | None = Field(None, gt=0, description="in place of width")
    max_flops: int | None = Field(None, gt=0, description="in place of width")
    round_to: int = Field(1, ge=1, description="channels are multiples of this")
    budget: Literal["local", "global"] = Field("local", description="who gets the width")
    mixing: Literal["joint", "per_member"] | None = Field(None, description="of LayerNorm etc.")
    freeze: list[str] = Field([], description="patterns of tensors that stay as in the base member")
    share: list[str] = Field([], description="patterns of tensors that are averaged")
    ignore: list[str] = Field([], description="submodules of which nothing is fused")
    output_dims: dict[int, list[int]] = Field({}, description="interface dimensions of outputs")
    heads: list[str] | Literal["concat", "union"] = Field([], description="modules kept apart")
    head_outputs: Literal["tuple", "concat", "union"] | None = Field(None, description="of heads")
    classes: list[list[str | int]] | None = Field(None, description="each member's, for union")
    plan: str | None = Field(None, description="plan.json of an earlier fusion of these members")
    verify: bool = Field(True, description="run the oracles")

    @field_validator("method")
    @classmethod
    def _method(cls, name: str) -> str:
        return _one_of("method", name, ["auto", *sorted(methods())])

    @field_validator("score")
    @classmethod
    def _score(cls, name: str | None) -> str | None:
        return name if name is None else _one_of("score", name, sorted(scores()))


class Train(Part):
    """Training after the fusion."""

    kind: Literal["match", "distill", "finetune"] = Field(
        "match", description="match and distill need no labels; finetune does"
    )
    steps: int | None = Field(None, gt=0, description="None: 300")
    seconds: float | None = Field(
        None, gt=0, description="CPU seconds in place of steps, for match"
    )
    learning_rate: float | None = Field(None, gt=0, description="None: the loop's own")
    temperature: float = Field(4.0, gt=0, description="of distill")
    batch: int = Field(64, gt=0, description="examples in a step")
    data: AnySource | None = Field(None, description="None: the calibration data")


class Output(Part):
    """What is written."""

    folder: str = Field(description="the folder")
    report: bool = Field(False, description="report.html as well")
    package: bool = Field(False, description="package.pt2 as well, compiled ahead of time")
    onnx: bool = Field(False, description="network.onnx as well")


class Made(Part):
    """What a result was made with; written by fxfuse, and checked when the recipe runs again."""

    fxfuse: str
    torch: str
    python: str
    threads: int
    device: str
    sha256: dict[str, str] = Field(description="of the files that were read, by path")


class Recipe(Part):
    """A fusion."""

    model: str = Field(
        description="torchvision:NAME, timm:NAME, hf:FOLDER, or package.module:factory"
    )
    model_args: dict[str, Any] = Field({}, description="keyword arguments of the factory")
    members: list[AnyMember] = Field(
        min_length=1, description="checkpoints: paths, or {path, args}"
    )
    input: list[int] | str = Field(
        description="shape of one example without the batch, ids:LENGTH, or a file of inputs"
    )
    calibration: AnySource | None = Field(None, description="100 to 1,000 inputs")
    fuse: Fuse = Fuse()
    train: Train | None = Field(None, description="training after the fusion")
    evaluation: AnySource | None = Field(None, description="inputs and labels to report on")
    output: Output
    seed: int = Field(0, ge=0, description="of all random numbers")
    threads: int | None = Field(
        None, gt=0, description="of the computation; sums depend on it in their last digits"
    )
    base: str | None = Field(
        None, description="where relative paths begin; None: the recipe's own folder"
    )
    made: Made | None = Field(None, description="written by fxfuse")

    @field_validator("fuse", mode="before")
    @classmethod
    def _fuse(cls, given: Any) -> Any:
        # A part all of whose fields are commented out.
        return {} if given is None else given


#: How alike a name must be to be suggested: `l3` is half of `l2`.
_NEAR = 0.5


def _one_of(what: str, name: str, known: list[str]) -> str:
    if name in known:
        return name
    near = get_close_matches(name, known, n=1, cutoff=_NEAR)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
