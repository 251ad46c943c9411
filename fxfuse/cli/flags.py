"""The flags of the command line, made from the option classes, which `GROUPS` lists once.

A field becomes a flag of its name, behind its group's prefix where the name alone would be unclear
or taken. The help is what its class's docstring says. A flag that is not given is not passed on, so
defaults are those of the class. Fields that hold inputs or a function cannot be typed and have no
flag: calibration inputs are `--calibration DATA`, and `Calibration.evaluate` is for Python only. So
are tasks made of functions or of other tasks.

The recipe's schema (`fxfuse.cli.recipe.schema`) is made from the same table.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, get_type_hints

import typer

from fxfuse.activations.calibration import Calibration
from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.label_spaces import Heads
from fxfuse.cli.forms import Form, form_of
from fxfuse.cli.options import CALIBRATION_PANEL, EXPERT, PANELS
from fxfuse.cli.sources import Images
from fxfuse.cli.training import Training
from fxfuse.cli.wording import naming_flags
from fxfuse.common.options import OptionField, check_choice, fields_of
from fxfuse.errors import FxfuseError, OptionError
from fxfuse.members.find_weights import Checkpoints
from fxfuse.planning.methods import methods
from fxfuse.planning.size import Size
from fxfuse.refine import (
    Classification,
    Embedding,
    Match,
    MultiLabel,
    NextToken,
    Refit,
    Regression,
)


@dataclass(frozen=True, eq=False)
class Group:
    """An option class, or several of which one is chosen by name.

    Attributes:
        name: Of the argument that takes it, in Python, in recipes and of the flag that chooses.
        flags: Fields whose flag has a name of its own.
        help: What the choice means, where there is one.
    """

    name: str
    kinds: Mapping[str, type]
    prefix: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)
    help: str = ""

    def kind_of(self, name: str | None) -> type:
        """Return the class of a name; None: the first one."""
        if name is not None:
            check_choice(f"--{self.name}", name, tuple(self.kinds))
        return self.kinds[name or next(iter(self.kinds))]


METHOD = Group(
    "method",
    # The default first.
    {"transplant": methods()["transplant"], **methods()},
    help="How units of the members are chosen and combined, `transplant` by default.",
)
SIZE = Group("size", {"size": Size}, flags={"batch": "latency-batch"})
CONSTRAINTS = Group("constraints", {"constraints": Constraints})
HEADS = Group("heads", {"heads": Heads}, flags={"modules": "heads", "output": "head-output"})
CALIBRATION = Group(
    "calibration", {"calibration": Calibration}, flags={"limit": "calibration-limit"}
)
#: A recipe has its fields beside the source of each data set.
IMAGES = Group("images", {"images": Images}, flags={"size": "image-size"})
TASK = Group(
    "task",
    {
        "classification": Classification,
        "next_token": NextToken,
        "multi_label": MultiLabel,
        "regression": Regression,
        "embedding": Embedding,
    },
    prefix="task-",
    help="What the output means, and so what the ensemble is; the graph decides if left out.",
)
REFIT = Group("refit", {"refit": Refit}, prefix="refit-")
MATCH = Group("match", {"match": Match}, prefix="match-")
TRAINING = Group("train", {"train": Training})
#: A recipe has its fields beside the path of each member.
CHECKPOINTS = Group("checkpoints", {"checkpoints": Checkpoints})

GROUPS = (
    CHECKPOINTS,
    METHOD,
    SIZE,
    CALIBRATION,
    IMAGES,
    TASK,
    REFIT,
    MATCH,
    CONSTRAINTS,
    HEADS,
    TRAINING,
)
#: The groups that are steps of `--refine`, in their order.
STEPS = (REFIT, MATCH)

_REFINE = Annotated[
    str | None,
    typer.Option(
        "--refine",
        help="What follows the fusion: `refit`, `match`, `refit,match` or `none`. Left out: both "
        "with calibration inputs (`refit` only with heads or free outputs), else nothing.",
        metavar="STEPS",
    ),
]


@dataclass(frozen=True)
class Flag:
    """A flag.

    Attributes:
        name: As it is typed, such as `--match-steps`.
        fields: The field of each class of the group that has it, by the class's name.
    """

    name: str
    group: Group
    fields: Mapping[str, OptionField]

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds its value."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def forms(self) -> dict[str, Form]:
        """How it is typed, for each class."""
        forms = {name: form_of(option.type) for name, option in self.fields.items()}
        return {name: form for name, form in forms.items() if form is not None}

    @property
    def help(self) -> str:
        """What each class's docstring says of it, how it is typed, and the default."""
        texts: dict[str, list[str]] = {}
        for name, option in self.fields.items():
            texts.setdefault(option.help, []).append(name)
        if len(self.group.kinds) > 1:
            parts = [f"For {_names(names)}: {text}" for text, names in texts.items()]
        else:
            parts = list(texts)
        parts += dict.fromkeys(form.note for form in self.forms.values())
        defaults = {str(option.default) for option in self.fields.values()}
        if len(defaults) == 1 and defaults.isdisjoint({"None", "()", "{}"}):
            parts.append(f"Default: {_names(defaults)}.")
        return " ".join(filter(None, parts))

    def annotation(self) -> Any:
        """Return what typer makes the flag from."""
        forms = list(self.forms.values())
        kinds = {str(form.kind): form.kind for form in forms}
        kind = next(iter(kinds.values())) if len(kinds) == 1 else str
        words = (word for form in forms for word in (form.metavar or "").split("|") if word)
        option = typer.Option(
            f"{self.name}/--no-{self.name[2:]}" if kind is bool else self.name,
            help=self.help,
            metavar="|".join(dict.fromkeys(words)) or None,
            show_default=False,
            rich_help_panel=_panel(self.group),
        )
        return Annotated[kind | None, option]


