"""The command line of every experiment: run it, print the tables, write the JSON and the plot."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import datasets
from benchmarks.paper.datasets import Data, load
from benchmarks.paper.experiment import Experiment, Options, places, run, told
from benchmarks.paper.markdown import markdown
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.plot import draw
from benchmarks.paper.setting import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
PAGES = ROOT / "docs" / "paper"
SCHEMA = 1

# MNIST-1D leaves every network errors to mend, and a network without locality few.
_DATA = {"mlp": "mnist5k"}
_DATA_ELSEWHERE = "mnist1d"
_PACKAGES = ("fxfuse", "torch", "numpy", "scipy", "pot")


def command(experiment: Experiment, arguments: list[str] | None = None) -> None:
    """Run an experiment as its options say."""
    asked = _parser(experiment).parse_args(arguments)
    torch.set_num_threads(1)
    options = Options(
        seeds=asked.seeds,
        steps=asked.steps,
        rates=tuple(asked.rates),
        calibration=asked.calibration,
        member_steps=asked.member_steps,
    )

    def data_of(network: str) -> Data:
        return load(asked.data or _DATA.get(network, _DATA_ELSEWHERE), asked.data_root)

    start = time.process_time()
    chosen = places(experiment, asked.network, asked.setting, data_of)
    blocks = run(experiment, chosen, asked.n, options, lambda text: print(text, flush=True))
    results = document(experiment, blocks, options, time.process_time() - start)
    print(markdown(experiment, results))
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(experiment, results, asked.plot)


def document(
    experiment: Experiment, blocks: list[dict[str, Any]], options: Options, seconds: float
) -> dict[str, Any]:
    """What is written to the JSON file."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "schema": SCHEMA,
        "experiment": experiment.name,
        "versions": {"python": platform.python_version(), **versions},
        "threads": torch.get_num_threads(),
        "options": told(options),
        "cpu_seconds": round(seconds, 1),
        "blocks": blocks,
    }


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper.{experiment.name}", description=experiment.about
    )
    parser.add_argument("--seeds", type=int, default=default.seeds)
    parser.add_argument("--network", nargs="+", choices=NETWORKS)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS)
    parser.add_argument("--data", choices=datasets.NAMES, help="instead of the network's own")
    parser.add_argument("--data-root", type=Path, help="the folder that holds torchvision's data")
    parser.add_argument("-n", type=int, nargs="+", default=list(experiment.ns), help="members")
    parser.add_argument("--steps", type=int, default=experiment.steps, help="of training")
    parser.add_argument("--rates", type=float, nargs="+", default=list(default.rates))
    parser.add_argument("--calibration", type=int, default=default.calibration)
    parser.add_argument("--member-steps", type=int, help="of training, instead of the data's own")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{experiment.name}.json")
    parser.add_argument("--plot", type=Path, default=PAGES / f"{experiment.name}.svg")
    return parser
