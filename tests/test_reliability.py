"""What goes wrong outside: a full disk, no permission, two writers or threads, a kill, damage."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from benchmarks.fuzz import CANARY, Watch, fuzz
from fxfuse.common.output import atomic_folder, locked
from fxfuse.errors import OutputError
from fxfuse.members.checkpoint import read_state_dict
from tests.forked import Child, fxfuse_on_disk, fxfuse_without_rights
from tests.forked import fxfuse as run_fxfuse
from tests.nets import images, resnets

ROOT = Path(fxfuse.__file__).parents[1]
FACTORY = """
import sys
from pathlib import Path

import fxfuse.api.saved

sys.path.insert(0, {root!r})
from tests.nets import SmallResNet

def slow():
    return SmallResNet()
"""
FUSE = ("fuse", "a.pt", "b.pt", "--model", "own_models:slow", "--input", "3,8,8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory and two checkpoints."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "own_models.py").write_text(FACTORY.format(root=str(ROOT)))
    for name, member in zip("ab", resnets(2), strict=True):
        torch.save(member.state_dict(), folder / f"{name}.pt")
    return folder


def ended_well(child: Child, code: int) -> tuple[str, str]:
    """What a child printed, which ends with a status and not with a traceback."""
    found, out, err = child.ended()
    assert found == code, out + err
    assert "Traceback" not in out + err
    return out, err


def on_disk(source: Path, disk: Path, size: str, *, writable: bool = True) -> Child:
    """Fuses onto a small disk, which no one else sees."""
    arguments = (*FUSE, "--quiet", "--out", disk / "fused")
    return Child(fxfuse_on_disk, disk, size, writable, *arguments, cwd=source)


@pytest.mark.parametrize("size", [pytest.param("8k", marks=pytest.mark.nightly), "24k"])
def test_a_full_disk(source: Path, tmp_path: Path, size: str) -> None:
    """At whatever file it is full: the error says so, and nothing is left."""
    out, err = ended_well(on_disk(source, tmp_path, size), 2)
    assert "No space left" in err
    assert out == "\n"


def test_a_disk_that_is_large_enough(source: Path, tmp_path: Path) -> None:
    """Else the test above could fail for another reason."""
    assert ended_well(on_disk(source, tmp_path, "2m"), 0)[0] == "fused\n"


def test_a_read_only_folder(source: Path, tmp_path: Path) -> None:
    child = on_disk(source, tmp_path, "2m", writable=False)
    assert "Read-only file system" in ended_well(child, 2)[1]


def test_no_permission(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    # Who is root may write everywhere, unless that is taken away.
    child = Child(fxfuse_without_rights, *FUSE, "--out", tmp_path / "fused", cwd=source)
    assert "Permission denied" in ended_well(child, 2)[1]
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_folder(source: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "fused"):
        child = Child(run_fxfuse, *FUSE, "--out", tmp_path / "fused", cwd=source)
        assert "another process is writing" in ended_well(child, 2)[1]
        assert [p.name for p in tmp_path.iterdir()] == [".fused.lock"]
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "fused", ["a"]) as work:
        (work / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]


def hold(folder: Path) -> None:
    """Writes a folder until it is killed."""
    with atomic_folder(folder, ["a"]) as work:
        (work / "a").write_text("half")
        print("ready", flush=True)
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_writer_that_was_killed_locks_nothing(tmp_path: Path, number: signal.Signals) -> None:
    child = Child(hold, tmp_path / "out")
    assert child.first_line() == "ready"
    with pytest.raises(OutputError, match="another process"), locked(tmp_path / "out"):
        pass
    child.send_signal(number)
    child.ended()
    with atomic_folder(tmp_path / "out", ["a"]) as work:
        (work / "a").write_text("whole")
    # What it left is gone as well.
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_the_lock_belongs_to_the_name_and_ends_with_the_block(tmp_path: Path) -> None:
    with locked(tmp_path / "one"), locked(tmp_path / "one"), locked(tmp_path / "two"):
        other = os.open(tmp_path / ".one.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new" / "one"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.nightly), (signal.SIGINT, 130)],
)
def test_a_signal_while_networks_are_fused(
    source: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    fxfuse.save(fxfuse.fuse(resnets(2), images(), verify=False), tmp_path / "fused")
    before = (tmp_path / "fused" / "fused.safetensors").read_bytes()
    child = Child(run_fxfuse, *FUSE, "--out", tmp_path / "fused", "--force", cwd=source)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".fused.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(number)
    _, said = ended_well(child, code)
    assert number == signal.SIGTERM or "interrupted" in said
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]
    assert (tmp_path / "fused" / "fused.safetensors").read_bytes() == before


#: Sums depend on the number of threads in their last digits, so where there are sums it is said.
AUTO = """
model: own_models:slow
members: [a.pt, b.pt]
input: [3, 8, 8]
calibration: inputs.npy
fuse: {refine: [refit, {match: {steps: 5}}]}
threads: 1
output: {folder: nowhere}
"""


@pytest.mark.parametrize("kind", [pytest.param("transplant", marks=pytest.mark.nightly), "auto"])
def test_the_same_bytes_whatever_the_hash_seed_and_threads(
    source: Path, tmp_path: Path, kind: str
) -> None:
    np.save(source / "inputs.npy", torch.randn(128, 3, 8, 8).numpy())
    (source / "auto.yaml").write_text(AUTO)
    arguments = (*FUSE, "--width", "1.5") if kind == "transplant" else ("run", "auto.yaml")
    first, second = tmp_path / "first", tmp_path / "second"
    # Its hash seed is that of the process that forks.
    ended_well(Child(run_fxfuse, *arguments, "--out", first, cwd=source), 0)
    other = str(int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")) + 1)
    environment = {"PYTHONHASHSEED": other, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "fxfuse", *arguments, "--out", str(second)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        check=True,
        timeout=120,
    )
    for name in ("fused.safetensors", "plan.json", "graph.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def whole_way(members: list[nn.Module], x: torch.Tensor, folder: Path) -> nn.Module:
    inputs = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
    steps = [fxfuse.Refit(), fxfuse.Match(steps=2)]
    return fxfuse.fuse(members, x, calibration=inputs, refine=steps).module


def written(members: list[nn.Module], x: torch.Tensor, folder: Path) -> nn.Module:
    fxfuse.save(fxfuse.fuse(members, x, verify=False), folder, export=True)
    return fxfuse.load(folder)


IN_THREADS: dict[str, Callable[[list[nn.Module], torch.Tensor, Path], nn.Module]] = {
    "fuse": lambda members, x, _: fxfuse.fuse(members, x).module,
    "match": whole_way,
    "prune": lambda members, x, _: fxfuse.prune(members[0], x, size=0.5).module,
    "stack": lambda members, x, _: fxfuse.stack(members, x),
    "save": written,
}


def told(networks: list[nn.Module]) -> list[Any]:
    """Objects, values and modes of networks: all that must be as it was."""
    parts = [part for network in networks for part in network.modules()]
    tensors = [t for network in networks for t in network.state_dict(keep_vars=True).values()]
    return [
        [part.training for part in parts],
        list(map(id, tensors)),
        [t.tolist() for t in tensors],
    ]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("what", IN_THREADS)
def test_threads_do_not_disturb_each_other(
    what: str, count: int, shared: bool, tmp_path: Path
) -> None:
    x, work = torch.randn(4, 5), IN_THREADS[what]
    alone = work([small(0), small(1)], x, tmp_path / "alone").state_dict()
    members: list[list[nn.Module]] = [[small(0), small(1).eval()] for _ in range(count)]
    members = [members[0]] * count if shared else members
    before, random = [told(each) for each in members], torch.get_rng_state()
    gate, found = threading.Barrier(count), dict[int, Any]()

    def run(number: int) -> None:
        gate.wait()
        try:
            found[number] = work(members[number], x, tmp_path / str(number)).state_dict()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [told(each) for each in members] == before
    assert torch.equal(torch.get_rng_state(), random)
    for number in range(count):
        torch.testing.assert_close(found[number], alone, rtol=0, atol=0)


def test_threads_may_share_captured_members() -> None:
    """A score that needs gradients runs them with other tensors."""
    x = torch.randn(4, 5)
    members = [fxfuse.capture(small(number), x) for number in range(2)]
    batches = [(torch.randn(20, 5), torch.randint(3, (20,))) for _ in range(3)]

    def fused(_: int) -> dict[str, torch.Tensor]:
        options: Any = {"method": fxfuse.Transplant(score="taylor"), "refine": []}
        return fxfuse.fuse(members, x, calibration=batches, **options).state_dict()

    alone = fused(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(fused, range(8)):
            torch.testing.assert_close(found, alone, rtol=0, atol=0)


def test_an_export_is_not_kept_for_ever() -> None:
    """torch keeps the symbolic sizes of each, with hundreds of objects."""
    members, x = [small(0), small(1)], torch.randn(4, 5)

    def held() -> int:
        gc.collect()
        return sum(type(found).__name__ in ("ShapeEnv", "FakeTensor") for found in gc.get_objects())

    fxfuse.fuse(members, x)
    before = held()
    for _ in range(3):
        fxfuse.fuse(members, x)
    assert held() <= before


def test_a_member_gets_its_tensors_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export puts its own into a module; an interrupt in the middle may leave them there."""
    member = small(0)
    before = told([member])

    def interrupted(model: nn.Module, *_: Any, **__: Any) -> None:
        model[0].weight = nn.Parameter(torch.zeros(1))  # type: ignore[index]
        model[1].running_mean = None  # type: ignore[index]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxfuse.capture(member, torch.randn(2, 5))
    assert told([member]) == before


