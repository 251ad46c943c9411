"""Kill -9 while results are written: what is left is the old result or the new one, whole.

    python -m benchmarks.reliability [--rounds 200] [--json benchmarks/results/reliability.json]

A child process replaces a folder of three files again and again, each time with another content;
after a random while it is killed. The folder must then hold three files of one content.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = killed(options.rounds)
    print(result)
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
