"""The report: what it says is what the result holds, and a browser shows it without a network."""

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fxfuse
from fxfuse import FusionResult, Refit, Transplant
from fxfuse.cli.recipe import as_recipe
from fxfuse.cli.report import Network, write_report
from fxfuse.cli.report.content import gather, renamed
from fxfuse.cli.report.coupled import FREE, coupled
from fxfuse.cli.report.transplanted import SEVERAL, shares
from fxfuse.errors import MissingDependencyError
from tests.nets import images, resnets
from tests.options import scored

#: Headless, and silent: nothing that asks a network by itself.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def members() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return list(resnets(3))


@pytest.fixture(scope="module")
def result(members: list[torch.nn.Module]) -> FusionResult:
    torch.manual_seed(0)
    return fxfuse.fuse(
        members, images(), calibration=images(64), method=Transplant(score="l2"), refine=[Refit()]
    )


@pytest.fixture(scope="module")
def page(result: FusionResult, members: list[torch.nn.Module], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = gather(result, title="").networks
    rows = [dataclasses.replace(row, accuracy=90.0 + i) for i, row in enumerate(rows)]
    sweep = [Network(f"width {w}", 1, int(1000 * w), 90 + w) for w in (0.5, 1, 2)]
    title = "</script><script>throw 1</script>"
    names = ["a.pt", "b.pt", "c.pt"]
    write_report(
        result, path, title=title, members=members, networks=rows, sweep=sweep, names=names
    )
    return path


def test_runs_are_the_plan(result: FusionResult) -> None:
    for share, m in zip(shares(result), result.plan.maps, strict=True):
        origin = [run.member for run in share.runs for _ in range(run.start, run.stop)]
        assert origin == m.member[m.target.argsort()].tolist()
        assert sum(share.counts) == share.n_units == m.n_units
        assert share.available == 3 * m.n_units
        assert all(a.member != b.member for a, b in zip(share.runs, share.runs[1:], strict=False))


def test_aligned_units_are_of_several_members(members: list[torch.nn.Module]) -> None:
    result = fxfuse.fuse(members, images(), verify=False, method="weight_matching")
    for share in shares(result):
        assert [run.member for run in share.runs] == [SEVERAL]


def test_members_side_by_side_are_those_of_the_plan(tmp_path: Path) -> None:
    """The judge may return some of the members, as they are."""
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        members.append(torch.nn.Sequential(*layers).eval())
    calibration = torch.randn(200, 6)
    asked = [fxfuse.Match(steps=1, learning_rate=1e-9)]
    result = fxfuse.fuse(members, calibration[:4], size=2, calibration=calibration, refine=asked)
    assert result.history is not None
    assert result.history.chosen.endswith("side by side")
    assert result.plan.n_members == 2
    assert all(share.kept is not None for share in shares(result, members))
    write_report(result, tmp_path / "report.html", members=members)
    page = (tmp_path / "report.html").read_text()
    for candidate in result.history.candidates:
        assert candidate.name in page


def test_kept_is_the_share_of_the_score(
    result: FusionResult, members: list[torch.nn.Module]
) -> None:
    states = [member.state_dict() for member in members]
    whole = {g.name: np.arange(g.n_units) for g in result.graph.groups}
    scores = scored(result.graph, states, dict.fromkeys(range(3), whole), "l2")
    for share, m in zip(shares(result, members), result.plan.maps, strict=True):
        part = sum(scores[i][m.group][u] for i, u in zip(m.member, m.unit, strict=True))
        assert share.kept == pytest.approx(part / sum(scores[i][m.group].sum() for i in range(3)))
        # The best third holds more than a third of the score, and not all of it.
        assert 1 / 3 < share.kept < 1


def test_every_dimension_is_in_the_graph(result: FusionResult) -> None:
    graph = result.graph
    found = coupled(graph)
    free = {dot.place for lane in found.lanes for dot in lane.dots if dot.state == FREE}
    assert free == {f"{n}:{d}" for group in graph.groups for n, d in group.index}
    frozen = {dot.place: dot for lane in found.lanes for dot in lane.dots if dot.state != FREE}
    assert set(frozen) == {f"{n}:{d}" for n, d in graph.frozen}
    assert all(dot.why for dot in frozen.values())
    anchors = [dot.anchor for lane in found.lanes for dot in lane.dots]
    assert len(set(anchors)) == len(anchors)


def test_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 3e6
    # Of the page itself; what the bundled library could load is the browser test's business.
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#)', own)
    assert own.count("&lt;/script&gt;&lt;script&gt;throw 1") == 2
    assert "throw 1</script>" not in text


def test_verdict_says_what_failed(result: FusionResult) -> None:
    checks = result.verification.checks
    broken = dataclasses.replace(checks[0], passed=False)
    failed = dataclasses.replace(
        result, verification=dataclasses.replace(result.verification, checks=(broken, *checks[1:]))
    )
    assert f"All {len(checks)} oracles hold." in gather(result, title="").verdict
    assert f"FAILED: {checks[0].name}." in gather(failed, title="").verdict


def test_the_first_thing_that_is_said_is_how_good_it_is(result: FusionResult) -> None:
    raw = dataclasses.replace(result, refit=None, history=None)
    assert gather(raw, title="").headline.startswith("Raw: nothing was fitted")
    assert gather(raw, title="").next_step.startswith("refit and match it")
    told = gather(result, title="", names=("a.pt", "b.pt", "c.pt"))
    assert re.fullmatch(
        r"[\d.e-]+ from the ensemble \(.*\); the closest member is [\d.e-]+ away\.", told.headline
    )
    assert {"a.pt", "b.pt", "c.pt"} <= {bar.name for bar in told.bars}
    assert told.bars[-1].ours
    assert max(bar.share for bar in told.bars) == pytest.approx(100)
    rows = (
        Network("member 1", 10, accuracy=91.0),
        Network("ensemble of 2", 20, accuracy=95.0),
        Network("fused", 10, accuracy=94.5, milliseconds=2.0),
    )
    told = gather(result, title="", networks=rows, names=("a.pt", "b.pt", "c.pt"))
    assert told.headline == "94.50 % accuracy; the best member has 91.00 %; the ensemble 95.00 %."
    assert [bar.name for bar in told.bars] == ["b.pt", "ensemble of 2", "fused"]
    assert told.bars[-1].cost == "1.00 × parameters, 2.00 ms"
    assert told.next_step.startswith("use it")


def test_names_of_members(result: FusionResult) -> None:
    names = ("a.pt", "b.pt", "c.pt")
    assert renamed("matched from member 1", names) == "matched from b.pt"
    assert renamed("members 0, 2 side by side", names) == "a.pt, c.pt side by side"
    assert renamed("member 7", names) == "member 7"
    assert renamed("one member", names) == "one member"
    files = ["x/model.safetensors", "y/model.safetensors"]
    asked = {"model": "torchvision:resnet18", "input": [3, 8, 8], "output": {"folder": "f"}}
    assert as_recipe({**asked, "members": files}).names == tuple(files)
    assert as_recipe({**asked, "members": ["x/a.pt", "y/b.pt"]}).names == ("a.pt", "b.pt")


def test_without_altair(
    result: FusionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    for name in ("page", "charts"):
        monkeypatch.delitem(sys.modules, f"fxfuse.cli.report.{name}", raising=False)
    with pytest.raises(MissingDependencyError, match="fxfuse\\[report\\]"):
        write_report(result, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None and not os.environ.get("FXFUSE_BROWSER"):
        pytest.skip("no chromium on this machine; CI has one (FXFUSE_BROWSER=1 demands it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        yield running
        running.close()


def test_browser_shows_it(browser: Any, page: Path) -> None:
    for width in (1280, 390):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        problems: list[str] = []
        tab.on("console", lambda message, told=problems: told.append(message.text))
        tab.on("pageerror", lambda error, told=problems: told.append(str(error)))
        tab.on("request", lambda request, told=problems: told.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready=yes]", timeout=20_000)
        for name in ("map", "scores", "coupling", "refit", "history", "sweep"):
            assert tab.locator(f"#chart-{name} svg").count() == 1, name
        dot = tab.locator("#chart-coupling path[aria-roledescription=point]").nth(3)
        place = re.search(r"place: (\S+);", dot.get_attribute("aria-label")).group(1)
        # Dots may touch one another; the one on top answers in the same way.
        dot.click(force=True)
        tab.wait_for_selector("tr.shown")
        assert tab.locator("tr.shown").is_visible()
        assert place.split(".")[0] in tab.locator("tr.shown").inner_text()
        # Nothing makes the whole page scroll sideways.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        # Without a mouse: the folded parts open from the keyboard.
        fold = tab.locator("#explanations summary").last
        fold.focus()
        tab.keyboard.press("Enter")
        assert fold.evaluate("(node) => node.parentElement.open")
        # The page was asked for, and nothing else happened.
        assert problems == [page.as_uri()]
        tab.close()


def test_pictures_of_it(
    browser: Any, result: FusionResult, members: list[torch.nn.Module], tmp_path: Path
) -> None:
    """Those in docs/how-to/report.md, with FXFUSE_SCREENSHOTS=docs/how-to."""
    page, shots = tmp_path / "report.html", Path(os.environ.get("FXFUSE_SCREENSHOTS", tmp_path))
    write_report(result, page, title="Three networks fused into one", members=members)
    for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready=yes]", timeout=20_000)
        dark = "-dark" * (scheme == "dark")
        picture = (tmp_path if dark else shots) / f"report-{width}{dark}.png"
        tab.screenshot(path=str(picture), full_page=not dark)
        with Image.open(picture) as image:
            assert image.width == width
            # Not blank: there is text, and the colours of three members.
            pixels = image.convert("RGB")
            assert len(pixels.getcolors(maxcolors=2**24)) > 50
            assert (sum(pixels.getpixel((2, 2))) < 200) is bool(dark)
        tab.close()


def test_specifications_hold_all_groups(page: Path, result: FusionResult) -> None:
    text = page.read_text(encoding="utf-8")
    spec = json.loads(re.search(r'id="spec-map">(.*?)</script>', text).group(1))
    rows = next(iter(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]
    assert {row["group"] for row in rows} == {group.name for group in result.graph.groups}
