"""A decoder of about a billion parameters: analysed, fused from files, pruned, saved and run.

    python -m benchmarks.billion [--family llama] [--members 2] [--folder /tmp/billion]
    python -m benchmarks.billion --layers 2 --hidden 256 --vocabulary 1000   # a small one first

Each step runs in a process of its own. Members have random weights in bfloat16 and lie in files of
at most 1 GB, as `save_pretrained` of transformers writes them. The figure to reach for *fuse* and
*prune* is the size of the result, of one member and 2 GB, however many members there are. Memory
is the most resident memory of the step's process, imports and mapped files included.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from benchmarks.memory import peak
from benchmarks.records import versions, write
from fxfuse.cli.demo.environment import environment
from fxfuse.common.measure import parameters

RESULTS = Path(__file__).parent / "results" / "billion.json"
#: Beyond the result and one member, in MB.
BEYOND = 2000
#: By family: the class, the vocabulary, layers and hidden size of a billion, and whether the
#: embedding is the output layer, too.
FAMILIES: dict[str, tuple[str, int, int, int, bool]] = {
    "llama": ("LlamaForCausalLM", 32_000, 22, 2048, False),
    "qwen3": ("Qwen3ForCausalLM", 65_536, 24, 2048, True),
}
#: Numbers that are drawn for the weights: no row of a matrix is another's copy.
_DRAWN = 1_000_003
#: The vocabulary of the small one has them all.
EXAMPLE = torch.arange(1, 17).reshape(2, 8)


class Decoder:
    """The network of a run, where its files lie, and what is known of its size."""

    def __init__(self, options: argparse.Namespace) -> None:
        import transformers

        kind, vocabulary, layers, hidden, tied = FAMILIES[options.family]
        self.kind: Any = getattr(transformers, kind)
        hidden = options.hidden or hidden
        heads = max(hidden // 64, 4)
        self.config = self.kind.config_class(
            vocab_size=options.vocabulary or vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=options.layers or layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 8, 2),
            head_dim=hidden // heads,
            tie_word_embeddings=tied,
            dtype="bfloat16",
        )
        self.folder: Path = options.folder
        self.members = [self.folder / f"member{n}" for n in range(options.members)]

    def build(self, config: Any = None) -> Any:
        """The network on the meta device."""
        config = copy.deepcopy(config or self.config)
        config.use_cache = False
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                model = self.kind(config)
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    def empty(self, config: Any = None) -> Any:
        """The network without weights, but with the table that no checkpoint holds."""
        model = self.build(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model

    def load(self, folder: Path) -> Any:
        """Load a network with the library's own means; no tensor may be missing or left over."""
        model, told = self.kind.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
        wrong = {name: names for name, names in told.items() if names}
        assert not wrong, wrong
        model.config.use_cache = False
        return model.eval()


def make(decoder: Decoder) -> dict[str, Any]:
    """Write the members."""
    for number, folder in enumerate(decoder.members):
        model = decoder.empty()
        # Drawn once and repeated: drawing every weight takes longer than what is measured.
        drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(number))
        block = drawn.mul_(0.02).bfloat16()
        state = {name: filled(own.shape, block) for name, own in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        save(model, folder)
        size = megabytes(model)
    return {"member_mb": size, "parameters": parameters(model)}


def copy_files(decoder: Decoder) -> dict[str, Any]:
    """Copy the members' files."""
    for folder in decoder.members:
        shutil.copytree(folder, decoder.folder / "copy")
        shutil.rmtree(decoder.folder / "copy")
    return {}


def analyze(decoder: Decoder) -> dict[str, Any]:
    """Analyse the network on the meta device."""
    batch, length = EXAMPLE.shape
    # Without a mask, the library looks at values to find out what mask it needs.
    example = {
        "input_ids": torch.ones_like(EXAMPLE, device="meta"),
        "attention_mask": torch.zeros(batch, 1, length, length, device="meta").bool(),
    }
    graph = fxfuse.analyze(decoder.build(), example)
    return {"groups": len(graph.groups), "free": round(graph.free_fraction, 4)}


def fuse(decoder: Decoder) -> dict[str, Any]:
    """Fuse the members, one in memory at a time, and save the network as the library does."""
    members = fxfuse.Members.from_files(decoder.members, decoder.empty())
    result = fxfuse.fuse(members, EXAMPLE)
    model = result.load_into(decoder.empty())
    save(model, decoder.folder / "fused")
    return {**told(decoder, model), "verified": result.verification.passed}


def prune(decoder: Decoder) -> dict[str, Any]:
    """Prune the fused network to three quarters, without a refit, and save it alike."""
    result = fxfuse.prune(decoder.load(decoder.folder / "fused"), EXAMPLE, size=0.75)
    model = result.to_module()
    save(model, decoder.folder / "pruned")
    return {**told(decoder, model), "verified": result.verification.passed}


def generate(decoder: Decoder) -> dict[str, Any]:
    """Load what was written, and let it go on with a text."""
    found = {}
    for name in ("fused", "pruned"):
        model = decoder.load(decoder.folder / name)
        assert parameters(model) == parameters(decoder.empty(model.config))
        model.config.use_cache = True
        tokens = model.generate(EXAMPLE[:1], max_new_tokens=4, do_sample=False)
        found[name] = tokens[0, EXAMPLE.shape[1] :].tolist()
        del model
    return {"tokens": found}


STEPS: dict[str, Callable[[Decoder], dict[str, Any]]] = {
    step.__name__: step for step in (make, copy_files, analyze, fuse, prune, generate)
}


def filled(shape: torch.Size, block: torch.Tensor) -> torch.Tensor:
    """Return weights, or ones for a norm."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=block.dtype)
    times = -(-shape.numel() // len(block))
    return block.repeat(times)[: shape.numel()].reshape(shape).clone()


def save(model: Any, folder: Path) -> None:
    """Write a network in files of 1 GB at most; generation keeps its states, as is usual."""
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size="1GB")


def told(decoder: Decoder, model: Any) -> dict[str, Any]:
    """What a result has to be: of the size that its configuration gives, and tied if it was."""
    assert parameters(model) == parameters(decoder.empty(model.config))
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return {"parameters": parameters(model), "result_mb": megabytes(model)}


def megabytes(model: nn.Module) -> float:
    """Return the size of the parameters."""
    return round(sum(t.numel() * t.element_size() for t in model.parameters()) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--layers", type=int, help="instead of those of a billion parameters")
    parser.add_argument("--hidden", type=int, help="likewise")
    parser.add_argument("--vocabulary", type=int, help="likewise")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/billion"))
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    parser.add_argument("--step", choices=STEPS, help="one, printed as JSON")
    options = parser.parse_args()
    if options.step:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        decoder = Decoder(options)
        wall, cpu = time.perf_counter(), time.process_time()
        row = {"step": options.step, **STEPS[options.step](decoder)}
        row["wall_s"] = round(time.perf_counter() - wall, 1)
        row["cpu_s"] = round(time.process_time() - cpu, 1)
        print(json.dumps({**row, "peak_mb": peak()}))
        return
    rows: list[dict[str, Any]] = []
    about = {"family": options.family, "members": options.members, "versions": versions()}
    options.folder.mkdir()
    try:
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.billion", *sys.argv[1:], "--step", step]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            if "result_mb" in row:
                row["asked_mb"] = round(row["result_mb"] + rows[0]["member_mb"] + BEYOND, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(options.json, {**about, "environment": environment(), "rows": rows})
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
