"""`.pt` files as torch writes them, read by torch's weights-only reader: nothing in them runs."""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from fxfuse.errors import CheckpointError

#: What torch's older format names even where it holds tensors only.
_PLAIN_GLOBALS = ("collections OrderedDict", "torch._utils _rebuild", "torch ")


class StandIn:
    """Takes the place of an object of a class that torch's reader does not know.

    It accepts what an object is made with, and drops it; nothing can be set on it.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Make one of whatever arguments the object had."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep none of them."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of the object's content, either."""


def read_torch(path: Path, *, mmap: bool = False, stand_ins: bool = False) -> Any:
    """Read the plain containers and tensors of a file onto the CPU.

    `mmap`: tensors stay in the file until they are used, where its format allows that.
    `stand_ins`: pickled objects may be beside tensors, and each is read as a `StandIn`. torch's
    reader looks a class up by its name and never imports it; here all unknown names mean `StandIn`,
    so no code of another class or function can run.
    """
    try:
        # A damaged one is an error even here.
        zipped = zipfile.is_zipfile(path)
        _check_sums(path)
        # Without them a file with objects is rejected by torch.
        unknown = _unknown_names(path) if stand_ins and zipped else []
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(StandIn, name) for name in unknown]),
        ):
            # A rejected file gets an error of its own; torch's advice to report it is beside it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    # torch's reader has no error class of its own: a damaged file comes out as UnpicklingError,
    # RuntimeError, EOFError, KeyError and others.
    except Exception as error:
        check_no_objects(path, error)
        text = str(error).strip().split("\n")[0].split(". ")[0]
        raise corrupt(path, f"{type(error).__name__}: {text}".rstrip(": ")) from error


def check_no_objects(path: Path, cause: Exception | None = None) -> None:
    """Check that a file holds no pickled objects; the error says how to export the weights."""
    objects = _pickled_objects(path)
    if objects:
        raise CheckpointError(
            f"{path.name} holds pickled Python objects",
            where=str(path),
            why=f"unpickling can run any code, and this file imports {objects}",
            how="if you trust the file, load it where it was made, with "
            "torch.load(path, weights_only=False), and save model.state_dict() alone with "
            "torch.save or safetensors.torch.save_file",
        ) from cause


def _unknown_names(path: Path) -> list[str]:
    """Return what a zipped file would import besides what torch's reader knows; nothing is read."""
    return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))


def _check_sums(path: Path) -> None:
    """Check the checksums that the zip format of torch holds, and its reader does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # A few of its bytes could become gigabytes.
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{entry.filename} is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _pickled_objects(path: Path) -> str:
    """What a rejected file would import, found without unpickling; empty for a damaged file."""
    try:
        if zipfile.is_zipfile(path):
            return ", ".join(_unknown_names(path))
        with path.open("rb") as file:
            # torch's older format is a few pickles in a row; a bare pickle is one.
            while file.peek(1):
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL" and not str(argument).startswith(_PLAIN_GLOBALS):
                        return str(argument).replace(" ", ".")
                    if opcode.name == "STACK_GLOBAL":
                        return "a Python object"
    except Exception:
        # Neither a whole archive nor a whole pickle: damaged, and nothing to name.
        return ""
    return ""


def check_openable(path: Path) -> None:
    """Check that a checkpoint can be opened."""
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise missing(path, error) from error


def missing(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a checkpoint that cannot be opened."""
    return CheckpointError(
        f"cannot open the checkpoint {path.name}",
        where=str(path),
        why=error.strerror or str(error),
        how="check the path and its permissions",
    )


def corrupt(path: Path, why: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be read."""
    return CheckpointError(
        f"the checkpoint {path.name} is damaged",
        where=str(path),
        why=why,
        how="copy or download the file again; it is truncated, or not a checkpoint",
    )
