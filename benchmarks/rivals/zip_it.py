"""ZipIt's own code on our CIFAR-10 specialists; ours is in benchmarks/results/cifar10.json.

    pip install fvcore
    python -m benchmarks.rivals.zip_it --checkout ../ZipIt

Both get the same members and the same calibration images. Their merge is followed by their reset of
batch-norm statistics on these images; the labels that their loader yields are never read.

Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024,
arXiv:2305.03053; repository gstoica27/ZipIt.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import records
from benchmarks.members.cifar10 import Cifar10, load
from benchmarks.members.train import kept
from benchmarks.real.controls import accuracy, best_member, kl, mean_of, outputs_of
from benchmarks.real.data import parser
from benchmarks.rivals.checkout import use

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rivals" / "zip_it.json"
_BATCH = 500
#: Their functions, with their own settings for CIFAR-10.
_FUNCTIONS = {
    "ZipIt": ("match_tensors_zipit", {"a": 0.3, "b": 0.125}),
    "permutation (Git Re-Basin by activations)": ("match_tensors_permute", {}),
    "average": ("match_tensors_identity", {}),
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--checkout", type=Path, required=True, help="their repository")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--calibration", type=int, default=1000)
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    theirs = use(options.checkout, unused=("clip", "einops", "pygraphviz"))
    about = {"their commit": theirs, "commit": records.described(), "torch": torch.__version__}
    data, rows = load(options.data_root), []
    for seed in options.seeds:
        for row in _rows(data, seed, options.calibration):
            print(row, flush=True)
            rows.append(row)
            records.write(RESULTS, about | {"rows": rows})


def _rows(data: Cifar10, seed: int, count: int) -> Iterator[dict[str, Any]]:
    members = [kept("resnet20", f"resnet20-halves-{seed}-{i}") for i in range(2)]
    given = data.calibration(count, seed)
    images, labels = data.test.inputs, data.test.labels
    found = [outputs_of(n, images, batch=_BATCH, logits=True) for n in members]
    asked = [outputs_of(n, given, batch=_BATCH, logits=True) for n in members]
    ensemble, best = mean_of(found), best_member(asked)
    for name, (function, settings) in _FUNCTIONS.items():
        begin = time.process_time()
        network = merged(members, given, function, settings)
        cost = time.process_time() - begin
        own = outputs_of(network, images, batch=_BATCH, logits=True)
        ends = accuracy(found[best], labels), accuracy(ensemble, labels)
        yield {
            "seed": seed,
            "method": name,
            "accuracy": accuracy(own, labels),
            "best member": ends[0],
            "ensemble": ends[1],
            "share of the way": (accuracy(own, labels) - ends[0]) / (ends[1] - ends[0]),
            "KL to the ensemble": kl(ensemble, own),
            "CPU seconds": round(cost, 1),
        }


def merged(
    members: Sequence[nn.Module], inputs: Tensor, function: str, settings: dict[str, Any]
) -> nn.Module:
    """Merge members by their code.

    Args:
        members: ResNet-20s, whose modules are named as theirs.
        inputs: Images `[n, 3, 32, 32]`.
        function: The name of one of their matching functions.
        settings: Its settings.
    """
    import matching_functions
    from graphs.resnet_graph import resnet20
    from metric_calculators import CovarianceMetric, MeanMetric
    from model_merger import ModelMerge
    from utils import reset_bn_stats

    unread = torch.zeros(len(inputs), dtype=torch.int64)
    loader = DataLoader(TensorDataset(inputs, unread), batch_size=_BATCH)
    graphs = [resnet20(copy.deepcopy(member)).graphify() for member in members]
    merge = ModelMerge(*graphs, device="cpu")
    merge.transform(
        copy.deepcopy(members[0]),
        loader,
        transform_fn=getattr(matching_functions, function),
        metric_classes={"covariance": CovarianceMetric, "mean": MeanMetric},
        **settings,
    )
    network = reset_bn_stats(merge.merged_model, loader)
    return network.eval()


if __name__ == "__main__":
    main()
