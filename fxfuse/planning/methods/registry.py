"""The registry of fusion methods (how to add one: docs/how-to/add-a-method.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.common.options import Options, check_choice, fields_of
from fxfuse.errors import OptionError, RuleError
from fxfuse.planning.context import Context, State
from fxfuse.planning.plan import UnitMap


class Method(Options, ABC):
    """A fusion method: a frozen dataclass of its options that makes the maps of all groups.

    A subclass is a frozen dataclass, registered with `@method("its_name")`. Its docstring describes
    its options in an `Attributes` section, from which the command line's flags and the recipe's
    schema are made.
    """

    #: What users call it: the name it is registered with, the class's where it is not.
    name: ClassVar[str]
    #: Whether it fills any number of units; else each fused unit has the place of a unit of a
    #: reference member, and the result has that member's size.
    any_size: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__

    @property
    def weights_only(self) -> bool:
        """Whether calibration inputs are of no use to it, as it looks at weights only."""
        return False

    @abstractmethod
    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the merge and unmerge maps, one for each coupling group.

        Args:
            graph: The analysis of the members.
            states: For each member, its tensors by name.
            context: Sizes, calibration inputs and what else there is to look at.
        """

    def described(self, graph: CouplingGraph, context: Context) -> dict[str, str]:
        """Return what a plan says of the options: those that are not at their default, as text."""
        return {
            option.name: str(getattr(self, option.name))
            for option in fields_of(type(self))
            if getattr(self, option.name) != option.default
        }


_METHODS: dict[str, type[Method]] = {}
Kind = TypeVar("Kind", bound=type[Method])


def method(name: str) -> Any:
    """Register a class as a fusion method.

    Args:
        name: What users call it.

    Raises:
        RuleError: There is a method of this name.
    """

    def register(kind: Kind) -> Kind:
        if name in _METHODS:
            raise RuleError(f"method {name!r} is registered twice", how="choose another name")
        kind.name = name
        _METHODS[name] = kind
        return kind

    return register


def find_method(given: str | Method) -> Method:
    """Return the method that a name means, with its default options, or the one that was given.

    Raises:
        OptionError: There is no such method.
    """
    if isinstance(given, Method):
        return given
    kind: Any = given
    if isinstance(kind, type) and issubclass(kind, Method):
        raise OptionError(
            f"{kind.__name__} is a class, not a method with its options",
            where="method",
            how=f"pass {kind.__name__}()",
        )
    check_choice("method", given, tuple(sorted(_METHODS)))
    return _METHODS[given]()


def methods() -> Mapping[str, type[Method]]:
    """Return all methods by name, read-only."""
    return MappingProxyType(_METHODS)
