"""SpliceAI-10k: the five published networks in PyTorch, their sequences and their called sites.

    python -m benchmarks.real.spliceai [--data-root ../shared/data]  # check the port, controls

The weights are those of the package spliceai (`pip install --no-deps spliceai h5py`), whose own
code needs TensorFlow. `check_port` compares the port with published delta scores. Networks take
one-hot sequences `[b, 4, l + 10000]` (A, C, G, T; N is zero) and return probabilities `[b, 3, l]`
of no site, acceptor and donor.

Jaganathan et al., "Predicting Splicing from Primary Sequence with Deep Learning", Cell 2019.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.real.controls import best_member, greedy_best, kl, mean_of, outputs_of
from benchmarks.real.data import package_folder, parser

MEMBERS = 5
CONTEXT = 10_000
POSITIONS = 4_000
CHANNELS = 32
# (kernel size, dilation) of the four groups of four residual blocks each.
GROUPS = ((11, 1), (11, 4), (21, 10), (41, 25))
BLOCKS = 4
CALLED = 0.5
BASES = b"ACGT"

# The last 50 kb of test.fa are the first of chr10 that are not N.
_FIRST_KNOWN = 60_000

# (1-based position, reference, alternative, expected): variants with published delta scores.
_VARIANTS = (
    (94077, "A", "C", "C|TUBB8|0.15|0.27|0.00|0.05|89|-23|-267|193"),
    (94555, "C", "T", "T|TUBB8|0.01|0.18|0.15|0.62|-2|110|-190|0"),
)
# First and last position of TUBB8 (minus strand) in grch37.txt of the package; N beyond them.
_TUBB8 = (92893, 95529)
_DISTANCE = 500


class Block(nn.Module):
    """A residual block: twice batch norm, ReLU and a dilated convolution."""

    def __init__(self, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.norm1 = nn.BatchNorm1d(CHANNELS, eps=1e-3)
        self.conv1 = nn.Conv1d(CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation)
        self.norm2 = nn.BatchNorm1d(CHANNELS, eps=1e-3)
        self.conv2 = nn.Conv1d(CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 32, l] → [b, 32, l]."""
        y = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(y)))


