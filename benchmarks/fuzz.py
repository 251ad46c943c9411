"""Damaged files: whatever is in them, there is a named error or the right result.

    python -m benchmarks.fuzz [--cases 10000] [--seed 0] [--json benchmarks/results/fuzz.json]

Checkpoints (`.safetensors`, `.pt`, an index of several), plans, recipes, saved graphs, arrays and
images are cut, overwritten with random bytes, and edited in their headers. Graphs, plans, recipes
and indices are also edited as who attacks would: other names, numbers, types, operators and depths,
chains of sizes without end, with a checksum that fits. A worker reads
them, with 500 MB of memory beyond what it had and 10 seconds for each. Good are: an `FxfuseError`;
or a result that is right, which is for a checkpoint the tensors that another reader finds in it,
for a plan, a graph and a recipe what was written, or for a recipe what its text says. What was
edited on purpose may be any network, plan or recipe.

Meanwhile Python's audit events are watched: no class is looked up by pickle, no code is compiled or
executed that has a word of an attack in it, no process is started, and no file is opened outside of
the folder, except to read those of the libraries.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.records import write

SECONDS, MEMORY = 10, 500 << 20
KINDS = ("safetensors", "pt", "plan", "recipe", "graph", "data", "index", "image")
RECIPE = """model: package.module:factory
model_args: {width: 8, classes: 3}
members: [a.safetensors, {path: b.safetensors, args: {classes: 2}}]
input: [3, 32, 32]
calibration: {source: data.npz, limit: 200}
fuse:
  method: transplant
  size: {width: {'layer*': 1.5}}
  constraints: {freeze: [stem.*], output_dims: {0: [1]}}
train: {kind: distill, steps: 10}
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
            "index": index("whole.safetensors", self.state),
            "image": self.write_image(),
        }

    def write_image(self) -> bytes:
        """Writes an image into the folder of a class."""
        from PIL import Image

        path = self.folder / "images" / "class" / "case.png"
        path.parent.mkdir(parents=True)
        self.pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(self.pixels).save(path)
        return path.read_bytes()


