"""A network of another size built from its class's own configuration, as transformers has them.

Nothing is known of any architecture. Numbers of the configuration change until a network that is
built from it has the wanted tensors, and then until it answers as it has to: the number of heads,
for instance, shows in no tensor's shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxfuse.graph.example import first_line

#: Networks that are built without any memory, to see what shapes their tensors have.
_TRIES = 200
#: Attribute of a configuration, in the configuration of a part: `text_config`, `hidden_size`.
_Path = tuple[str, ...]
_Sizes = Mapping[int, set[int]]


def has_config(model: nn.Module) -> bool:
    """Tell whether a network's class builds it from a configuration that it keeps and saves."""
    config = getattr(model, "config", None)
    return all(callable(getattr(x, "save_pretrained", None)) for x in (model, config))


def config_problem(model: nn.Module) -> str:
    """Return what of a network its configuration does not give, or ""."""
    state = model.state_dict()
    try:
        built = _shapes(type(model), model.config)
    # A class may raise anything.
    except Exception as error:
        return f"{type(model).__name__} cannot be built from its configuration: {first_line(error)}"
    wrong = _wrong(built, {name: x.shape for name, x in state.items()})
    if not wrong:
        return ""
    name = wrong[0]
    given = f"gives {list(built[name])}" if name in built else "has no such tensor"
    shape = list(state[name].shape) if name in state else "missing"
    return f"{name} is {shape}, its configuration {given} ({len(wrong)} tensors in all)"


def configured(
    source: nn.Module,
    state: Mapping[str, torch.Tensor],
    sizes: _Sizes,
    difference: Callable[[nn.Module], str],
) -> nn.Module | None:
    """Build a network of the class of `source` from a configuration that gives its new tensors.

    Args:
        source: A network of the class, of another size.
        state: The new tensors by name.
        sizes: What sizes became: before → after.
        difference: Returns how a network answers otherwise than it has to; "" where it does not.

    Returns:
        The network, in the mode of `source`; None where no configuration gives it.
    """
    if not has_config(source):
        return None
    search = _Search(type(source), {name: tensor.shape for name, tensor in state.items()}, sizes)
    first, dtype = next(iter(state.values())), getattr(source, "dtype", None)
    for found in search.all_fitting(source.config):
        model = _built(type(source), found, dtype).to(first.device)
        model.load_state_dict(dict(state), strict=False)
        if not difference(model.eval()):
            return model.train(source.training)
    return None


def _built(kind: type, config: Any, dtype: torch.dtype | None) -> nn.Module:
    """Build a network, its weights in their dtype at once: in float32 they may be too large."""
    if dtype is None or not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(dtype)
        try:
            made: nn.Module = kind(config)
        # Some initial values cannot be drawn in half precision.
        except RuntimeError:
            torch.set_default_dtype(before)
            made = kind(config).to(dtype)
        finally:
            torch.set_default_dtype(before)
    return made


class _Search:
    """Looks for a configuration.

    Args:
        kind: Class of the network.
        shapes: Shapes that its tensors are to have.
        sizes: What sizes became.
    """

    def __init__(self, kind: type, shapes: Mapping[str, torch.Size], sizes: _Sizes) -> None:
        self.kind, self.shapes, self.sizes = kind, shapes, sizes
        self.tries = _TRIES

    def all_fitting(self, config: Any) -> Iterator[Any]:
        """Yield configurations with the wanted shapes, the most likely ones first."""
        first = self._fitting(config)
        if first is None:
            return
        yield first
        # The heads' size may have been taken for their number.
        before, after = dict(_numbers(config)), dict(_numbers(first))
        changed = [path for path in before if after.get(path) != before[path]]
        each = [self._fitting(config, without=path) for path in changed]
        others = [other for other in each if other is not None]
        yield from others
        # A number that no shape shows goes along with those that do.
        for fitted in (first, *others):
            same = self._changes(fitted, exact=False)
            yield from (other for other in same if not self._count(other))

    def _fitting(self, config: Any, without: _Path = ()) -> Any:
        """Change one number after the other, each time the one that makes most shapes right.

        The number at the path `without` stays. Returns None where that leads nowhere.
        """
        wrong = self._count(config)
        while wrong:
            best = None
            for exact in (True, False):
                for changed in self._changes(config, exact=exact, without=without):
                    count = self._count(changed)
                    if count < wrong:
                        best, wrong = changed, count
                if best is not None:
                    break
            if best is None:
                return None
            config = best
        return config

    def _changes(self, config: Any, *, exact: bool, without: _Path = ()) -> Iterator[Any]:
        """Yield configurations that differ in one number: it was a size, or goes along with one."""
        for path, value in _numbers(config):
            for new in self._candidates(value, exact=exact) if path != without else ():
                changed = copy.deepcopy(config)
                owner = changed
                for name in path[:-1]:
                    owner = getattr(owner, name)
                try:
                    setattr(owner, path[-1], new)
                # A configuration may check what it is given.
                except Exception:
                    continue
                yield changed

    def _candidates(self, value: Any, *, exact: bool) -> list[Any]:
        if isinstance(value, list | tuple):
            each = [self._candidates(x, exact=exact) for x in value]
            new = [found[0] if found else x for x, found in zip(value, each, strict=True)]
            return [type(value)(new)] if new != list(value) else []
        found = sorted(self.sizes.get(value, ()))
        if not exact:
            pairs = ((a, b) for a, afters in self.sizes.items() for b in afters)
            found += [value * b // a for a, b in pairs if not value * b % a]
        return [new for new in dict.fromkeys(found) if new not in (value, 0)]

    def _count(self, config: Any) -> int:
        """Return how many tensors have another shape, or more than there are."""
        if not self.tries:
            return len(self.shapes) + 1
        self.tries -= 1
        try:
            return len(_wrong(_shapes(self.kind, config), self.shapes))
        except Exception:
            return len(self.shapes) + 1


def _numbers(config: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yield the sizes that a configuration holds, and lists of them, with those of its parts."""
    for name, value in vars(config).items():
        whole = type(value) is int and value > 0
        several = isinstance(value, list | tuple) and value and all(type(x) is int for x in value)
        if whole or several:
            yield (*path, name), value
        elif callable(getattr(value, "to_dict", None)):
            yield from _numbers(value, (*path, name))


def _shapes(kind: type, config: Any) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of a network, which is built without its memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = kind(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _wrong(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    return [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
