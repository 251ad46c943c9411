"""Fuses real published networks, beside their controls, and writes results as JSON.

    python -m benchmarks.real.fused mlps
    python -m benchmarks.real.fused spliceai [--seconds 10 60 230] [--seeds 0] [--sizes 1 1.5 2 3]
    python -m benchmarks.real.fused minilm [--seconds 110] [--sizes 0.75 0.5]

Test inputs are looked at once, after everything was chosen on calibration inputs. A difference
counts if its paired bootstrap interval over the test inputs, at 95 %, lies on one side of zero.
"""

from __future__ import annotations

import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from benchmarks import records
from benchmarks.real import minilm, mlps, spliceai
from benchmarks.real.controls import (
    accuracy,
    best_member,
    distil,
    interval,
    kl,
    kl_of_each,
    mean_of,
    outputs_of,
    right,
)
from benchmarks.real.data import mnist_calibration, mnist_test, parser
from fxfuse.refine import match

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real"
# Calibration and test sentences of the encoder.
_SENTENCES, _TEST_SENTENCES = 2000, 1000


def main() -> None:
    made = parser(__doc__)
    made.add_argument("what", choices=("mlps", "spliceai", "minilm"))
    made.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of samples of calibration inputs"
    )
    made.add_argument("--seconds", type=float, nargs="+", help="of matching; not for the MLPs")
    made.add_argument("--sizes", type=float, nargs="+", help="of the result; not for the MLPs")
    made.add_argument("--keep", action="store_true", help="keep other rows that were measured")
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    runs: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "mlps": lambda: run_mlps(options.data_root, options.seeds),
        "spliceai": lambda: run_spliceai(
            options.data_root, options.seeds, options.seconds or [230.0], options.sizes or [1.0]
        ),
        "minilm": lambda: run_minilm(
            options.seeds, (options.seconds or [110.0])[0], options.sizes or [0.75, 0.5]
        ),
    }
    # Before the first row is written.
    commit = {"commit": records.described()}
    path = RESULTS / f"{options.what}.json"
    rows = _named(records.earlier(path, "rows", keep=options.keep))
    for row in runs[options.what]():
        print(row, flush=True)
        rows |= _named([row | commit])
        content = {"torch": torch.__version__, "rows": [rows[name] for name in sorted(rows)]}
        records.write(path, content)


def _named(rows: Iterable[dict[str, Any]]) -> dict[tuple[float, ...], dict[str, Any]]:
    """Rows by what tells them apart."""
    keys = ("members", "size", "seconds of matching", "seed")
    return {tuple(row[key] for key in keys if key in row): row for row in rows}