def test_a_damaged_byte_of_a_checkpoint_is_noticed(source: Path, tmp_path: Path) -> None:
    content = bytearray((source / "a.pt").read_bytes())
    weights = read_state_dict(source / "a.pt")["fc.weight"].numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(fxfuse.FxfuseError, match="checksum"):
        read_state_dict(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True), "torch itself does not notice"


def test_damaged_files() -> None:
    """Two thousand of them are read by `python -m benchmarks.fuzz`."""
    result = fuzz(cases=90, seed=7)
    assert result["bad"] == []
    counts = result["counts"]
    assert sum(sum(found.values()) for found in counts.values()) == 90
    assert all(found["named error"] > 3 for found in counts.values())


@pytest.mark.parametrize(
    ("event", "arguments", "bad"),
    [
        ("pickle.find_class", ("os", "system"), True),
        ("os.system", (b"true",), True),
        ("subprocess.Popen", ("true", [], None, None), True),
        ("open", ("inside", "w", 0), False),
        ("open", ("../outside", "w", 0), True),
        ("open", ("../outside", "r", 0), True),
        ("open", (fxfuse.__file__, "r", 0), False),
        ("open", (fxfuse.__file__, None, os.O_WRONLY), True),
        ("compile", (f"def forward(self, x={CANARY}()): pass", "<x>"), True),
        ("compile", (f"x = '{CANARY}'", "<x>"), False),
        ("compile", (f"x = {CANARY}(", "<x>"), True),
        ("compile", (b"x = 1", "<x>"), False),
        ("exec", (compile(f"{CANARY}()", "<x>", "exec"),), True),
        ("exec", (compile("print()", "<x>", "exec"),), False),
    ],
)
def test_what_damaged_files_may_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, arguments: Any, bad: bool
) -> None:
    """Else the figures above would say nothing."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    watch = Watch(Path.cwd())
    watch(event, arguments)
    assert not watch.seen
    watch.on = True
    watch(event, arguments)
    assert bool(watch.seen) == bad
