"""What a recipe may say. The parts that hold options are made from their classes (`cli.flags`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import reduce
from operator import or_
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from fxfuse.cli.flags import (
    CALIBRATION,
    CHECKPOINTS,
    CONSTRAINTS,
    HEADS,
    IMAGES,
    METHOD,
    SIZE,
    STEPS,
    TASK,
    TRAINING,
    Group,
    options_of,
)
from fxfuse.common.options import alternatives, fields_of
from fxfuse.errors import FxfuseError


class Part(BaseModel):
    """A part of a recipe: nothing is converted, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OptionPart(Part):
    """A part that holds the options of a class."""

    options: ClassVar[type]

    @model_validator(mode="after")
    def _check(self) -> OptionPart:
        try:
            self.make(**{f.name: None for f in fields_of(self.options) if f.default is MISSING})
        except FxfuseError as error:
            said = (error.what, error.why, error.how)
            raise ValueError("; ".join(text for text in said if text)) from error
        return self

    def make(self, **inputs: Any) -> Any:
        """Make the object of the class; `inputs` are fields that no recipe holds."""
        found = {f.name: getattr(self, f.name) for f in options_of(self.options)}
        return self.options(**inputs, **found)


def _part_of(kind: type, **more: Any) -> type[OptionPart]:
    """Return the part that holds the options of a class; `more` are fields before these."""
    fields: dict[str, Any] = dict(more)
    for option in options_of(kind):
        described = Field(_plain(option.default), description=option.help)
        fields[option.name] = (_in_yaml(option.type), described)
    text = (kind.__doc__ or "").partition("\n\n")[0]
    part = create_model(kind.__name__, __base__=OptionPart, __doc__=text, **fields)
    part.options = kind
    return part


def _plain(value: Any) -> Any:
    """Return a default as YAML can hold it."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value


def _in_yaml(kind: Any, *, listed: int = 0) -> Any:
    """Return the type of an option's value in YAML, which has lists and no tuples."""
    origin, arguments = get_origin(kind), get_args(kind)
    if len(alternatives(kind)) > 1:
        typed = [each for each in alternatives(kind) if get_origin(each) is not Callable]
        return reduce(or_, (_in_yaml(each, listed=listed) for each in typed))
    if origin is tuple:
        return list[_in_yaml(arguments[0], listed=listed + 1)]  # type: ignore[misc]
    if origin is Mapping:
        return dict[arguments[0], _in_yaml(arguments[1])]  # type: ignore[misc,valid-type]
    # Names in lists of names may be numbers: classes often are.
    return str | int if kind is str and listed > 1 else kind


def _single(group: Group) -> type[OptionPart]:
    return _part_of(group.kind_of(None))


def _choice(group: Group) -> Any:
    """Return a part for each class of a group, told apart by `name`; the name alone will do."""
    parts = [
        _part_of(kind, name=(Literal[name], Field(description="Which one.")))
        for name, kind in group.kinds.items()
    ]
    first = next(iter(group.kinds))

    def named(given: Any) -> Any:
        return {"name": first, **given} if isinstance(given, Mapping) else _as_field("name", given)

    choice: Any = Annotated[reduce(or_, parts), Field(discriminator="name")]
    return _short(choice, named, Literal[tuple(group.kinds)])


def _short(part: Any, complete: Callable[[Any], Any], form: Any) -> Any:
    """A part that may be written in a short form, which the schema for editors lists, too."""
    return Annotated[part, BeforeValidator(complete, json_schema_input_type=form | part)]


def _as_field(name: str, given: Any) -> Any:
    """Return a text, as the most important field of a part."""
    return {name: given} if isinstance(given, str) else given


def _as_step(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: {} if options is None else options for name, options in given.items()}
    return {given: {}} if isinstance(given, str) else given


class Step(Part):
    """A step after the fusion."""

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("a step has one name")
        return self

    def make(self) -> Any:
        """Make the object of the step that is named."""
        return getattr(self, next(iter(self.model_fields_set))).make()


if TYPE_CHECKING:
    # What is made at run time is no type for mypy.
    AnyMethod: TypeAlias = OptionPart
    AnyTask: TypeAlias = OptionPart
    AnySize: TypeAlias = OptionPart
    AnyCalibration: TypeAlias = OptionPart
    AnyConstraints: TypeAlias = OptionPart
    AnyHeads: TypeAlias = OptionPart
    AnyStep: TypeAlias = Step
    TrainingPart: TypeAlias = OptionPart
    CheckpointsPart: TypeAlias = OptionPart
    ImagesPart: TypeAlias = OptionPart
else:
    AnyMethod, AnyTask = _choice(METHOD), _choice(TASK)
    AnyCalibration, AnyConstraints, AnyHeads = map(_single, (CALIBRATION, CONSTRAINTS, HEADS))
    AnySize = _short(
        _single(SIZE),
        lambda given: {"width": given} if isinstance(given, int | float) else given,
        float,
    )
    _steps = {g.name: (_single(g) | None, Field(None, description=g.help)) for g in STEPS}
    AnyStep = _short(
        create_model("Step", __base__=Step, **_steps), _as_step, Literal[tuple(_steps)]
    )
    TrainingPart, CheckpointsPart, ImagesPart = map(_single, (TRAINING, CHECKPOINTS, IMAGES))


class Member(CheckpointsPart):
    """A network that goes into the fusion; its path alone will do."""

    path: str = Field(description="Weights: .safetensors, .pt, an index, or a folder with these.")
    args: dict[str, Any] = Field({}, description="Arguments of the factory for this one only.")