class Group(nn.Module):
    """Residual blocks, and the convolution that hands their output to the sum before the head."""

    def __init__(self, kernel: int, dilation: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(kernel, dilation) for _ in range(BLOCKS)))
        self.skip = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 32, l] → the same for the next group, and for the sum."""
        x = self.blocks(x)
        return x, self.skip(x)


class SpliceAI(nn.Module):
    """SpliceAI-10k. Its modules stand in the order in which Keras numbered its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, CHANNELS, 1)
        self.skip = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.groups = nn.ModuleList(Group(*shape) for shape in GROUPS)
        self.head = nn.Conv1d(CHANNELS, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 4, l + 10000] → probabilities [b, 3, l]."""
        x = self.stem(x)
        total = self.skip(x)
        for group in self.groups:
            x, skipped = group(x)
            total = total + skipped
        return self.head(total[:, :, CONTEXT // 2 : -CONTEXT // 2]).softmax(1)


def members() -> list[SpliceAI]:
    """Return the five published networks in evaluation mode.

    Raises:
        ImportError: The package spliceai or h5py is not installed.
    """
    folder = package_folder("spliceai", "spliceai") / "models"
    return [_load(folder / f"spliceai{i}.h5") for i in range(1, MEMBERS + 1)]


def _load(path: Path) -> SpliceAI:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("SpliceAI's weights are HDF5 files: pip install h5py") from error
    network = SpliceAI().eval()
    with h5py.File(path) as file, torch.no_grad():
        layers = file["model_weights"]
        for kind, prefix, names in (
            (nn.Conv1d, "conv1d_", {"kernel": "weight", "bias": "bias"}),
            (
                nn.BatchNorm1d,
                "batch_normalization_",
                {
                    "gamma": "weight",
                    "beta": "bias",
                    "moving_mean": "running_mean",
                    "moving_variance": "running_var",
                },
            ),
        ):
            modules = [module for module in network.modules() if isinstance(module, kind)]
            keys = [key for key in layers if key.startswith(prefix)]
            keys.sort(key=lambda key: int(key.rsplit("_", 1)[1]))
            for module, key in zip(modules, keys, strict=True):
                for weight in layers[key].attrs["weight_names"]:
                    own = getattr(module, names[_text(weight).rsplit("/", 1)[1].split(":")[0]])
                    value = torch.from_numpy(layers[key][weight][()])
                    # Keras keeps kernels as [k, in, out].
                    own.copy_(value.permute(2, 1, 0) if value.ndim == 3 else value)
    return network


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def sequence(path: Path) -> str:
    """Return the only sequence of a FASTA file, in capitals."""
    lines = path.read_text(encoding="ascii").splitlines()
    return "".join(lines[1:]).upper()


def one_hot(bases: str) -> Tensor:
    """Encode a sequence of l bases as float32 `[4, l]`; N and other letters are zero."""
    codes = torch.frombuffer(bytearray(bases, "ascii"), dtype=torch.uint8)
    return (codes == torch.tensor(list(BASES), dtype=torch.uint8)[:, None]).float()


def reverse_complement(x: Tensor) -> Tensor:
    """Turn one-hot sequences `[*, 4, l]` of one strand into those of the other."""
    return x.flip(-2, -1)


def windows(bases: str) -> Tensor:
    """Cut both strands of a sequence into windows `[n, 4, 14000]` that overlap in the context.

    The windows predict 4,000 positions each, one after the other from the first base on. N stands
    before and behind the sequence; a remainder of less than 4,000 positions is left out.
    """
    known = nn.functional.pad(one_hot(bases), (CONTEXT // 2, CONTEXT // 2))
    plus = known.unfold(1, POSITIONS + CONTEXT, POSITIONS).movedim(1, 0)
    return torch.cat([plus, reverse_complement(plus)])


def calibration_windows(data_root: Path) -> Tensor:
    """Return windows of 210 kb of chr16, both strands, `[104, 4, 14000]`."""
    return windows(sequence(data_root / "splice" / "chr16_part.fa"))


def test_windows(data_root: Path) -> Tensor:
    """Return windows of the known 50 kb of chr10, both strands, `[24, 4, 14000]`."""
    return windows(sequence(data_root / "splice" / "test.fa")[_FIRST_KNOWN:])


def called(probabilities: Tensor) -> Tensor:
    """Return which positions are acceptors or donors.

    Args:
        probabilities: `[n, 3, l]`.

    Returns:
        bool `[n, 2, l]`.
    """
    return probabilities[:, 1:] > CALLED


def sites_found(ensemble: Tensor, network: Tensor) -> tuple[int, int]:
    """Count the sites that an ensemble calls: those that a network calls, too, and all.

    Args:
        ensemble: Probabilities `[n, 3, l]`.
        network: The same of the network.
    """
    wanted = called(ensemble)
    return int((wanted & called(network)).sum()), int(wanted.sum())


def check_port(networks: Sequence[nn.Module], data_root: Path) -> None:
    """Compare delta scores of the ensemble with those that the published networks are known for.

    Raises:
        AssertionError: A score or its position differs.
    """
    chromosome = sequence(data_root / "splice" / "test.fa")
    for position, reference, alternative, expected in _VARIANTS:
        found = _delta_scores(networks, chromosome, position, reference, alternative)
        if found != expected:
            raise AssertionError(f"chr10:{position}: the port scores {found}, not {expected}")


def _delta_scores(
    networks: Sequence[nn.Module], chromosome: str, position: int, reference: str, alternative: str
) -> str:
    half = _DISTANCE + CONTEXT // 2
    first = position - 1 - half  # 0-based
    bases = [
        chromosome[i] if _TUBB8[0] <= i + 1 <= _TUBB8[1] else "N"
        for i in range(first, position + half)
    ]
    assert bases[half] == reference
    before = one_hot("".join(bases))
    bases[half] = alternative
    both = reverse_complement(torch.stack([before, one_hot("".join(bases))]))
    with torch.no_grad():
        p = mean_of([network(both) for network in networks]).flip(-1)
    changes = p[1, 1:] - p[0, 1:]  # [acceptor and donor, position]
    scores, places = torch.stack([changes, -changes], 1).flatten(0, 1).max(1)
    values = [f"{score:.2f}" for score in scores.tolist()]
    offsets = [str(place - _DISTANCE) for place in places.tolist()]
    return "|".join([alternative, "TUBB8", *values, *offsets])


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    networks = members()
    check_port(networks, options.data_root)
    print("the port agrees with the published delta scores")
    calibration = calibration_windows(options.data_root)
    start = time.process_time()
    known = [outputs_of(network, calibration, batch=2) for network in networks]
    seconds = (time.process_time() - start) / MEMBERS
    print(f"a member's forward pass over {len(calibration)} windows: {seconds:.1f} CPU s")
    test = test_windows(options.data_root)
    found = [outputs_of(network, test, batch=2) for network in networks]
    ensemble = mean_of(found)
    print(f"best member on calibration windows: {best_member(known)}")
    for count in (1, 2, 3):
        print(f"greedy best {count}: {greedy_best(known, count)}")
        for chosen in itertools.combinations(range(MEMBERS), count):
            p = mean_of([found[i] for i in chosen])
            print(chosen, f"KL {kl(ensemble, p):.3e}, sites {sites_found(ensemble, p)}")


if __name__ == "__main__":
    main()
