"""Options are declared once: Python's classes, flags and the recipe offer the same ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

import fxfuse
from fxfuse import Calibration, Constraints, Custom, Heads, Match, Refit, Size, Transplant
from fxfuse.cli.app import app
from fxfuse.cli.commands.analyze import analyze
from fxfuse.cli.commands.compare import compare
from fxfuse.cli.commands.distill import distill
from fxfuse.cli.commands.explain import explain
from fxfuse.cli.commands.fuse import fuse
from fxfuse.cli.commands.prune import prune
from fxfuse.cli.commands.refit import refit
from fxfuse.cli.commands.report import report
from fxfuse.cli.commands.stack import stack
from fxfuse.cli.commands.verify import verify
from fxfuse.cli.flags import (
    CALIBRATION,
    CHECKPOINTS,
    CONSTRAINTS,
    GROUPS,
    HEADS,
    IMAGES,
    MATCH,
    METHOD,
    REFIT,
    SIZE,
    TASK,
    TRAINING,
    Given,
    Group,
    flags_of,
    options_of,
)
from fxfuse.cli.forms import form_of, read_by_group, read_output_dims
from fxfuse.cli.recipe import Recipe
from fxfuse.cli.recipe.schema import OptionPart
from fxfuse.cli.sources import Images
from fxfuse.cli.wording import naming_flags
from fxfuse.common.options import Options, alternatives, check_choice, fields_of
from fxfuse.errors import FxfuseError, InputError, OptionError
from fxfuse.planning.methods import Method, methods
from fxfuse.refine import Task
from fxfuse.refine.task import Outputs

#: Fields that cannot be typed: inputs and functions.
UNTYPED = {(Calibration, "inputs"), (Calibration, "evaluate"), (fxfuse.Match, "log")}
#: Tasks that are made of functions or of other tasks.
PYTHON_ONLY = {Custom, Outputs}


def classes_in(annotation: Any) -> Iterator[type]:
    """The classes of fxfuse that an annotation speaks of."""
    if isinstance(annotation, type) and annotation.__module__.startswith("fxfuse."):
        yield annotation
    for inner in get_args(annotation):
        yield from classes_in(inner)


def subclasses(kind: type) -> Iterator[type]:
    for own in kind.__subclasses__():
        yield own
        yield from subclasses(own)


def taken() -> set[type]:
    """The classes that annotations of `fuse` and `prune` speak of."""
    hints = [get_type_hints(f, localns={"Progress": Any}) for f in (fxfuse.fuse, fxfuse.prune)]
    return {kind for found in hints for hint in found.values() for kind in classes_in(hint)}


def option_classes() -> list[type]:
    """Every class of options, apart from those that only others are made from."""
    found = {k for k in subclasses(Options) if k.__module__.startswith("fxfuse.")}
    return sorted(found - {Method, Task}, key=lambda kind: kind.__name__)


def parts() -> dict[type, type[OptionPart]]:
    """Option class → the part of a recipe that holds it."""
    return {part.options: part for part in subclasses(OptionPart) if "options" in vars(part)}


def plain(value: Any) -> Any:
    """A value with lists in place of tuples."""
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value


def listed() -> list[tuple[Group, str, type]]:
    return [(group, name, kind) for group in GROUPS for name, kind in group.kinds.items()]


@cache
def parameters(command: str) -> dict[str, Any]:
    """What typer made of a command: flag → option."""
    group = typer.main.get_command(app)
    context = group.make_context("fxfuse", ["demo"])
    found = group.resolve_command(context, [command])[1].params
    return {option: parameter for parameter in found for option in parameter.opts}


# Nothing is missing, and nothing is said twice.


def test_every_option_class_is_in_the_table() -> None:
    assert {kind for _, _, kind in listed()} == set(option_classes()) - PYTHON_ONLY
    others = {k for k in taken() if is_dataclass(k) and not issubclass(k, Options)}
    # What is fused and pruned, what a network was made with, and what comes out.
    assert others == {fxfuse.Members, fxfuse.Program, fxfuse.FusionPlan, fxfuse.FusionResult}
    assert set(methods().values()) == set(METHOD.kinds.values())
    assert set(subclasses(Task)) - PYTHON_ONLY == set(TASK.kinds.values())


@pytest.mark.parametrize("kind", option_classes(), ids=lambda kind: kind.__name__)
def test_every_option_is_described(kind: type) -> None:
    described = "".join((k.__doc__ or "").partition("Attributes:")[2] for k in kind.__mro__)
    for option in fields_of(kind):
        assert len(option.help.split()) > 1, option.name
        assert option.help.endswith("."), option.name
        assert f"{option.name}: {option.help.split()[0]}" in described
    for entry in described.splitlines():
        if entry.startswith("        ") and entry[8:9].isalpha():
            assert entry.strip().partition(":")[0] in {option.name for option in fields_of(kind)}


@pytest.mark.parametrize(
    ("group", "name", "kind"), listed(), ids=[f"{g.name}-{name}" for g, name, _ in listed()]
)
def test_flags_and_recipes_have_the_options_of_a_class(group: Group, name: str, kind: type) -> None:
    fields = {option.name: option for option in fields_of(kind)}
    typed = {n: option for n, option in fields.items() if (kind, n) not in UNTYPED}
    assert {option.name for option in options_of(kind)} == set(typed)

    flags = {flag.fields[name].name: flag for flag in flags_of(group) if name in flag.fields}
    assert set(flags) == set(typed)
    shown = parameters("distill" if group is TRAINING else "fuse")
    for n, flag in flags.items():
        assert flag.fields[name] == typed[n]
        assert typed[n].help in shown[flag.name].help
        # What is not given is left to the class.
        assert shown[flag.name].default is None
        default = typed[n].default
        if len(flag.fields) == 1 and default not in (None, (), {}):
            assert f"Default: `{default}`." in shown[flag.name].help

    part = parts()[kind]
    fields_of_part = {n: field for n, field in part.model_fields.items() if n != "name"}
    assert set(fields_of_part) == set(typed)
    for n, field in fields_of_part.items():
        assert field.description == typed[n].help
        assert field.get_default() == plain(typed[n].default)
    required = {n: None for n, option in fields.items() if option.default is MISSING}
    made = part(**({"name": name} if "name" in part.model_fields else {})).make(**required)
    assert made == kind(**required)


def test_no_flag_is_there_twice() -> None:
    """`fuse` has the flags of all groups but the training's."""
    own = [flag.name for group in GROUPS for flag in flags_of(group) if group is not TRAINING]
    assert len(set(own)) == len(own)
    commands = {
        fuse: set(GROUPS) - {TRAINING},
        prune: set(GROUPS) - {TRAINING, HEADS},
        refit: {CALIBRATION, IMAGES, TASK, REFIT, MATCH},
        distill: {IMAGES, TRAINING},
        report: {IMAGES},
        compare: {IMAGES, TASK},
        **{command: {CONSTRAINTS} for command in (analyze, explain)},
        verify: {CHECKPOINTS, CONSTRAINTS},
        stack: {CHECKPOINTS},
    }
    for command, groups in commands.items():
        parameters = inspect.signature(command).parameters
        assert {f.parameter for g in groups for f in flags_of(g)} <= set(parameters)
        others = [f.parameter for g in GROUPS if g not in groups for f in flags_of(g)]
        assert not set(others) & set(parameters), command
        assert "given" not in parameters