def run_mlps(data_root: Path, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """MLPs that saw different classes of MNIST: accuracy on the official test set, in percent."""
    images, labels = mnist_test(data_root)
    for count in mlps.COUNTS:
        networks = mlps.members(data_root, count)
        found = [outputs_of(n, images, batch=mlps.BATCH, logits=True) for n in networks]
        ensemble = mean_of(found)
        for seed in seeds:
            given = mnist_calibration(mlps.CALIBRATION, seed)
            asked = [outputs_of(n, given, batch=mlps.BATCH, logits=True) for n in networks]
            best = best_member(asked)
            result, seconds = _timed(networks, given)
            own = outputs_of(result.module, images, batch=mlps.BATCH, logits=True)
            loop, _ = distil(
                networks[best],
                given,
                mean_of(asked),
                seconds=seconds,
                batch=64,
                logits=True,
                seed=seed,
            )
            trained = outputs_of(loop, images, batch=mlps.BATCH, logits=True)
            good = [right(p, labels) for p in (own, found[best])]
            yield {
                "members": count,
                "seed": seed,
                "best member": accuracy(found[best], labels),
                "ensemble": accuracy(ensemble, labels),
                "fused": accuracy(own, labels),
                "KL of the best member": kl(ensemble, found[best]),
                "KL of the fused": kl(ensemble, own),
                "best member, the same seconds of a plain loop": accuracy(trained, labels),
                "KL of the plain loop": kl(ensemble, trained),
                "gain over the best member": interval(100 * (good[0] - good[1])),
                "handed over": result.history.chosen if result.history else "",
                "seconds": seconds,
            }


def run_spliceai(
    data_root: Path, seeds: Sequence[int], budgets: Sequence[float], sizes: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Five published members: KL to the mean of their probabilities on held-out sequence."""
    networks = spliceai.members()
    spliceai.check_port(networks, data_root)
    test = spliceai.test_windows(data_root)
    found = [outputs_of(n, test, batch=2) for n in networks]
    ensemble, windows = mean_of(found), spliceai.calibration_windows(data_root)
    for seed, size, seconds in itertools.product(seeds, sizes, budgets):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        steps = [fxfuse.Match(seconds=seconds, seed=seed)]
        result, spent = _timed(networks, windows[order[:100]], refine=steps, size=size)
        own = outputs_of(result.module, test, batch=2)
        history = result.history
        assert history is not None
        start = [int(n) for n in re.findall(r"\d+", history.chosen)]
        far = [kl_of_each(ensemble, p) for p in (mean_of([found[i] for i in start]), own)]
        yield {
            "seed": seed,
            "size": size,
            "seconds of matching": seconds,
            "KL of each member": [kl(ensemble, p) for p in found],
            "start": start,
            "KL of the start": float(far[0].mean()),
            "KL of the best members side by side": _best_side_by_side(found, int(size)),
            "KL of the fused": kl(ensemble, own),
            "gain over the start": interval(far[0] - far[1]),
            "sites found, and of the ensemble": spliceai.sites_found(ensemble, own),
            "steps": result.match.steps if result.match else 0,
            "handed over": history.chosen,
            "seconds": spent,
        }


def _best_side_by_side(found: Sequence[Tensor], count: int) -> float:
    """KL of the `count` members whose mean is closest to the ensemble on the test inputs."""
    ensemble = mean_of(found)
    return min(kl(ensemble, mean_of(list(some))) for some in itertools.combinations(found, count))


def run_minilm(
    seeds: Sequence[int], seconds: float, sizes: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A sentence encoder, pruned: Spearman's correlation of similarities on unseen sentences."""
    network, texts = minilm.encoder(), minilm.sentences("calibration")
    test = minilm.tokens_of(minilm.sentences("test")[:_TEST_SENTENCES])
    reference = minilm.embeddings(network, test)
    for seed, size in itertools.product(seeds, sizes):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        tokens = minilm.tokens_of([texts[i] for i in order[:_SENTENCES]])
        row: dict[str, Any] = {"seed": seed, "size": size, "sentences": len(tokens[0])}
        example = (tokens[0][:2], tokens[1][:2])
        control = minilm.pruned(network, example, size)
        row["torch-pruning"] = minilm.spearman(reference, minilm.embeddings(control, test))
        options = fxfuse.Match(seconds=seconds)
        match(control, [network], tokens, options, task=fxfuse.Embedding())
        row["torch-pruning + matching"] = minilm.spearman(
            reference, minilm.embeddings(control, test)
        )
        for name, steps, score in (
            ("l2, no refit", [], "l2"),
            ("obs + refit", [fxfuse.Refit()], "obs"),
            ("obs + refit + matching", [fxfuse.Refit(), options], "obs"),
        ):
            begin = time.process_time()
            result = fxfuse.prune(
                network,
                example,
                size=size,
                calibration=fxfuse.Calibration(tokens, limit=_SENTENCES) if steps else None,
                method=fxfuse.Transplant(score=score),
                refine=steps,
                verify=False,
            )
            row[f"seconds of {name}"] = time.process_time() - begin
            row[name] = minilm.spearman(reference, minilm.embeddings(result.module, test))
        yield row


def _timed(
    networks: Sequence[nn.Module], inputs: Tensor, **options: Any
) -> tuple[fxfuse.FusionResult, float]:
    """A fused network, and the CPU seconds of everything."""
    begin = time.process_time()
    result = fxfuse.fuse(networks, inputs[:2], calibration=inputs, verify=False, **options)
    return result, time.process_time() - begin


if __name__ == "__main__":
    main()
