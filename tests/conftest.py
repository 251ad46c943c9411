"""What every test shares: one thread, fixed seeds, one cache of compiled kernels."""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both before torch is imported. Workers of pytest-xdist share the cache and compile in-process:
# a pool of compiler processes in each of them would only fight over the cores.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor")
)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

import fxfuse

torch.set_num_threads(1)

# The same examples everywhere, unless someone goes looking for new ones.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=12)
settings.register_profile("explore", deadline=None, max_examples=200)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """At night, API that torch is about to take away is an error, wherever it is called."""
    if "nightly" in (config.option.markexpr, config.getoption("--hypothesis-profile", None)):
        for kind in ("DeprecationWarning", "FutureWarning"):
            # The last filter that fits wins, so this one beats that of pyproject.toml.
            config.addinivalue_line("filterwarnings", rf"error::{kind}:(fxfuse|torch)(\.|$)")


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what stays until the end.

    That is hundreds of thousands of objects, which it would traverse at every export: a sixth of
    the time of most tests. Nor does it look at each few hundred of the objects that a trace makes.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker files in one piece, whose fixtures are then made once, and let it steal."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


#: Tensors of more values are not copied: that nothing was written into them is enough.
_SMALL = 10_000


def _looked_at(module: torch.nn.Module) -> list[Any]:
    """What oracle 6 compares of a network: modes, and tensors and the values in them."""
    found: list[Any] = [part.training for part in module.modules()]
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
        plain = plain and tensor.layout is torch.strided and not tensor.is_quantized
        if plain and tensor.numel() <= _SMALL:
            values = tensor.detach().cpu().reshape(-1).contiguous()
            found += [id(tensor), values.view(torch.uint8).numpy().tobytes()]
        else:
            found += [id(tensor), tensor._version]
    return found


def _leaves_members_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Oracle 6: a function of fxfuse that asserts that networks and random state stay the same."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            # Others may be at the same members meanwhile; tests of threads look themselves.
            return function(*args, **kwargs)
        given = (getattr(args[0], "networks", args[0]) if args else ()), args[1:]
        leaves = torch.utils._pytree.tree_leaves(given)
        modules = [x for x in leaves if isinstance(x, torch.nn.Module)]
        # A loader draws the order of its batches.
        loaders = any(isinstance(x, torch.utils.data.DataLoader) for x in kwargs.values())

        def looked_at() -> list[Any]:
            state = [] if loaders else torch.get_rng_state().tolist()
            return [state, *map(_looked_at, modules)]

        before = looked_at()
        try:
            return function(*args, **kwargs)
        finally:
            same = looked_at() == before
            assert same, f"{function.__name__} changes its members or the random state"

    return checked


for _name in ("analyze", "capture", "fuse", "plan", "prune", "stack"):
    setattr(fxfuse, _name, _leaves_members_alone(getattr(fxfuse, _name)))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # third parties read the global generator
    torch.manual_seed(0)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever measures, fits or trains after a fusion fails the test."""

    def work(*given: Any, **options: Any) -> None:
        raise AssertionError("work has started")

    for step in ("refit_state", "train", "ask_members"):
        monkeypatch.setattr(f"fxfuse.refine.pipeline.{step}", work)