def test_python_arguments_are_parts_of_the_recipe() -> None:
    """The fields of `fuse` are the arguments of `fxfuse.fuse`, apart from what is elsewhere."""
    fields = set(Recipe.model_json_schema()["$defs"]["Fuse"]["properties"])
    elsewhere = {"members", "example", "progress"}
    assert set(inspect.signature(fxfuse.fuse).parameters) - elsewhere == fields - {"plan"}
    arguments = {group.name for group in GROUPS if group is not TRAINING}
    # How checkpoints are read is said of each member, and how images are prepared of each source.
    assert arguments - {"refit", "match", "checkpoints", "images"} <= fields
    assert "weights" in Recipe.model_json_schema()["$defs"]["Member"]["properties"]
    assert "preset" in Recipe.model_json_schema()["$defs"]["DataSource"]["properties"]


# What is given becomes options.


def given(*groups: Group, **values: Any) -> Given:
    return Given(groups, values)


def test_images_are_prepared_for_every_source() -> None:
    flags = given(IMAGES, preset="imagenet", mean="0.5", image_size="64,32")
    told = {"preset": "imagenet", "mean": [0.5], "size": [64, 32]}
    assert flags.sources("a", None, like={"std": [2.0]}) == [
        {"source": "a", "std": [2.0], **told},
        None,
    ]
    made = Images(**told).prepared(7)
    assert (made.limit, made.size, made.mean) == (7, (64, 32), (0.5,))
    assert made.std == Images("imagenet").prepared(None).std != ()
    with pytest.raises(OptionError, match="--preset, --image-size, --mean: there are no images"):
        flags.sources(None, None)
    with pytest.raises(OptionError, match="size must be a height and a width"):
        Images(size=(3,))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="std must be positive"):
        Images(std=(1.0, 0.0))