def index(file: str, names: Any) -> bytes:
    """The index of a checkpoint in several files, of which there is one."""
    return json.dumps({"weight_map": dict.fromkeys(names, file)}).encode()


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
    if kind in ("safetensors", "plan", "recipe", "index"):
        ways += [edit_text] * 3
    if kind in ON_PURPOSE:
        # Nearly everything else is only a wrong checksum.
        ways += [ON_PURPOSE[kind]] * 12
    way = rng.choice(ways)
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
    *(
        3_000_000_000,
        9_999_999,
        99,
        2**70,
        0.5,
        "3",
        False,
        float("nan"),
        1e308,
        "transplant",
        "layer",
    ),
)
#: A word that stands in every attack; nothing that is compiled may hold it as code.
CANARY = "canary_word"
_CALL = f"{CANARY}(open('opened', 'w'))"
#: Names that do something, where they are taken for Python.
ATTACKS = (
    *(f"x={_CALL}", f"x': {_CALL}, 'y", f'fc"+str({_CALL})+"', f'x"); {_CALL}; ("', f"x\n {_CALL}"),
    *(f"x, y={_CALL}", f"x)\\\n    {_CALL}", f"{CANARY}()", f"{CANARY}:call", f"x: {_CALL}"),
    *("subprocess:check_output", "os:system", "builtins:exec", "../../opened", "/tmp/opened"),
    *("__class__", "forward", "self", "lambda", "__import__", "x" * 5000, "", "a.b", "a..b", "1"),
    *("torch.Size", "collections.namedtuple", "transformers.modeling_outputs.os", "os.system"),
)
#: Operators that the dispatcher knows, and others.
OPERATORS = (
    *("aten.from_file.default", "aten.save.default", "image.read_file.default", "aten.relu"),
    *("prims.collapse.default", "higher_order.cond.default", "torch.load", "builtins.eval"),
    *("aten._sparse_coo_tensor_unsafe.default", "operator.attrgetter", "aten.__init__.default"),
    *("aten.cat.default", "aten.repeat.default", "aten.full.default", "aten.set_.source_Tensor"),
    *("operator.pow", "operator.lshift", "getattr", "fxfuse.count_batch", "fxfuse.check_batch"),
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
    kind = rng.random()
    if kind < 0.4:
        names = [*graph["tensors"], *graph["arguments"], *(n.get("name") for n in graph["nodes"])]
        graph = renamed(graph, rng.choice([n for n in names if n]), attack(rng))
    elif kind < 0.6:
        node = rng.choice([node for node in graph["nodes"] if node["op"] == "call"])
        node["target"] = rng.choice(OPERATORS)
    elif kind < 0.75:
        add_calls(graph, rng)
    else:
        mutate(graph, rng)
    return signed_graph(graph)


def add_calls(graph: Any, rng: random.Random) -> None:
    """Calls that follow each other, from the batch size to numbers, lists or tensors without end.

    The last one's answer takes the place of the output, so that torch runs all of them.
    """
    last, number = {"node": "size"}, rng.choice((2, 3, 64, 10**4, 10**9, 10**12, 2**62))
    calls: list[Any] = [
        ("operator.mul", [last, last]),
        ("operator.mul", [last, number]),
        ("operator.pow", [last, number]),
        ("operator.pow", [number, last]),
        ("operator.lshift", [last, number]),
        ("operator.lshift", [1, last]),
        ("operator.add", [last, last]),
        ("math.floor", [last]),
        ("operator.truediv", [last, 1e-300]),
        ("aten.repeat.default", [{"node": "x"}, [number, last]]),
        ("aten.repeat.default", [{"node": "x"}, [number, number]]),
        ("aten.arange.default", [number]),
        ("aten.arange.default", [last]),
        ("aten.zeros.default", [[number, number]]),
        ("aten.expand.default", [{"node": "x"}, [number, 4, 5]]),
        ("aten.split.Tensor", [{"node": "x"}, 1]),
        ("aten.one_hot.default", [{"node": "x"}, number]),
    ]
    chosen = rng.choices(calls, k=rng.choice((1, 2, 4))) * rng.choice((1, 3, 60, 2000))
    steps = [("aten.sym_size.int", [{"node": "x"}, 0]), *chosen]
    place = next(i for i, node in enumerate(graph["nodes"]) if node["op"] != "input")
    names = [f"step_{i}" for i in range(len(steps) - 1)]
    for i, (target, args) in enumerate(steps):
        before = {"node": names[i - 2] if i > 1 else "size"}
        args = json.loads(json.dumps(args).replace(json.dumps(last), json.dumps(before)))
        name = names[i - 1] if i else "size"
        node = {"name": name, "op": "call", "target": target, "args": args}
        graph["nodes"].insert(place + i, node)
    if rng.random() < 0.5:
        graph["nodes"][-1]["args"] = [{"tuple": [{"node": names[-1]}]}]


def signed_graph(graph: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(graph).encode()).hexdigest()
    return json.dumps({**graph, "sha256": digest}).encode()


def edit_plan(content: bytes, rng: random.Random) -> bytes:
    """An edited plan with a right digest."""
    from fxfuse.members.fingerprint import digest_of

    plan = json.loads(content)
    note = {key: plan.pop(key) for key in ("note", "digest")}
    if rng.random() < 0.1:
        plan["maps"].append(copy.deepcopy(rng.choice(plan["maps"])))
    else:
        mutate(plan, rng)
    return json.dumps({**note, **plan, "digest": digest_of(plan)}).encode()


def edit_recipe(content: bytes, rng: random.Random) -> bytes:
    """An edited recipe, or one with aliases."""
    import yaml

    if rng.random() < 0.1:
        bomb = "&a0 [x, x]"
        for level in range(1, rng.choice((3, 9, 30))):
            bomb = f"&a{level} [{bomb}, " + ", ".join([f"*a{level - 1}"] * 9) + "]"
        return content + f"model_args: {bomb}\n".encode()
    recipe = yaml.safe_load(content)
    mutate(recipe, rng)
    # All of JSON is YAML, and its writer knows no aliases.
    return json.dumps(recipe).encode()


def edit_index(content: bytes, rng: random.Random) -> bytes:
    """An index that names other files and tensors."""
    document = json.loads(content)
    mutate(document, rng)
    return json.dumps(document).encode()


def edit_image(content: bytes, rng: random.Random) -> bytes:
    """An image that says that it is large, is packed well, or whose sizes do not fit."""
    sides = (0, 1, 7, 2896, 4000, 9000, 2**16, 2**31 - 1, 2**32 - 1)
    size = b"".join(rng.choice(sides).to_bytes(4, "big") for _ in range(2))
    kind = bytes((rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6)), 0, 0, rng.choice((0, 1))))
    packed = zlib.compress(bytes(rng.choice((0, 1 << 10, 50 << 20))))
    text = b"zTXt" + b"x\0\0" + packed if rng.random() < 0.3 else b"tEXt" + b"x\0y"
    chunks = [b"IHDR" + size + kind, text, b"IDAT" + packed, b"IEND"]
    parts = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    return content[:8] + b"".join(parts)


