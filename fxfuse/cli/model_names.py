"""Networks by the names under which libraries know them: `torchvision:`, `timm:`, `hf:`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fxfuse.errors import MissingDependencyError, OptionError
from fxfuse.members.checkpoint import weights_in

#: What `save_pretrained` of transformers and `save_for_hf` of timm write beside weights.
_CONFIG = "config.json"


def named_factory(spec: str) -> Callable[..., Any] | None:
    """Return the factory that a library's name stands for, or None where the text is no such name.

    Names are `torchvision:resnet18`, `timm:convnext_tiny`, or `hf:FOLDER` and `timm:FOLDER` with
    what `save_pretrained` of transformers and `save_for_hf` of timm wrote.
    """
    library, _, name = spec.partition(":")
    make = _LIBRARIES.get(library)
    return make(name) if make and name else None


def is_pretrained(path: Path) -> bool:
    """Tell whether a folder is one that `save_pretrained` of transformers or timm wrote.

    Its weights have names that only transformers knows how to turn into the network's.
    """
    return (path / _CONFIG).is_file()


def _torchvision(name: str) -> Callable[..., Any]:
    models = _library("torchvision.models", "torchvision", 'pip install "fxfuse[vision]"')
    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    factory: Callable[..., Any] = models.get_model_builder(name)
    return factory


def _timm(name: str) -> Callable[..., Any]:
    timm = _library("timm", "timm", "pip install timm")
    if is_pretrained(Path(name)):
        return lambda **arguments: timm.create_model(f"local-dir:{name}", **arguments)
    known = timm.list_models()
    # A tag behind a dot names pretrained weights, which are not wanted here.
    if name.partition(".")[0] not in known:
        raise _unknown("timm", name, known)
    return lambda **arguments: timm.create_model(name, **arguments)


def _transformers(folder: str) -> Callable[..., Any]:
    transformers = _library("transformers", "transformers", "pip install transformers")
    if not is_pretrained(Path(folder)):
        raise OptionError(
            f"{folder} holds no transformers network",
            where=folder,
            why="there is no config.json in it",
            how="use a folder that save_pretrained wrote; nothing is downloaded",
        )

    def make(**arguments: Any) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **arguments)
        own = [getattr(transformers, name, None) for name in config.architectures or ()]
        classes: list[Any] = [c for c in own if isinstance(c, type) and issubclass(c, nn.Module)]
        made: nn.Module
        if weights_in(Path(folder)):
            kind = classes[0] if classes else transformers.AutoModel
            # weights_only: of a .bin file no object is unpickled.
            made = kind.from_pretrained(
                folder, config=config, local_files_only=True, weights_only=True
            )
        else:
            made = classes[0](config) if classes else transformers.AutoModel.from_config(config)
        return made

    return make


_LIBRARIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


def _library(module: str, name: str, how: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{name} is not installed", why=str(error), how=how) from error


def _unknown(library: str, name: str, known: list[str]) -> OptionError:
    # Here, since only a mistake needs it.
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return OptionError(
        f"{library} has no network {name!r}",
        where=f"{library}:{name}",
        why=f"it has {len(known)} others",
        how=f"use {' or '.join(near)}" if near else "check the spelling",
    )