class DataSource(ImagesPart):
    """Examples for calibration, training or evaluation; the source alone will do."""

    source: str = Field(
        description="A file of inputs, a .txt file of texts, a folder of images, "
        "torchvision:CLASS:ROOT, datasets:FOLDER, or module:function."
    )
    limit: int | None = Field(None, gt=0, description="Number of examples, spread over the source.")


if TYPE_CHECKING:
    AnyMember: TypeAlias = Member
    AnySource: TypeAlias = DataSource
else:
    AnyMember = _short(Member, lambda given: _as_field("path", given), str)
    AnySource = _short(DataSource, lambda given: _as_field("source", given), str)


class Fuse(Part):
    """How members are fused: the options of `fxfuse.fuse`."""

    method: AnyMethod | None = Field(None, description=METHOD.help)
    size: AnySize | None = Field(
        None, description="Size of the result: a width, or these fields. None: a member's size."
    )
    calibration: AnyCalibration | None = Field(
        None,
        description="How calibration inputs are used; where they are stands above, outside `fuse`.",
    )
    task: AnyTask | None = Field(None, description=TASK.help)
    refine: list[AnyStep] | None = Field(
        None,
        description="Steps after the fusion, each by its name alone or with options. None: refit "
        "and match with calibration inputs (refit only with heads or free outputs), else nothing.",
    )
    constraints: AnyConstraints | None = Field(
        None, description="What must stay as it is. A pattern matches names of state_dict()."
    )
    heads: AnyHeads | None = Field(
        None, description="Modules in which each member keeps its own head. None: there are none."
    )
    verify: bool = Field(True, description="Run the oracles before the network is written.")
    plan: str | None = Field(
        None,
        description="plan.json of an earlier fusion of these members, in place of method, size, "
        "constraints and heads.",
    )

    @model_validator(mode="after")
    def _check(self) -> Fuse:
        parts = ("method", "size", "constraints", "heads")
        twice = [name for name in parts if getattr(self, name) is not None]
        if self.plan is not None and twice:
            raise ValueError(f"a plan holds {' and '.join(twice)} already; leave one of them out")
        return self


class Train(TrainingPart):
    """Training after the fusion."""

    data: AnySource | None = Field(None, description="None: the calibration data.")


class Output(Part):
    """What is written."""

    folder: str = Field(description="The folder.")
    report: bool = Field(False, description="Write report.html as well.")
    package: bool = Field(False, description="Write package.pt2 as well, compiled ahead of time.")
    onnx: bool = Field(False, description="Write network.onnx as well.")


class Made(Part):
    """What a result was made with; written by fxfuse, and checked when the recipe runs again."""

    fxfuse: str
    torch: str
    python: str
    threads: int
    device: str
    sha256: dict[str, str] = Field(description="of the files that were read, by path")


class Recipe(Part):
    """A fusion; of one member, a pruning."""

    model: str = Field(
        description="torchvision:NAME, timm:NAME, hf:FOLDER, or package.module:factory."
    )
    model_args: dict[str, Any] = Field({}, description="Keyword arguments of the factory.")
    members: list[AnyMember] = Field(
        min_length=1, description="Checkpoints: paths, or {path, args}. One alone is pruned."
    )
    input: list[int] | str = Field(
        description="Shape of one example without the batch, ids:LENGTH, or a file of inputs."
    )
    calibration: AnySource | None = Field(
        None, description="100 to 1,000 inputs from the members' own domain."
    )
    fuse: Fuse = Fuse()
    train: Train | None = Field(None, description="Training after the fusion.")
    evaluation: AnySource | None = Field(None, description="Inputs and labels to report on.")
    output: Output
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    threads: int | None = Field(
        None, gt=0, description="Number of threads; sums depend on it in their last digits."
    )
    base: str | None = Field(
        None, description="Where relative paths begin. None: the recipe's own folder."
    )
    made: Made | None = Field(None, description="Written by fxfuse.")

    @property
    def title(self) -> str:
        """What it makes, in words."""
        n = len(self.members)
        return f"{n} networks fused into one" if n > 1 else "One network, pruned"

    @property
    def names(self) -> tuple[str, ...]:
        """What its members are called: their files, with what of the path tells them apart."""
        paths = [PurePath(m.path).parts for m in self.members]
        for count in range(1, max(map(len, paths)) + 1):
            found = tuple("/".join(parts[-count:]) for parts in paths)
            if len({*found}) == len(found):
                break
        return found

    @property
    def sources(self) -> list[DataSource]:
        """The sources of its data."""
        told = [self.calibration, self.evaluation, self.train.data if self.train else None]
        return [source for source in told if source is not None]

    @property
    def images(self) -> dict[str, Any]:
        """How images of its data are prepared, where it says so."""
        kept = set(DataSource.model_fields) - {"source", "limit"}
        found = (s.model_dump(include=kept, exclude_defaults=True) for s in self.sources)
        return next(filter(None, found), {})

    @property
    def refines(self) -> bool:
        """Whether anything is fitted or trained after the units are chosen."""
        steps = self.fuse.refine
        return self.train is not None or bool(self.calibration if steps is None else steps)

    @field_validator("fuse", mode="before")
    @classmethod
    def _fuse(cls, given: Any) -> Any:
        # A part all of whose fields are commented out.
        return {} if given is None else given

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if len(self.members) == 1 and self.fuse.heads is not None:
            raise ValueError("one member alone is pruned, so there are no heads to keep apart")
        return self