def edit_pickle(content: bytes, rng: random.Random) -> bytes:
    """A checkpoint that calls something when it is unpickled, or says that it is large."""
    if rng.random() < 0.3:
        return pickle.dumps(Calls())
    out = io.BytesIO()
    state: dict[str, Any] = {"0.weight": torch.ones(8, 5)}
    if rng.random() < 0.5:
        state["0.bias"] = rng.choice((Calls(), [Calls()], torch.ones(1).expand(10**9)))
        torch.save(state, out, _use_new_zipfile_serialization=rng.random() < 0.7)
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            part = source.read(name)
            if name.endswith("data.pkl"):
                # Sizes are small integers there: a large one in place of one of them.
                large = pickle.dumps(rng.choice((10**9, 2**62, 2**70)))[2:-1]
                small = [m.start() for m in re.finditer(rb"K[\x03-\x40]", part)]
                place = rng.choice(small)
                part = part[:place] + large.rpartition(b"\x94")[-1] + part[place + 2 :]
            elif rng.random() < 0.3:
                part = part[: rng.choice((0, len(part) // 2))]
            target.writestr(name, part)
    return out.getvalue()


def edit_arrays(content: bytes, rng: random.Random) -> bytes:
    """Arrays that are packed well, or less than their headers announce, or of objects."""
    out = io.BytesIO()
    size = rng.choice((10, 10**6, 10**9, 2**62, 2**70))
    head = f"{{'descr': '{rng.choice(('<f4', '|O', '<U9', '|S0', '<c16'))}', 'fortran_order': False"
    head = f"{head}, 'shape': ({size}, {rng.choice((1, 4, 10**6))}), }}"
    version = rng.choice((1, 2, 3))
    length = len(head).to_bytes(2 if version == 1 else 4, "little")
    if version > 1 and rng.random() < 0.3:
        length = (2**31).to_bytes(4, "little")
    body = b"\x93NUMPY" + bytes([version, 0]) + length + head.encode()
    body += rng.choice((b"", b"\0" * 40, b"\0" * (4 << 20)))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("inputs.npy", body)
    return out.getvalue()


ON_PURPOSE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "graph": edit_graph,
    "plan": edit_plan,
    "recipe": edit_recipe,
    "pt": edit_pickle,
    "data": edit_arrays,
    "index": edit_index,
    "image": edit_image,
}


class Calls:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def attack(rng: random.Random) -> str:
    """A name that does something, where it is taken for Python or for a path."""
    name = rng.choice(ATTACKS)
    return name if rng.random() < 0.7 else f"{name}{rng.choice(('', 'x', ' ', '.y', chr(0)))}"


def renamed(value: Any, old: str, new: str) -> Any:
    """A document in which a text is another one, wherever it stands, as a key, too."""
    if isinstance(value, dict):
        return {new if k == old else k: renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return new if value == old else value


def mutate(document: Any, rng: random.Random) -> None:
    """Other values, of other types, at other places, in other depths."""
    for _ in range(rng.choice((1, 1, 3))):
        places = list(_places(document))
        (holder, key), (other, place) = rng.choice(places), rng.choice(places)
        kind = rng.random()
        if kind < 0.3:
            value = copy.deepcopy(other[place])
        elif kind < 0.4:
            value = attack(rng)
        elif kind < 0.5:
            value = copy.deepcopy(holder[key])
            for _ in range(rng.choice((1, 25, 300))):
                value = [value]
        else:
            value = copy.deepcopy(rng.choice(JSON_VALUES))
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[value if isinstance(value, str) else repr(value)[:500]] = holder.pop(key)
        elif isinstance(holder, list) and rng.random() < 0.2:
            holder.insert(key, value)
        else:
            holder[key] = value


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
    from fxfuse.cli.sources import Preparation, read_data
    from fxfuse.members.checkpoint import load_checkpoint, write_state_dict

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
            assert not checked or torch.equal(found.state_dict()[name], tensor), name
    elif kind == "recipe":
        import yaml

        text = content.decode("utf-8", errors="replace")
        found_recipe = parse_recipe(text).model_dump(exclude_defaults=True)
        assert set(found_recipe) <= set(yaml.safe_load(text))
    elif kind == "index":
        path = folder / "case.safetensors.index.json"
        path.write_bytes(content)
        model = network()
        load_checkpoint(model, path)
        for name, tensor in sources.state.items():
            assert torch.equal(model.state_dict()[name], tensor), name
    elif kind == "image":
        path = folder / "images" / "class" / "case.png"
        path.write_bytes(content)
        (pixels,) = read_data(str(folder / "images"), Preparation(limit=100)).inputs
        wanted = torch.from_numpy(sources.pixels).permute(2, 0, 1)
        assert not checked or torch.equal((pixels[0] * 255).round(), wanted)
    elif kind == "data":
        path = folder / "case.npz"
        path.write_bytes(content)
        data = read_data(str(path), Preparation(limit=100))
        assert all(len(part) == len(data) for part in data.inputs)
    else:
        (folder / "saved" / "graph.json").write_bytes(content)
        if not checked:
            with suppress(Exception):
                # Names of tensors were changed in the weights, too.
                values = list(sources.result.state_dict().values())
                names = list(json.loads(content)["tensors"])
                assert len(names) == len(values)
                write_state_dict(
                    folder / "saved" / "fused.safetensors", dict(zip(names, values, strict=True))
                )
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
        os.chdir(work)
        watch, sources = Watch(Path(work)), Sources(Path(work))
        # Whatever is imported late is imported now: it is not the file that takes that memory.
        for kind in KINDS:
            read(kind, sources.whole[kind], sources, checked=True)
        sys.addaudithook(watch)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, _late)
        for number in range(start, cases):
            rng = random.Random(seed * 1_000_003 + number)
            kind = KINDS[number % len(KINDS)]
            way, content = damaged(kind, sources.whole[kind], rng)
            print(json.dumps({"case": number, "kind": kind, "way": way}), flush=True)
            signal.alarm(SECONDS)
            begin = time.monotonic()
            watch.seen.clear()
            try:
                watch.on = True
                checked = way == edit_text.__name__ or not way.startswith("edit_")
                read(kind, content, sources, checked=checked)
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
                watch.on = False
                signal.alarm(0)
            if watch.seen or Path("opened").exists():
                found = f"ATTACK: {[*watch.seen, 'a file was left'][0]}"[:300]
                Path("opened").unlink(missing_ok=True)
            took = time.monotonic() - begin
            print(json.dumps({"case": number, "found": found, "seconds": took}), flush=True)


class Watch:
    """Notes what may not happen while a file is read."""

    def __init__(self, folder: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self.folder = str(folder.resolve())
        self.libraries = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1]))
        self.system = ("/proc/", "/sys/", "/dev/", "/etc/localtime", "/usr/")

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False
        try:
            why = self.judge(event, arguments)
        finally:
            self.on = True
        if why:
            self.seen.append(f"{event}: {why}")

    def judge(self, event: str, arguments: tuple[Any, ...]) -> str:
        if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.fork"):
            return repr(arguments)
        if event == "compile":
            source = arguments[0]
            text = source.decode(errors="replace") if isinstance(source, bytes) else source
            held = isinstance(text, str) and CANARY in text
            return text[:200] if held and is_code(text) else ""
        if event == "exec":
            return "a word of an attack" if CANARY in _words(arguments[0]) else ""
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR) or set(arguments[1] or "") & set("wax+")
            allowed = (self.folder,) if writes else (self.folder, *self.libraries, *self.system)
            return "" if path.startswith(allowed) else path
        return ""