def test_what_is_not_given_is_left_to_the_class() -> None:
    assert given(*GROUPS).recipe() == {}
    assert given(SIZE, width=["0.5"]).recipe() == {"size": {"width": 0.5}}
    assert given(SIZE, width=["a*=0.5", "b=2"]).make(SIZE) == Size({"a*": 0.5, "b": 2.0})
    assert given(SIZE, multiple_of=8, max_params=10).make(SIZE) == Size(
        max_params=10, multiple_of=8
    )
    assert given(SIZE, latency=5.0, latency_batch=1).make(SIZE) == Size(latency=5.0, batch=1)
    found = given(CONSTRAINTS, freeze=["a"], share=[], output_dims=["0="], base_member=1)
    assert found.make(CONSTRAINTS) == Constraints("a", output_dims={0: ()}, base_member=1)
    assert given(HEADS, head_output="concat").make(HEADS) == Heads(output="concat")
    assert given(METHOD, reference="mean", method="average").recipe() == {
        "method": {"name": "average", "reference": "mean"}
    }
    assert given(METHOD, score="l1").recipe() == {"method": {"score": "l1"}}


@pytest.mark.parametrize(
    ("refine", "values", "steps"),
    [
        (None, {}, None),
        (None, {"match_steps": 3}, ["refit", {"match": {"steps": 3}}]),
        ("match", {"match_seconds": 1.5}, [{"match": {"seconds": 1.5}}]),
        ("refit, match", {"refit_alpha": 0.1}, [{"refit": {"alpha": 0.1}}, "match"]),
        ("none", {}, []),
    ],
)
def test_steps(refine: str | None, values: dict[str, Any], steps: Any) -> None:
    found = given(*GROUPS, refine=refine, **values).recipe()
    assert found.get("refine") == steps
    if steps is not None:
        assert [type(step.make()) for step in recipe(fuse=found).fuse.refine or ()] == [
            {"refit": Refit, "match": Match}[s if isinstance(s, str) else next(iter(s))]
            for s in steps
        ]


def recipe(**more: Any) -> Recipe:
    least = {"model": "a:b", "members": ["a", "b"], "input": [3], "output": {"folder": "o"}}
    return Recipe.model_validate({**least, **more})


def test_classes_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('[["a", 1], ["b"]]')
    found = given(HEADS, classes=tmp_path / "classes.json", head_output="union")
    assert found.make(HEADS).classes == (("a", "1"), ("b",))
    assert recipe(fuse=found.recipe()).fuse.heads is not None


