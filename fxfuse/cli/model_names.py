"""Networks by the names under which libraries know them: `torchvision:`, `timm:`, `hf:`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fxfuse.cli.hub import local_folder
from fxfuse.common.json_file import read_json
from fxfuse.errors import MissingDependencyError, OptionError
from fxfuse.members.checkpoint import weights_in

#: What `save_pretrained` of transformers and `save_for_hf` of timm write beside weights.
_CONFIG = "config.json"


def named_factory(spec: str) -> Callable[..., Any] | None:
    """Return the factory that a library's name stands for, or None where the text is no such name.

    Names are `torchvision:resnet18`, `timm:convnext_tiny`, or `hf:FOLDER` and `timm:FOLDER` with
    what `save_pretrained` of transformers and `save_for_hf` of timm wrote. `hf:USER/NAME` is a
    folder of the hub.
    """
    library, _, name = spec.partition(":")
    return _LIBRARIES[library](name) if is_named(spec) else None


def is_named(spec: str) -> bool:
    """Tell whether a text is a library's name of a network, and not a function to import."""
    library, _, name = spec.partition(":")
    return library in _LIBRARIES and bool(name)


def is_pretrained(path: Path) -> bool:
    """Tell whether a folder is one that `save_pretrained` of transformers or timm wrote.

    Its weights have names that only transformers knows how to turn into the network's.
    """
    return (path / _CONFIG).is_file()


def suggestion(name: str) -> str:
    """Return the name that is most likely meant by one without a library, or ""."""
    # Here, since only a mistake needs it.
    from difflib import get_close_matches

    if is_pretrained(Path(name)):
        return f"hf:{name}"
    known: dict[str, list[str]] = {}
    for library, module in (("torchvision", "torchvision.models"), ("timm", "timm")):
        with contextlib.suppress(ImportError):
            known[library] = import_module(module).list_models()
    found = next((library for library, names in known.items() if name in names), None)
    if found is not None:
        return f"{found}:{name}"
    # The first library counts where both know a name.
    libraries = reversed(known.items())
    near = {n: library for library, names in libraries for n in get_close_matches(name, names)}
    best = get_close_matches(name, near, n=1)
    return f"{near[best[0]]}:{best[0]}" if best else ""


def _torchvision(name: str) -> Callable[..., Any]:
    models = library_module("torchvision.models", "torchvision", 'pip install "fxfuse[vision]"')
    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    factory: Callable[..., Any] = models.get_model_builder(name)
    return factory


def _timm(name: str) -> Callable[..., Any]:
    timm = library_module("timm", "timm")
    if is_pretrained(Path(name)):
        return lambda **arguments: timm.create_model(f"local-dir:{name}", **arguments)
    known = timm.list_models()
    # A tag behind a dot names pretrained weights, which are not wanted here.
    if name.partition(".")[0] not in known:
        raise _unknown("timm", name, known)

    def make(**arguments: Any) -> Any:
        _check_arguments("timm", arguments)
        return timm.create_model(name, **arguments)

    return make


def _transformers(folder: str) -> Callable[..., Any]:
    transformers = library_module("transformers", "transformers")
    # Its bars would stand among the results.
    transformers.utils.logging.disable_progress_bar()
    folder = str(local_folder(folder))
    if not is_pretrained(Path(folder)):
        raise OptionError(
            f"{folder} holds no transformers network",
            where=folder,
            why="there is no config.json in it",
            how="use a folder that save_pretrained wrote, or an id of the hub, hf:USER/NAME",
        )

    def make(**arguments: Any) -> nn.Module:
        _check_arguments("hf", arguments)
        _check_config(Path(folder) / _CONFIG, arguments)
        # Not asked for code of the folder's own: transformers would ask the user then.
        here = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **here, **arguments)
        if "use_cache" not in arguments and getattr(config, "use_cache", False):
            # A cache is no tensor, and one pass needs none.
            config.use_cache = False
        own = [getattr(transformers, name, None) for name in config.architectures or ()]
        classes: list[Any] = [c for c in own if isinstance(c, type) and issubclass(c, nn.Module)]
        made: nn.Module
        if weights_in(Path(folder)):
            kind = classes[0] if classes else transformers.AutoModel
            # weights_only: of a .bin file no object is unpickled.
            made = kind.from_pretrained(folder, config=config, weights_only=True, **here)
        else:
            whole = transformers.AutoModel.from_config
            made = classes[0](config) if classes else whole(config, trust_remote_code=False)
        return made

    return make


_LIBRARIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


#: Arguments with which libraries read weights of their own, unpickle them or run code of a folder.
_READING: Mapping[str, Collection[str]] = {
    "timm": ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
    "hf": ("trust_remote_code", "code_revision"),
}


def _check_arguments(library: str, arguments: Mapping[str, Any]) -> None:
    """Check that a library is not asked to read weights or code in a way of its own."""
    wrong = next((name for name in _READING[library] if name in arguments), None)
    if wrong is not None:
        raise OptionError(
            f"{library} networks are made without {wrong}",
            where=wrong,
            why="it can load pickled objects or code",
            how="leave it out; weights come from the members' checkpoints",
        )


def _check_config(path: Path, arguments: Mapping[str, Any]) -> None:
    """Check that a folder of transformers asks for no code from the network."""
    try:
        waiting: list[Any] = [arguments, read_json(path)]
    # transformers says that it is missing.
    except OSError:
        return
    except ValueError as error:
        raise OptionError(
            f"{path.parent.name} has an unusable configuration",
            where=str(path),
            why=str(error),
            how="copy the folder again, or write it again with save_pretrained",
        ) from error
    while waiting:
        value = waiting.pop()
        waiting += value if isinstance(value, list) else ()
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            waiting.append(inner)
            if "attn_implementation" in key and "/" in str(inner):
                raise OptionError(
                    f"{path.parent.name} asks for code from the network",
                    where=f"{key} in {path}",
                    why=f"transformers would download and run the kernel {str(inner)!r:.99}",
                    how="remove the entry, or load the network yourself",
                )


def library_module(module: str, name: str, how: str = "") -> Any:
    """Import a module of a library that may not be installed; `how` installs it."""
    how = how or f"pip install {name}"
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
