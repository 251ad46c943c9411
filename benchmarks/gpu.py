"""What a fused network saves on a GPU, and what fusing costs there: one process, one JSON file.

    python -m benchmarks.gpu [--seconds 330] [--json FILE]
    python -m benchmarks.gpu --device cpu --smoke  # whether the script runs, on a tiny network

Four members of each network, with random weights: what a network knows does not change how long
it takes. *Graph* is the eager way, recorded as a CUDA graph; *compiled* is `torch.compile`. First
come equality with the CPU and the latencies, then fusing, refit and matching, and compiled
networks last; what no time was left for is listed under `left`.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import fxfuse
from benchmarks.records import described, on_device, versions, write
from benchmarks.stack import Sequential, Way, race, through_vmap
from fxfuse import Calibration, Match
from fxfuse.refine import refit

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BATCHES = (1, 8, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
#: Outputs may differ by so much, relative to the largest.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
#: Calibration inputs, CPU seconds of matching, and the batch size that is compiled.
_INPUTS, _MATCHING, _COMPILED = 128, 10.0, 8
_WORDS = 1000


class DecoderLayer(nn.Module):
    """Causal attention and an MLP, each behind a norm and around a residual sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [b, t, 3, h, d]
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A small language model: tokens [b, t] → logits [b, t, words]."""

    def __init__(self, width: int = 512, heads: int = 8, layers: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        self.layers = nn.Sequential(*(DecoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, t] → [b, t, words]."""
        logits: Tensor = self.head(self.norm(self.layers(self.words(tokens))))
        return logits


def _images(channels: int, size: int, count: int) -> Tensor:
    return torch.randn(count, channels, size, size)


def _tokens(length: int, count: int) -> Tensor:
    return torch.randint(_WORDS, (count, length))


Network = tuple[Callable[[], nn.Module], Callable[[int], Tensor]]
#: Name → how a member is built, and so many inputs.
NETWORKS: Mapping[str, Network] = {
    "resnet50": (torchvision.models.resnet50, partial(_images, 3, 224)),
    "vit_b_16": (torchvision.models.vit_b_16, partial(_images, 3, 224)),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, partial(_images, 3, 224)),
    "decoder, 6 layers": (Decoder, partial(_tokens, 128)),
}
SMOKE: Mapping[str, Network] = {
    "decoder, 1 layer": (partial(Decoder, 16, 2, 1), partial(_tokens, 6)),
}