def is_code(text: str) -> bool:
    """Whether the word of the attacks is more than a literal in Python code."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        # It runs nothing, but an attack got so far.
        return True
    return any(CANARY in ast.dump(node) for node in nodes if isinstance(node, ast.Name | ast.arg))


def _words(code: Any) -> str:
    return " ".join((*getattr(code, "co_names", ()), *getattr(code, "co_varnames", ())))


def _late(number: int, frame: Any) -> None:
    raise TimeoutError


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Reads damaged files in workers; counts what came of them."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    ways: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    begin, slowest = 0, 0.0
    while begin < cases:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(begin)]
        command += ["--cases", str(cases), "--seed", str(seed)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line[:1] == "{"]
        told = {line["case"]: line for line in lines if "kind" in line}
        ended = {line["case"]: line["found"] for line in lines if "found" in line}
        slowest = max([slowest, *(line["seconds"] for line in lines if "seconds" in line)])
        if not told:
            raise RuntimeError(f"the worker did not begin: {child.stderr[-2000:]}")
        for number, line in told.items():
            found = ended.get(number, f"CRASH: exit {child.returncode}")
            short = found.partition(":")[0]
            ways[f"{line['kind']}: {line['way']}"] += 1
            counts[line["kind"]][short] += 1
            if short not in ("named error", "right result"):
                bad.append({**line, "found": found})
        begin = max(told) + 1
    limits = {"seconds": SECONDS, "bytes": MEMORY}
    found = {"cases": cases, "seed": seed, "limits": limits, "slowest": round(slowest, 2)}
    return {**found, "counts": counts, "ways": dict(sorted(ways.items())), "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
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
