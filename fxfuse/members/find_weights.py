"""Which tensors of a checkpoint are a network's: nested, under a prefix, one of several sets."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fxfuse.common.options import Options
from fxfuse.errors import CheckpointError, OptionError

logger = logging.getLogger("fxfuse")

#: What keys and prefixes consist of that say no more than "these are a network's weights":
#: state_dict, model_state_dict, module., net, params_ema, ...
_WORDS = frozenset({"dict", "generator", "model", "module", "net", "network"})
_WORDS |= {"param", "params", "state", "weights"}
#: What says that weights are a moving average.
_AVERAGES = frozenset({"average", "averaged", "averaging", "avg", "ema", "swa"})
#: Modules that wrap others: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: What torch's `AveragedModel` counts beside the averages.
_COUNTS = frozenset({"n_averaged"})
#: What BatchNorm counts; torch loads weights without it, as those of old releases are.
COUNTER = "num_batches_tracked"
#: How deep state_dicts are looked for.
_DEPTH = 4


@dataclass(frozen=True)
class Checkpoints(Options):
    """How checkpoints are read.

    Attributes:
        weights: Where a checkpoint holds several: the key or the prefix of the weights to read,
            such as `ema`, `state_dict_ema` or `teacher`. None: the only ones that fit, or rather
            the weights than their moving average.
    """

    weights: str | None = None


class Shaped(Protocol):
    """What has a shape: a tensor, or what a file says of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint that have names of a network.

    Attributes:
        path: The keys under which the state_dict is in the checkpoint.
        prefix: What its names begin with and the network's do not, as in `module.`.
        names: The network's name → the checkpoint's name, which wrappers may be part of.
        others: The checkpoint's names that do not begin with `prefix`.
        faults: In what the rest differs from the network; empty where it fits.
    """

    path: tuple[str, ...]
    prefix: str
    names: Mapping[str, str]
    others: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def name(self) -> str:
        """How `weights=` names them."""
        return ".".join((*self.path, self.prefix)).strip(".")

    @property
    def parts(self) -> list[str]:
        """The keys and the parts of the prefix."""
        return [*self.path, *filter(None, self.prefix.split("."))]

    @property
    def rank(self) -> tuple[bool, bool]:
        """What is read if nothing is asked for: known keys first, weights before averages."""
        average = not _AVERAGES.isdisjoint(word for part in self.parts for word in _words(part))
        return not all(map(_is_known, self.path)), average

    @property
    def is_evident(self) -> bool:
        """Whether nothing but the network's weights can be meant.

        Another part of a larger network may have the same names, but not under such a prefix.
        """
        known = all(_is_known(part) for part in self.prefix.split(".") if part)
        return known or _COUNTS.issuperset(self.others)


def state_dicts(
    content: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, torch.Tensor]]]:
    """Yield the state_dicts in what a checkpoint holds, and the keys under which they are.

    What optimisers hold is none.
    """
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items()):
        yield path, content
    elif len(path) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and not key.startswith("optim"):
                yield from state_dicts(value, (*path, key))


def find_weights(
    stored: Sequence[tuple[tuple[str, ...], Mapping[str, Shaped]]],
    own: Mapping[str, Shaped],
    weights: str | None,
    source: Path,
) -> tuple[Weights, list[Weights]]:
    """Return the tensors of a checkpoint that are a network's, and others that fit, too.

    Args:
        stored: The state_dicts in it, and the keys under which they are.
        own: The network's tensors.
        weights: The key or prefix of those to read. None: the only ones, or rather the weights than
            their moving average.
        source: The checkpoint, for messages.
    """
    found = [one for path, state in stored for one in _under_each_prefix(path, state, own)]
    fitting = [one for one in found if not one.faults]
    if weights is not None:
        chosen = _named(fitting, weights) or _named(found, weights)
        if not chosen:
            names = dict.fromkeys(one.name or "(no key)" for one in fitting or found)
            raise OptionError(
                f"{source.name} holds no weights named {weights!r}",
                where=str(source),
                why=f"it holds {', '.join(map(repr, names))}",
                how="name one of them with weights=, or leave weights= out",
            )
    else:
        chosen = [one for one in fitting if one.is_evident]
        best = min((one.rank for one in chosen), default=None)
        chosen = [one for one in chosen if one.rank == best]
    if not chosen or chosen[0].faults:
        raise _misfit(chosen or found, fitting, own, source)
    if len(chosen) > 1:
        raise OptionError(
            f"{source.name} holds several weights that fit the model",
            where=str(source),
            why=f"they are {', '.join(repr(one.name) for one in chosen)}",
            how=f"name one of them, such as weights={chosen[0].name!r}",
        )
    return chosen[0], [one for one in fitting if one is not chosen[0]]


def differences(state: Mapping[str, Shaped], own: Mapping[str, Shaped]) -> tuple[str, ...]:
    """Return in what names and shapes of a state_dict differ from a model's, as torch would."""
    held = {id(own[name]) for name in state if name in own}
    missing = [
        name
        for name in own
        # Tied parameters are there under another name.
        if name not in state and id(own[name]) not in held and not name.endswith(COUNTER)
    ]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    listed = (
        ("the checkpoint lacks", missing),
        ("the model has no", unknown),
        ("shapes differ:", shapes),
    )
    return tuple(f"{label} {some(names)}" for label, names in listed if names)