class Run:
    """The measurements, in order of value, until the time is up.

    Attributes:
        rows: What was measured.
        left: What there was no time for, or what failed, with the reason.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.end = time.perf_counter() + options.seconds
        self.rows: list[dict[str, Any]] = []
        self.left: dict[str, str] = {}
        # Of each network the fused one and the stack, in float32.
        self.made: dict[str, tuple[nn.Module, nn.Module]] = {}
        smoke = options.smoke
        self.networks, self.batches = (SMOKE, (2,)) if smoke else (NETWORKS, BATCHES)
        self.inputs = 8 if smoke else _INPUTS
        # For `race`.
        options.rounds, options.seconds = (1, 0.0) if smoke else (3, 0.05)

    def run(self) -> dict[str, Any]:
        """Measure all cases."""
        cases = {name: self._members(name) for name in self.networks}
        for name, members in cases.items():
            self._try(f"{name}: equality", partial(self._equality, name, members))
        for dtype in DTYPES[: 1 if self.options.smoke else None]:
            for batch in self.batches:
                for name, members in cases.items():
                    label = f"{name}, {dtype}, batch {batch}"
                    self._try(label, partial(self._latency, name, members, dtype, batch))
        for name, members in cases.items():
            self._try(f"{name}: fusing", partial(self._fusing, name, members))
        for name, members in cases.items():
            self._try(f"{name}: compiled", partial(self._compiled, name, members))
        return {
            "commit": described(),
            "versions": versions(),
            **on_device(str(self.device)),
            "members": self.options.members,
            "rows": self.rows,
            "left": self.left,
        }

    def _try(self, label: str, case: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() > self.end:
            self.left[label] = "no time was left"
            return
        try:
            self.rows.append(case())
            print(self.rows[-1], flush=True)
        # One case that fails must not cost the others; a smoke run hides nothing.
        except Exception as error:
            if self.options.smoke:
                raise
            self.left[label] = f"{type(error).__name__}: {str(error)[:200]}"

    def _members(self, name: str) -> list[nn.Module]:
        torch.manual_seed(0)
        build, _ = self.networks[name]
        members = [build().to(self.device).eval() for _ in range(self.options.members)]
        for member in members:
            # A class head of zeros, as torchvision's ViT has it, would hide every mistake.
            nn.init.normal_([m for m in member.modules() if isinstance(m, nn.Linear)][-1].weight)
        return members

    def _example(self, name: str, count: int) -> Tensor:
        return self.networks[name][1](count).to(self.device)

    def _equality(self, name: str, members: list[nn.Module]) -> dict[str, Any]:
        """Compare a fusion on the device with the same one on the CPU."""
        x = self._example(name, 2)
        here = fxfuse.fuse(members, x)
        self.made[name] = (here.module, fxfuse.stack(members, x, verify=False))
        there = fxfuse.fuse([copy.deepcopy(m).cpu() for m in members], x.cpu(), verify=False)
        with torch.no_grad():
            found, expected = here.module(x).cpu(), there.module(x.cpu())
        error = _error(found, expected)
        assert error < _TOLERANCE[torch.float32], f"the outputs differ by {error:.1e}"
        checks = [check.name for check in here.verification.checks]
        return {"network": name, "step": "equality", "error": error, "checks": checks}

    def _ways(self, name: str, members: list[nn.Module], dtype: torch.dtype) -> dict[str, Way]:
        fused, stack, *own = (
            copy.deepcopy(module).to(dtype) for module in (*self.made[name], *members)
        )
        return {
            "member": own[0],
            "fused": fused,
            "sequential": Sequential(own).eval(),
            "vmap": through_vmap(own),
            "stack": stack,
        }

    def _latency(
        self, name: str, members: list[nn.Module], dtype: torch.dtype, batch: int
    ) -> dict[str, Any]:
        x = self._example(name, batch)
        ways = self._ways(name, members, dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        row: dict[str, Any] = {"network": name, "step": "latency", "dtype": str(dtype)}
        with torch.no_grad():
            expected = ways["sequential"](x)
            for way in ("vmap", "stack"):
                assert _error(ways[way](x), expected) < _TOLERANCE[dtype], way
            if x.is_cuda:
                row["peak MiB"] = {n: _peak(way, x) for n, way in ways.items()}
                plain = {n: way for n, way in ways.items() if n != "vmap"}
                ways |= {f"{n}, graph": _graphed(way, x) for n, way in plain.items()}
            ms = race(ways, x, self.options)
        best = min(t for n, t in ms.items() if n.split(",")[0] not in ("member", "fused"))
        fused = min(t for n, t in ms.items() if n.startswith("fused"))
        member = min(t for n, t in ms.items() if n.startswith("member"))
        ratios = {"fused / member": fused / member, "best ensemble / fused": best / fused}
        return row | {"batch": batch, "ms": ms, "ratios": ratios}

    def _fusing(self, name: str, members: list[nn.Module]) -> dict[str, Any]:
        """Seconds of a transplant, of its refit, and of a matching."""
        x, given = self._example(name, 2), self._example(name, self.inputs)
        row: dict[str, Any] = {"network": name, "step": "fusing", "inputs": len(given)}
        results: list[fxfuse.FusionResult] = []
        inputs = Calibration(given, augmentations=0, held_out=0)
        calls: dict[str, Callable[[], Any]] = {
            "fuse": lambda: results.append(fxfuse.fuse(members, x)),
            "refit": lambda: refit(results[0], members, inputs),
        }
        if not self.options.smoke:
            steps = [Match(seconds=_MATCHING)]
            calls["match"] = lambda: fxfuse.fuse(members, x, calibration=given, refine=steps)
        for step, call in calls.items():
            if x.is_cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            started = self._now()
            call()
            row[f"{step}, s"] = round(self._now() - started, 2)
            if x.is_cuda:
                row[f"{step}, MiB"] = torch.cuda.max_memory_allocated(self.device) // 2**20
        return row

    def _compiled(self, name: str, members: list[nn.Module]) -> dict[str, Any]:
        batch = self.batches[-1] if self.options.smoke else _COMPILED
        x = self._example(name, batch)
        torch._dynamo.reset()
        backend = "eager" if self.options.smoke else "inductor"
        eager = self._ways(name, members, torch.float32)
        ways = {}
        started = self._now()
        with torch.no_grad():
            for n in ("member", "fused", "stack"):
                ways[n] = torch.compile(eager[n], fullgraph=True, dynamic=False, backend=backend)
                assert _error(ways[n](x), eager[n](x)) < _TOLERANCE[torch.float32], n
            seconds = round(self._now() - started, 1)
            ms = race(ways, x, self.options)
        row = {"network": name, "step": "compiled", "batch": batch, "compiling, s": seconds}
        return row | {"ms": ms}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max())


def _peak(way: Way, x: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    way(x)
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def _graphed(way: Way, x: Tensor) -> Way:
    """A way, recorded as a CUDA graph that reads this very input."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            way(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = way(x)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return answer

    return replay


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=330, help="no case begins after them")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, for the CPU")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    # Equality with the CPU is asked for, so products are not rounded to TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    path = options.json
    write(path, Run(options).run())


if __name__ == "__main__":
    main()