@pytest.mark.parametrize(
    ("groups", "values", "said"),
    [
        ([SIZE], {"multiple_of": 0}, "--multiple-of must be at least 1"),
        ([SIZE], {"width": ["1"], "max_params": 3}, "--width and a budget contradict"),
        ([SIZE], {"allocation": "atuo"}, "unknown --allocation 'atuo'"),
        ([SIZE], {"width": ["one"]}, "--width 'one' cannot be read"),
        ([MATCH], {"match_batch": 1}, "--match-batch must be at least 2"),
        ([METHOD], {"regularisation": 1.0}, "method 'transplant' has no --regularisation"),
        ([METHOD], {"method": "zip", "score": "l1"}, "there is --variant"),
        ([TRAINING], {"steps": 0}, "--steps must be greater than 0"),
        ([HEADS], {"head_output": "union"}, "--head-output 'union' needs --classes"),
        ([HEADS], {"head_output": "union"}, "list of class names for each member: --classes"),
    ],
)
def test_errors_name_flags(groups: list[Group], values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as found:
        given(*groups, **values).recipe()
    assert said in str(found.value)


def test_messages_name_flags() -> None:
    flags = {"calibration": "--calibration", "size": "--width", "verify": "--no-verify"}
    flags |= {"refine": "--refine", "score": "--score", "output_dims": "--output-dims"}
    flags["classes"] = "--classes"

    def reworded(text: str, where: str = "") -> FxfuseError:
        return naming_flags(InputError(text, where=where), flags)

    for python, typed in {
        "pass calibration=..., 100 inputs": "pass --calibration ..., 100 inputs",
        "pass size=0.5 to keep": "pass --width 0.5 to keep",
        "use score='l2', 'obs'": "use --score l2, 'obs'",
        "pass refine=[Refit(), Match()], and": "pass --refine refit,match, and",
        "fuse(..., verify=False) goes without": "--no-verify goes without",
        "one list each: classes=[[...], [...]]": "one list each: --classes",
        "output_dims names output 3": "--output-dims names output 3",
        "a size, its score": "a size, its score",
        "model(score=3)": "model(score=3)",
        "a.score=3, my_score=3, --score=3": "a.score=3, my_score=3, --score=3",
    }.items():
        found = reworded(python)
        assert type(found) is InputError
        assert found.what == typed
    assert reworded("", where="score=").where == "--score"
    assert reworded("", where="net(3, score=3)").where == "net(3, score=3)"
    assert "--freeze" not in str(reworded("freeze='a'"))


# How values are typed.


def test_forms_of_types() -> None:
    assert form_of(Any) is None
    with pytest.raises(TypeError, match="no form"):
        form_of(set[int] | None)
    number = form_of(int | Literal["mean"])
    assert number is not None
    assert [number.read("--x", text) for text in ("3", "mean")] == [3, "mean"]
    with pytest.raises(OptionError, match="--x 'some' cannot be read"):
        number.read("--x", "some")


def test_numbers_by_group() -> None:
    assert read_by_group("--width", ["2"]) == 2.0
    assert read_by_group("--width", []) is None
    for texts in (["a=1", "a=2"], ["1", "a=2"], ["a"], ["a="]):
        with pytest.raises(OptionError, match="--width"):
            read_by_group("--width", texts)


def test_dimensions_of_outputs() -> None:
    assert read_output_dims("--x", ["0=1,2", "3=", "1=-1"]) == {0: [1, 2], 3: [], 1: [-1]}
    for text in ("0", "a=1", "=1", "0=b", "0=1;2"):
        with pytest.raises(OptionError, match=r"--x .* cannot be read"):
            read_output_dims("--x", [text])


# What the classes have in common.


@dataclass(frozen=True)
class Base(Options):
    """Options.

    Attributes:
        kind: Its `kind`: one
            of two.
    """

    kind: Literal["a", "b"] | None = None


@dataclass(frozen=True)
class Derived(Base):
    """More options.

    Attributes:
        size: How large
            it is.

    Nothing else.
    """

    size: int | Literal["all"] = 1
    names: tuple[str, ...] = ()


def test_fields_are_described_by_docstrings() -> None:
    kind, size, names = fields_of(Derived)
    assert (kind.name, kind.help, kind.choices) == ("kind", "Its `kind`: one of two.", ("a", "b"))
    assert (size.help, size.default, size.choices) == ("How large it is.", 1, ())
    assert (names.help, names.type) == ("", tuple[str, ...])
    assert fields_of(Calibration)[0].default is MISSING


def test_listed_values_are_checked() -> None:
    assert Derived("a").kind == "a"
    assert Base().kind is None
    with pytest.raises(OptionError, match="unknown kind 'c'"):
        Derived("c")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean l2"):
        check_choice("score", "l3", ("l1", "l2", "obs"))
    with pytest.raises(OptionError):
        check_choice("number", True, (1, 2))
    with pytest.raises(OptionError, match="leave x out"):
        check_choice("x", "y", ())


def test_members_of_unions() -> None:
    assert alternatives(int | str | None) == (int, str, type(None))
    assert alternatives(dict[str, int]) == (dict[str, int],)


def required_of(kind: type) -> dict[str, Any]:
    """Something of the right type for each field without a default."""
    needed = [o for o in fields_of(kind) if o.default is MISSING]
    return {o.name: {} if get_origin(o.type) is Mapping else len for o in needed}


@pytest.mark.parametrize("kind", option_classes(), ids=lambda kind: kind.__name__)
def test_option_classes_are_frozen_and_compared_by_value(kind: type) -> None:
    required = required_of(kind)
    one = kind(**required)
    assert one == kind(**required)
    for option in fields_of(kind):
        with pytest.raises(AttributeError):
            setattr(one, option.name, None)
    assert repr(one).startswith(kind.__name__)


@pytest.mark.parametrize("kind", option_classes(), ids=lambda kind: kind.__name__)
def test_values_of_another_type_are_refused(kind: type) -> None:
    required = required_of(kind)
    for option in fields_of(kind):
        if option.type is Any:
            continue
        with pytest.raises(FxfuseError, match=option.name) as caught:
            kind(**required | {option.name: object()})
        assert caught.value.how


@pytest.mark.parametrize(
    "make",
    [
        lambda: fxfuse.Refit(alpha=-1),
        lambda: fxfuse.Refit(memory=-1),
        lambda: fxfuse.Match(weight_decay=-1e-4),
        lambda: fxfuse.Size(max_params=0),
        lambda: fxfuse.Size(multiple_of=-8),
    ],
    ids=["alpha", "memory", "weight_decay", "max_params", "multiple_of"],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(OptionError, match=r"at least|above 0"):
        make()


def test_the_first_method_is_the_default() -> None:
    assert METHOD.kind_of(None) is Transplant
    assert inspect.signature(fxfuse.fuse).parameters["method"].default == "transplant"
    assert "`transplant` by default" in parameters("fuse")["--method"].help
