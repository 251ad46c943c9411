"""The report of a ResNet-50: its size, and how soon a browser can be used on it.

    python -m benchmarks.report_size [--json benchmarks/results/report_size.json]

Needs Debian's `chromium`. A page is ready when its charts are drawn and answer clicks.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from playwright.sync_api import sync_playwright

import fxfuse
from benchmarks.records import versions, write
from fxfuse.cli.report import write_report

REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    members = [torchvision.models.resnet50() for _ in range(2)]
    result = fxfuse.fuse(members, torch.randn(2, 3, 64, 64), verify=False)
    seconds = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        write_report(result, page, members=members)
        size = page.stat().st_size
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for _ in range(REPETITIONS):
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("body[data-ready=yes]")
            seconds.append(time.perf_counter() - start)
            tab.close()
        browser.close()
    found = {"megabytes": size / 1e6, "ready_s": statistics.median(seconds), "all_s": seconds}
    print(found)
    if options.json:
        write(options.json, {"versions": versions(), "network": "resnet50", "members": 2, **found})


if __name__ == "__main__":
    main()
