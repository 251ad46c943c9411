"""Kills, threads and long runs: what is left is whole, members are as before, memory is flat.

    python -m benchmarks.reliability [--rounds 200] [--json benchmarks/results/reliability.json]

Kills: a child process replaces a folder of three files again and again, each time with another
content; after a random while it is killed. The folder must then hold three files of one content.
Threads: four of them fuse members, the same ones and their own in turns. Each result must be what
one thread alone gets, and the members as they were, bit for bit. Memory: objects of Python and
bytes of the process, after as many fusions one after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sympy.core.cache import clear_cache
from torch import nn

import fxfuse
from benchmarks.records import write
from fxfuse.common.output import MARK, atomic_folder

NAMES = ("weights", "plan", "summary")
_BYTES = 200_000
_CHILD = f"""
import sys
from pathlib import Path
from fxfuse.common.output import atomic_folder
path, version = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    version += 1
    with atomic_folder(path, {NAMES!r}, force=True) as folder:
        for name in {NAMES!r}:
            (folder / name).write_text(f"{{version:09}}" * {_BYTES // 9} + {MARK!r})
"""


def content(folder: Path) -> int:
    """The version that a folder holds.

    Raises:
        AssertionError: It is not whole.
    """
    found = {name: (folder / name).read_text() for name in NAMES}
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(NAMES)
    versions = {text[:9] for text in found.values()}
    assert len(versions) == 1, versions
    (version,) = versions
    assert all(text == version * (_BYTES // 9) + MARK for text in found.values())
    return int(version)


def killed(rounds: int, seed: int = 0) -> dict[str, int]:
    """Kills a writer again and again; counts what was found afterwards.

    Raises:
        AssertionError: A folder was not whole.
    """
    rng, counts = random.Random(seed), {"rounds": 0, "replaced": 0, "left over": 0}
    with tempfile.TemporaryDirectory() as work:
        # What a killed writer leaves, a lock and an unfinished folder, is the next one's to remove.
        path, version = Path(work) / "result", 0
        for _ in range(rounds):
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(path), str(version)], stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0.002, 0.06))
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
            counts["rounds"] += 1
            if path.exists():
                now = content(path)
                assert now >= version
                counts["replaced"] += now - version
                version = now
            else:
                assert version == 0, "the result of an earlier round is gone"
        with atomic_folder(path, NAMES, force=True) as folder:
            (folder / NAMES[0]).write_text(f"the last one, {MARK}")
        counts["left over"] = len(list(Path(work).iterdir())) - 1
    return counts


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def in_threads(fusions: int, threads: int = 4) -> dict[str, int]:
    """Fuses at once; counts results and members that are not as they should be."""
    x, shared = torch.randn(4, 3, 8, 8), [network(0), network(1)]
    expected = fxfuse.fuse([network(0), network(1)], x).state_dict()
    counts = {"fusions": fusions, "threads": threads, "errors": 0, "results": 0, "members": 0}

    def differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
        return any(not torch.equal(found[name], tensor) for name, tensor in wanted.items())

    # Seeds are the process's, and shared members may be another thread's at any moment.
    members = [shared if n % 2 else [network(0), network(1)] for n in range(fusions)]
    every = [member for each in (*members[:2], *members[2::2]) for member in each]
    objects = [member.state_dict(keep_vars=True) for member in every]
    before = [{name: t.detach().clone() for name, t in held.items()} for held in objects]

    def run(number: int) -> None:
        try:
            found = fxfuse.fuse(members[number], x).state_dict()
        except Exception:
            counts["errors"] += 1
            return
        counts["results"] += differs(found, expected)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(fusions)))
    for member, held, values in zip(every, objects, before, strict=True):
        now = member.state_dict(keep_vars=True)
        lost = any(now[name] is not tensor for name, tensor in held.items())
        counts["members"] += lost or differs(now, values)
    return counts


def growth(fusions: int) -> dict[str, Any]:
    """Fuses again and again; says what stays of each, beside caches that have a limit.

    torch.export fills caches of sympy, which keep the last 1,000 results of each function: they
    are emptied before counting. So are the free pages that the C library keeps, where it is glibc.
    """
    members, x = [network(0), network(1)], torch.randn(4, 3, 8, 8)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def now() -> tuple[int, int]:
        clear_cache()
        gc.collect()
        gc.collect()  # Again: what the first one finalised.
        trim(0)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return len(gc.get_objects()), pages * resource.getpagesize()

    for _ in range(100):
        fxfuse.fuse(members, x)
    before = now()
    for _ in range(fusions):
        fxfuse.fuse(members, x)
    objects, memory = (a - b for a, b in zip(now(), before, strict=True))
    return {"fusions": fusions, "objects each": objects / fusions, "bytes each": memory / fusions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    fusions = options.rounds // 2
    result = {
        "kills": killed(options.rounds),
        "threads": in_threads(fusions),
        "memory": growth(fusions),
    }
    print(result)
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
