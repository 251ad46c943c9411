"""Damaged files: whatever is in them, there is a named error or the right result.

    python -m benchmarks.fuzz [--cases 2000] [--seed 0] [--json benchmarks/results/fuzz.json]

Checkpoints (`.safetensors`, `.pt`), plans, recipes, saved graphs and data are cut, overwritten with
random bytes, and edited in their headers. A worker reads them, with 1 GB of memory beyond what it
had and 30 seconds for each. Good are: an `FxfuseError`; or a result that is right, which is for a
checkpoint the tensors that another reader finds in it, for a plan, a graph and a recipe what was
written, or for a recipe what its text says.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.records import write

SECONDS, GIGABYTE = 30, 1 << 30
KINDS = ("safetensors", "pt", "plan", "recipe", "graph", "data")
RECIPE = """model: package.module:factory
model_args: {width: 8, classes: 3}
members: [a.safetensors, {path: b.safetensors, args: {classes: 2}}]
input: [3, 32, 32]
calibration: {source: data.npz, limit: 200}
fuse:
  method: transplant
  width: {'layer*': 1.5}
  freeze: [stem.*]
  output_dims: {0: [1]}
train: {kind: match, steps: 10}
output: {folder: fused, report: true}
"""


class Sources:
    """Whole files of every kind, in a folder, and what is in them."""

    def __init__(self, folder: Path) -> None:
        import fxfuse
        from fxfuse.cli.recipe.text import parse_recipe
        from fxfuse.members.checkpoint import write_state_dict

        torch.manual_seed(0)
        self.folder = folder
        self.x = torch.randn(4, 5)
        self.members = [network(), network()]
        self.result = fxfuse.fuse(self.members, self.x)
        self.state = self.members[0].state_dict()
        self.recipe = parse_recipe(RECIPE)
        write_state_dict(folder / "whole.safetensors", self.state)
        torch.save(self.state, folder / "whole.pt")
        np.savez(folder / "whole.npz", inputs=self.x.numpy(), labels=np.arange(4))
        fxfuse.save(self.result, folder / "saved")
        self.answer = fxfuse.load(folder / "saved")(self.x)
        self.whole = {
            "safetensors": (folder / "whole.safetensors").read_bytes(),
            "pt": (folder / "whole.pt").read_bytes(),
            "plan": self.result.plan.to_json().encode(),
            "recipe": RECIPE.encode(),
            "graph": (folder / "saved" / "graph.json").read_bytes(),
            "data": (folder / "whole.npz").read_bytes(),
        }


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def damaged(kind: str, content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done to a file, and the file after it."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [
        cut,
        overwrite,
        flip,
        insert,
        noise,
        repeat,
    ]
    if kind in ("safetensors", "plan", "recipe", "graph"):
        ways += [edit_text] * 3
    way = rng.choice(ways)
    if kind == "graph" and way is edit_text:
        return "edit graph", edit_graph(content, rng)
    return way.__name__, way(content, rng)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.choice((1, 4, 8, 100))
    return content[:start] + rng.randbytes(length) + content[start + length :]


def flip(content: bytes, rng: random.Random) -> bytes:
    edited = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        edited[rng.randrange(len(edited))] ^= 1 << rng.randrange(8)
    return bytes(edited)


def insert(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.choice((1, 7, 64))) + content[start:]


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))


def repeat(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    end = min(start + rng.randrange(1, 200), len(content))
    return content[:end] + content[start:end] * rng.randrange(1, 5) + content[end:]


#: What values of a graph are replaced by.
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63, 10**30, "", "x", "self", "lambda", "__class__", [], {}, [[]]),
    *(float("inf"), {"node": "x"}, {"dtype": "os"}, {"tuple": []}, {"slice": [1]}, "fc.weight"),
    *("x=open('opened', 'w')", 'fc"+str(open)+"', "aten.from_file.default", "operator.pow"),
    *("aten.relu.default", "torch.os.system", "aten.save.default", "getattr", [0] * 500_000),
)
#: What torch says of a network that cannot run.
NO_NETWORK = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
#: What texts are replaced by in headers and descriptions.
VALUES = (
    *(b"0", b"-1", b"1e400", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"F64"', b"[1, 2]"),
    *(b"99999999999999999999", b"18446744073709551615", b"9223372036854775807", b"[[[[]]]]"),
    *(b'"\\ud800"', b'"torch.os.system"', b"&a [*a]", b"!!python/name:os.system", b"? a : b"),
)


def edit_text(content: bytes, rng: random.Random) -> bytes:
    """A number, word or structure in the part that can be read replaced by another."""
    end = len(content)
    if content[:1] != b"{" and not content.startswith(b"model"):
        # The header of a .safetensors file, behind its length.
        end = 8 + int.from_bytes(content[:8], "little")
        header = swap(content[8:end], rng)
        length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, end * 2, 2**40, 2**63))
        return length.to_bytes(8, "little") + header + content[end:]
    return swap(content, rng)


def swap(text: bytes, rng: random.Random) -> bytes:
    import re

    found = list(re.finditer(rb'-?\d+\.?\d*|"[^"]*"|\b\w+\b|[\[\]{},:]', text))
    if not found:
        return text
    one = rng.choice(found)
    other = rng.choice(found)[0] if rng.random() < 0.5 else rng.choice(VALUES)
    return text[: one.start()] + other + text[one.end() :]


def edit_graph(content: bytes, rng: random.Random) -> bytes:
    """An edited graph with a right checksum, as someone would make it on purpose."""
    graph = json.loads(content)
    del graph["sha256"]
    for _ in range(rng.choice((1, 1, 3))):
        places = list(_places(graph))
        (holder, key), (other, place) = rng.choice(places), rng.choice(places)
        value = copy.deepcopy(other[place]) if rng.random() < 0.5 else rng.choice(JSON_VALUES)
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[value if isinstance(value, str) else repr(value)] = holder.pop(key)
        else:
            holder[key] = value
    digest = hashlib.sha256(json.dumps(graph).encode()).hexdigest()
    return json.dumps({**graph, "sha256": digest}).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def read(kind: str, content: bytes, sources: Sources, *, checked: bool) -> None:
    """Reads a file as the library does; checks what comes out.

    Raises:
        AssertionError: It is wrong.
        FxfuseError: It was refused.
    """
    import fxfuse
    from fxfuse.cli.recipe.text import parse_recipe
    from fxfuse.cli.sources import read_data
    from fxfuse.members.checkpoint import load_checkpoint

    folder = sources.folder
    if kind in ("safetensors", "pt"):
        path = folder / f"case.{kind}"
        path.write_bytes(content)
        model = network()
        load_checkpoint(model, path)
        for name, tensor in reference(path).items():
            assert torch.equal(model.state_dict()[name].nan_to_num(), tensor.nan_to_num()), name
        members = fxfuse.Members.from_files([path, folder / "whole.safetensors"], network())
        fxfuse.fuse(members, sources.x)
    elif kind == "plan":
        plan = fxfuse.FusionPlan.from_json(content.decode("utf-8", errors="replace"))
        found = fxfuse.build(plan, sources.members, sources.x)
        for name, tensor in sources.result.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
    elif kind == "recipe":
        import yaml

        text = content.decode("utf-8", errors="replace")
        found_recipe = parse_recipe(text).model_dump(exclude_defaults=True)
        assert set(found_recipe) <= set(yaml.safe_load(text))
    elif kind == "data":
        path = folder / "case.npz"
        path.write_bytes(content)
        data = read_data(str(path))
        assert all(len(part) == len(data) for part in data.inputs)
    else:
        (folder / "saved" / "graph.json").write_bytes(content)
        loaded = fxfuse.load(folder / "saved")
        # What was edited on purpose, checksum and all, is another network, which may not run.
        with suppress(*(() if checked else NO_NETWORK)):
            answer = loaded(sources.x)
            assert not checked or torch.equal(answer, sources.answer)


def reference(path: Path) -> dict[str, torch.Tensor]:
    """What another reader finds in a checkpoint."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        kinds = {"F32": np.float32, "I64": np.int64}
        found = {}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], kinds[entry["dtype"]])
            found[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
        return found
    # It has checksums, so only what was written may come out.
    whole: dict[str, torch.Tensor] = torch.load(path.with_name("whole.pt"), weights_only=True)
    return whole


def worker(start: int, cases: int, seed: int) -> None:
    """Reads damaged files and says of each in a line what came of it."""
    from fxfuse.errors import FxfuseError

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        sources = Sources(Path(work))
        # Whatever is imported late is imported now: it is not the file that takes that memory.
        for kind in KINDS:
            read(kind, sources.whole[kind], sources, checked=True)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GIGABYTE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, _late)
        for number in range(start, cases):
            rng = random.Random(seed * 1_000_003 + number)
            kind = KINDS[number % len(KINDS)]
            way, content = damaged(kind, sources.whole[kind], rng)
            print(json.dumps({"case": number, "kind": kind, "way": way}), flush=True)
            signal.alarm(SECONDS)
            try:
                read(kind, content, sources, checked=way != "edit graph")
                found = "right result"
            except FxfuseError as error:
                found = "named error" if str(error).count("\n") else f"thin error: {error}"
            except AssertionError as error:
                found = f"WRONG RESULT: {error}"
            except TimeoutError:
                found = "HANG"
            except MemoryError:
                found = "MEMORY"
            except BaseException as error:
                found = f"OTHER ERROR: {type(error).__name__}: {str(error)[:200]}"
            finally:
                signal.alarm(0)
            print(json.dumps({"case": number, "found": found}), flush=True)


def _late(number: int, frame: Any) -> None:
    raise TimeoutError


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Reads damaged files in workers; counts what came of them."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    bad: list[dict[str, Any]] = []
    begin = 0
    while begin < cases:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(begin)]
        command += ["--cases", str(cases), "--seed", str(seed)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line[:1] == "{"]
        told = {line["case"]: line for line in lines if "kind" in line}
        ended = {line["case"]: line["found"] for line in lines if "found" in line}
        if not told:
            raise RuntimeError(f"the worker did not begin: {child.stderr[-2000:]}")
        for number, line in told.items():
            found = ended.get(number, f"CRASH: exit {child.returncode}")
            short = found.partition(":")[0]
            counts[line["kind"]][short] += 1
            if short not in ("named error", "right result"):
                bad.append({**line, "found": found})
        begin = max(told) + 1
    return {"cases": cases, "seed": seed, "counts": counts, "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.cases, options.seed)
        return
    result = fuzz(options.cases, options.seed)
    print(json.dumps(result, indent=1))
    if options.json:
        write(options.json, {"torch": torch.__version__, **result})
    raise SystemExit(bool(result["bad"]))


if __name__ == "__main__":
    main()