def options_of(kind: type) -> tuple[OptionField, ...]:
    """Return the fields of an option class that can be typed; not inputs and functions."""
    return tuple(option for option in fields_of(kind) if form_of(option.type) is not None)


def flags_of(group: Group) -> tuple[Flag, ...]:
    """Return the flags of a group's fields, in their order."""
    found: dict[str, dict[str, OptionField]] = {}
    for name, kind in group.kinds.items():
        for option in options_of(kind):
            own = group.flags.get(option.name, group.prefix + option.name.replace("_", "-"))
            found.setdefault(f"--{own}", {})[name] = option
    return tuple(Flag(flag, group, fields) for flag, fields in found.items())


@dataclass(frozen=True)
class Given:
    """The flags of a command's groups that were given: what typer read, by parameter."""

    groups: tuple[Group, ...]
    values: Mapping[str, Any]

    def names(self, *groups: Group) -> list[str]:
        """Return the flags of some groups that were given."""
        found = [f"--{g.name}" for g in groups if len(g.kinds) > 1 and self.values.get(g.name)]
        return found + [flag.name for group in groups for flag in self._flags(group)]

    def options(self, group: Group) -> dict[str, Any]:
        """Return the fields of a group that were given, as a recipe holds them."""
        chosen = self.values.get(group.name) if len(group.kinds) > 1 else None
        kind = group.kind_of(chosen)
        name = chosen or next(iter(group.kinds))
        found = {}
        for flag in self._flags(group):
            if name not in flag.fields:
                own = [f.name for f in flags_of(group) if name in f.fields]
                raise OptionError(
                    f"{group.name} {name!r} has no {flag.name}",
                    how=f"leave it out; there is {', '.join(own)}" if own else "leave it out",
                )
            read = flag.forms[name].read
            found[flag.fields[name].name] = read(flag.name, self.values[flag.parameter])
        inputs = {option.name: None for option in fields_of(kind) if option.default is MISSING}
        try:
            kind(**inputs, **found)
        except FxfuseError as error:
            raise naming_flags(error, _python_names(group, name), bare=True) from None
        return {"name": name, **found} if chosen else found

    def make(self, group: Group) -> Any:
        """Make the object of a group."""
        options = self.options(group)
        return group.kind_of(options.pop("name", None))(**options)

    def recipe(self, **defaults: Any) -> dict[str, Any]:
        """Return what was given, as the part `fuse` of a recipe; `defaults` fill the rest."""
        found = dict(defaults)
        for group in self.groups:
            if group not in (*STEPS, CHECKPOINTS, IMAGES) and (options := self.options(group)):
                found[group.name] = options
        steps = self._steps(found.get("refine"))
        return found if steps is None else {**found, "refine": steps}

    def sources(self, *specs: str | None, like: Mapping[str, Any] | None = None) -> list[Any]:
        """Return sources of data as a recipe holds them, or None where there is none.

        `like` says how images are prepared where no flag does.
        """
        flags = self.names(IMAGES)
        if flags and not any(specs):
            raise OptionError(
                f"{', '.join(flags)}: there are no images",
                why="no flag names any data",
                how="leave it out, or name a source of images",
            )
        prepared = {**(like or {}), **self.options(IMAGES)}
        return [None if spec is None else {**prepared, "source": spec} for spec in specs]

    def _steps(self, default: list[str] | None) -> list[Any] | None:
        if not set(STEPS) & set(self.groups):
            return None
        given = {group.name: options for group in STEPS if (options := self.options(group))}
        text, known = self.values.get("refine"), [group.name for group in STEPS]
        if text is not None:
            text = text.replace(" ", "")
            if text not in (",".join(known), *known, "none"):
                how = "use `refit`, `match`, `refit,match` in this order, or `none`"
                raise OptionError(f"unknown --refine {text!r}", how=how)
            names = [] if text == "none" else text.split(",")
        else:
            names = default or (known if given else None)
        idle = [group for group in STEPS if group.name in given and group.name not in (names or ())]
        if idle:
            flags = ", ".join(self.names(*idle))
            raise OptionError(
                f"{flags}: --refine does not name {idle[0].name}",
                how=f"leave it out, or add {idle[0].name} to --refine",
            )
        return names and [{name: given[name]} if name in given else name for name in names]

    def _flags(self, group: Group) -> list[Flag]:
        return [f for f in flags_of(group) if self.values.get(f.parameter) not in (None, [])]