def log_choice(chosen: Weights, others: Sequence[Weights], source: Path) -> None:
    """Say what was read; louder where others would fit, too."""
    said = [f"weights under {'.'.join(chosen.path)!r}"] if chosen.path else []
    named = chosen.names.items()
    removed = {stored.removesuffix(name) for name, stored in named}
    if len(removed) > 1:
        # Wrappers within the network.
        parts = {part for _, stored in named for part in stored.split(".")}
        removed = {f"{part}." for part in parts & _WRAPPERS} | {chosen.prefix}
    if removed := removed - {""}:
        said.append(f"names without {' and '.join(map(repr, sorted(removed)))}")
    if chosen.others:
        said.append(f"not read: {some(chosen.others)}")
    if others:
        names = " or ".join(f"weights={one.name!r}" for one in others[:3])
        said.append(f"{names} would read others that fit, too")
    if said:
        level = logging.WARNING if others else logging.INFO
        logger.log(level, "%s: %s", source.name, "; ".join(said))


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _under_each_prefix(
    path: tuple[str, ...], state: Mapping[str, Shaped], own: Mapping[str, Shaped]
) -> list[Weights]:
    """Return the tensors of a state_dict that have names of a network, for each prefix."""
    own_names, names = _without_wrappers(own), _without_wrappers(state)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, stored in names.items():
        parts = name.split(".")
        for start in range(len(parts)):
            own_name = own_names.get(".".join(parts[start:]))
            if own_name is not None:
                found[".".join((*parts[:start], ""))][own_name] = stored
    # Others are tails of names by chance, such as `weight`, and of no interest.
    most = max(map(len, found.values()), default=0)
    candidates = []
    for prefix, matched in (found or {"": {}}).items():
        if 2 * len(matched) < most:
            continue
        under = {n: s for n, s in names.items() if n.startswith(prefix) and n not in _COUNTS}
        taken = {s: own_name for own_name, s in matched.items()}
        tensors = {taken.get(s, n.removeprefix(prefix)): state[s] for n, s in under.items()}
        others = tuple(stored for name, stored in names.items() if name not in under)
        faults = differences(tensors, own)
        candidates.append(Weights(path, prefix, matched, others, faults))
    return candidates


def _without_wrappers(names: Mapping[str, Any]) -> dict[str, str]:
    """Return for each name without the parts that wrappers add: the name itself."""
    found = {".".join(p for p in name.split(".") if p not in _WRAPPERS): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _named(found: Sequence[Weights], text: str) -> list[Weights]:
    """Return those that a text names: by the whole name, a part of it, or a word of a part."""
    text = text.strip(".")
    return (
        [one for one in found if one.name == text]
        or [one for one in found if text in one.parts]
        or [one for one in found if any(text in _words(part) for part in one.parts)]
    )


def _words(part: str) -> list[str]:
    return re.findall(r"[a-z]+", part.lower())


def _is_known(part: str) -> bool:
    words = _words(part)
    return bool(words) and (_WORDS | _AVERAGES).issuperset(words)


def _misfit(
    found: Sequence[Weights],
    fitting: Sequence[Weights],
    own: Mapping[str, Shaped],
    source: Path,
) -> CheckpointError:
    """Return the error for a checkpoint that does not fit: what fits nearly, and what would fit."""
    nearest = max(found, key=lambda one: (len(one.names), one.is_evident))
    how = "build the model with the arguments that it was trained with"
    if fitting:
        names = " or ".join(f"weights={one.name!r}" for one in fitting[:3])
        how = f"if a part of the checkpoint is meant, name it: {names}"
    elif not nearest.names:
        how = f"use the checkpoint of a model that has {next(iter(own), 'tensors')}, or rename its "
        how += "tensors as the model's are named"
    under = f"under {nearest.name!r}: " if nearest.name else ""
    return CheckpointError(
        f"{source.name} does not fit the model",
        where=str(source),
        why=under + "; ".join(nearest.faults),
        how=how,
    )
