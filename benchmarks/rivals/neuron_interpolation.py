"""Neuron interpolation's own code on its published MLPs, beside ours.

    pip install captum pot
    python -m benchmarks.rivals.neuron_interpolation --checkout ../neuron-interpolation-model-fusion

Their linear fusions and their baselines (Git Re-Basin, OT fusion), with the settings of their own
scripts, get the calibration images with their labels, which their importance scores ask for. Ours
gets the images only. The official MNIST test set is looked at once.

Spanopoulos, "Model Fusion via Neuron Interpolation", arXiv:2507.00037, 2025; repository
AndrewSpano/neuron-interpolation-model-fusion.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxfuse
from benchmarks import records
from benchmarks.real import mlps
from benchmarks.real.controls import accuracy, best_member, kl, mean_of, outputs_of
from benchmarks.real.data import DEVIATION, MEAN, mnist_test, parser
from benchmarks.rivals.checkout import use
from fxfuse.cli.data import mnist5k

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rivals" / "neuron_interpolation.json"
_SCORES = ("uniform", "conductance", "deeplift")
_SEEDS = 3


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--checkout", type=Path, required=True, help="their repository")
    made.add_argument("--members", type=int, nargs="+", default=mlps.COUNTS)
    made.add_argument("--keep", action="store_true", help="keep other rows that were measured")
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    theirs = use(options.checkout)
    about = {"their commit": theirs, "torch": torch.__version__}
    known = records.earlier(RESULTS, "rows", keep=options.keep)
    rows = [row for row in known if row["members"] not in options.members]
    for row in run(options.data_root, options.members):
        print(row, flush=True)
        rows.append(row | {"commit": records.described()})
        records.write(RESULTS, about | {"rows": rows})


def run(data_root: Path, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Measure every method for every number of members and every sample of inputs."""
    images, labels = mnist_test(data_root)
    known, classes = mnist5k()
    for count in counts:
        members = mlps.members(data_root, count)
        found = [outputs_of(n, images, batch=mlps.BATCH, logits=True) for n in members]
        ensemble = mean_of(found)
        for seed in range(_SEEDS):
            order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
            chosen = order[: mlps.CALIBRATION]
            inputs = (known[chosen] - MEAN) / DEVIATION
            asked = [outputs_of(n, inputs, batch=mlps.BATCH, logits=True) for n in members]
            best = best_member(asked)
            for name, fuse in _methods(members, inputs, classes[chosen]):
                torch.manual_seed(seed)
                # Their k-means draws from numpy.
                np.random.seed(seed)
                begin = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    network = fuse()
                cost = time.process_time() - begin
                own = outputs_of(network.eval(), images, batch=mlps.BATCH, logits=True)
                yield {
                    "members": count,
                    "seed": seed,
                    "method": name,
                    "accuracy": accuracy(own, labels),
                    "KL to the ensemble": kl(ensemble, own),
                    "best member": accuracy(found[best], labels),
                    "ensemble": accuracy(ensemble, labels),
                    "CPU seconds": round(cost, 1),
                }


def _methods(
    members: Sequence[nn.Module], inputs: Tensor, labels: Tensor
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from fusion_algorithms.git_rebasin import GitRebasin
    from fusion_algorithms.hf_kf import LSFusion
    from fusion_algorithms.otfusion import OTFusion

    for score in _SCORES:
        # Name, their method, and whether importances are normalised; the second is for two members.
        linear = [("KF", "k_means", score == "uniform"), ("HF", "hungarian", False)]
        for name, method, normalised in linear[: 2 if len(members) == 2 else 1]:
            yield (
                f"{name}-Linear, {score}",
                lambda score=score, method=method, normalised=normalised: LSFusion(
                    _theirs(members)
                ).fuse(
                    inputs,
                    labels,
                    fusion_method=method,
                    neuron_importance_method=score,
                    norm_acts=False,
                    norm_neuron_importance=normalised,
                ),
            )
        if len(members) == 2:
            yield (
                f"Git Re-Basin, {score}",
                lambda score=score: GitRebasin(*_theirs(members)).fuse(
                    inputs, labels, neuron_importance_method=score, handle_skip=True
                ),
            )
        alignment = {
            "mode": "acts",
            "acts": {
                "activations_dataset": inputs,
                "activation_labels": labels,
                "neuron_importance_method": score,
                "normalize_activations": False,
                "rescale_min_importance": None,
            },
            "wts": {},
        }

        def transport(alignment: dict[str, Any] = alignment) -> nn.Module:
            first, *others = _theirs(members)
            return OTFusion(others, first).fuse_models(alignment, handle_skip=True)

        yield f"OT fusion, {score}", transport
    for name, steps in (
        ("fxfuse, no step", [fxfuse.Refit()]),
        ("fxfuse", [fxfuse.Refit(), fxfuse.Match()]),
    ):
        yield (
            name,
            lambda steps=steps: (
                fxfuse.fuse(
                    members, inputs[:2], calibration=inputs, refine=steps, verify=False
                ).module
            ),
        )


def _theirs(members: Sequence[nn.Module]) -> list[nn.Module]:
    """The members as networks of their class."""
    from models.mlp import MLPNet

    found = []
    for member in members:
        network = MLPNet(784, 256, 10, use_bias=True, use_activations=False)
        network.load_state_dict(copy.deepcopy(member.state_dict()))
        found.append(network.eval())
    return found


if __name__ == "__main__":
    main()