def takes(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of option classes.

    The command has a parameter `given` in place of them, which gets a `Given`. What Python calls
    the options is kept as `flag_names`, for messages.
    """
    made: list[inspect.Parameter] = []
    for group in groups:
        if group is STEPS[0]:
            made.append(_parameter("refine", _REFINE))
        made += _parameters(group)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            read = {parameter.name: values.pop(parameter.name) for parameter in made}
            command(**values, given=Given(groups, read))

        parameters: list[inspect.Parameter] = []
        for name, own in inspect.signature(command).parameters.items():
            typed = own.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += made if name == "given" else [typed]
        parameters.sort(key=_rank)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.flag_names = _names_of(groups)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameters(group: Group) -> list[inspect.Parameter]:
    """Return the parameters of a command that hold a group's flags."""
    found = [_parameter(flag.parameter, flag.annotation()) for flag in flags_of(group)]
    if len(group.kinds) == 1:
        return found
    option = typer.Option(
        f"--{group.name}",
        help=f"{group.help} One of {_names(group.kinds)}.",
        metavar=group.name.upper(),
        show_default=False,
        rich_help_panel=_panel(group),
    )
    return [_parameter(group.name, Annotated[str | None, option]), *found]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _panel(group: Group) -> str:
    """Return the part of a command's help in which a group's flags are."""
    if group in (CALIBRATION, IMAGES):
        return CALIBRATION_PANEL
    return group.name.capitalize() if group in (SIZE, HEADS) else EXPERT


def _rank(parameter: inspect.Parameter) -> int:
    """Return how far down in a command's help the part with a parameter stands."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    panel = next((m.rich_help_panel for m in metadata if hasattr(m, "rich_help_panel")), None)
    return PANELS.index(panel) if panel in PANELS else -1


def _python_names(group: Group, kind: str) -> dict[str, str]:
    """Return what Python calls the options of a class → flag."""
    return {f.fields[kind].name: f.name for f in flags_of(group) if kind in f.fields}


def _names_of(groups: Iterable[Group]) -> dict[str, str]:
    """What Python calls the options of some groups → flag; names of two flags are left out."""
    found: dict[str, set[str]] = {"size": {"--width"}, "refine": {"--refine"}}
    for group in groups:
        if len(group.kinds) > 1:
            found.setdefault(group.name, set()).add(f"--{group.name}")
        for kind in group.kinds:
            for name, flag in _python_names(group, kind).items():
                found.setdefault(name, set()).add(flag)
    if HEADS in groups:
        found["heads"] = {"--heads"}
    return {name: flags.pop() for name, flags in found.items() if len(flags) == 1}
