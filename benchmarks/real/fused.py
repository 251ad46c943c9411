"""Fuses real published networks, beside their controls, and writes results as JSON.

    python -m benchmarks.real.fused mlps
    python -m benchmarks.real.fused spliceai [--seconds 300] [--seeds 1]

Test inputs are looked at once, after everything was chosen on calibration inputs. A difference
counts if its paired bootstrap interval over the test inputs, at 95 %, lies on one side of zero.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from benchmarks import records
from benchmarks.real import mlps, spliceai
from benchmarks.real.controls import (
    accuracy,
    best_member,
    distil,
    kl,
    kl_of_each,
    mean_of,
    outputs_of,
)
from benchmarks.real.data import mnist_calibration, mnist_test, parser
from fxfuse.refine.judge import CONFIDENCE, resampled

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real"
_RESAMPLES = 2000


def main() -> None:
    made = parser(__doc__)
    made.add_argument("what", choices=("mlps", "spliceai"))
    made.add_argument("--seeds", type=int, default=3, help="samples of the calibration inputs")
    made.add_argument("--seconds", type=float, default=300, help="of matching, for SpliceAI")
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    run: Callable[..., list[dict[str, Any]]] = {"mlps": run_mlps, "spliceai": run_spliceai}[
        options.what
    ]
    rows = run(options.data_root, options.seeds, options.seconds)
    content = {"commit": records.described(), "torch": torch.__version__, "rows": rows}
    records.write(RESULTS / f"{options.what}.json", content)


def run_mlps(data_root: Path, seeds: int, _: float) -> list[dict[str, Any]]:
    """MLPs that saw different classes of MNIST: accuracy on the official test set, in percent."""
    images, labels = mnist_test(data_root)
    rows = []
    for count in mlps.COUNTS:
        networks = mlps.members(data_root, count)
        found = [outputs_of(n, images, batch=mlps.BATCH, logits=True) for n in networks]
        ensemble = mean_of(found)
        for seed in range(seeds):
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
            right = [(p.argmax(1) == labels).double() for p in (own, found[best])]
            rows.append(
                {
                    "members": count,
                    "seed": seed,
                    "best member": accuracy(found[best], labels),
                    "ensemble": accuracy(ensemble, labels),
                    "fused": accuracy(own, labels),
                    "KL of the best member": kl(ensemble, found[best]),
                    "KL of the fused": kl(ensemble, own),
                    "best member, the same seconds of a plain loop": accuracy(trained, labels),
                    "KL of the plain loop": kl(ensemble, trained),
                    "gain over the best member": _interval(100 * (right[0] - right[1])),
                    "handed over": result.history.chosen if result.history else "",
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    return rows


def run_spliceai(data_root: Path, seeds: int, seconds: float) -> list[dict[str, Any]]:
    """Five published members: KL to the mean of their probabilities on held-out sequence."""
    networks = spliceai.members()
    spliceai.check_port(networks, data_root)
    test = spliceai.test_windows(data_root)
    found = [outputs_of(n, test, batch=2) for n in networks]
    ensemble, windows = mean_of(found), spliceai.calibration_windows(data_root)
    rows = []
    for seed in range(seeds):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        steps = [fxfuse.Match(seconds=seconds, seed=seed)]
        result, spent = _timed(networks, windows[order[:100]], refine=steps)
        own = outputs_of(result.module, test, batch=2)
        history = result.history
        assert history is not None
        start = history.chosen.removeprefix("matched from member ")
        best = int(start.removeprefix("member "))
        far = [kl_of_each(ensemble, p) for p in (found[best], own)]
        rows.append(
            {
                "seed": seed,
                "KL of each member": [kl(ensemble, p) for p in found],
                "start": best,
                "KL of the fused": kl(ensemble, own),
                "gain over the start": _interval(far[0] - far[1]),
                "sites of the ensemble, and found": spliceai.sites_found(ensemble, own),
                "steps": result.match.steps if result.match else 0,
                "handed over": history.chosen,
                "seconds": spent,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _timed(
    networks: Sequence[nn.Module], inputs: Tensor, **options: Any
) -> tuple[fxfuse.FusionResult, float]:
    """A fused network, and the CPU seconds of everything."""
    begin = time.process_time()
    result = fxfuse.fuse(networks, inputs[:2], calibration=inputs, verify=False, **options)
    return result, time.process_time() - begin


def _interval(differences: Tensor) -> list[float]:
    """Mean of paired differences `[n]`, and the ends of its bootstrap interval."""
    drawn = resampled(differences.double()[:, None], _RESAMPLES)[:, 0]
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=drawn.dtype)
    return [float(differences.mean()), *drawn.quantile(ends).tolist()]


if __name__ == "__main__":
    main()
