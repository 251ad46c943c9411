"""The how-to pages: what they show runs, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxfuse
from fxfuse.methods import registry as methods
from fxfuse.rules import registry
from fxfuse.scores import registry as scores
from tests.nets import images, resnets

PAGES = Path(__file__).parents[1] / "docs" / "how-to"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rules that a page registers are forgotten afterwards."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    return


@pytest.mark.usefixtures("own_registry")
def test_adding_an_operator():
    page = PAGES / "add-an-operator.md"
    namespace: dict[str, object] = {"__name__": "add_an_operator"}
    printed = ""
    blocks = BLOCK.findall(page.read_text())
    assert [kind for kind, _ in blocks].count("text") == 2
    for number, (kind, content) in enumerate(blocks):
        if kind == "text":
            assert printed == content
            continue
        assert kind == "python"
        name = f"{page}#{number}"
        # So that torch.library can read the source, and reasons name the line.
        linecache.cache[name] = (len(content), None, content.splitlines(keepends=True), name)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(content, name, "exec"), namespace)
        printed = output.getvalue()


def test_adding_a_method(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    run_page("add-a-method.md")
    members, x = resnets(2), images()
    state, own = fxfuse.fuse(members, x, method="first").state_dict(), members[0].state_dict()
    for name in ("stem.weight", "block1.conv2.weight", "bn.running_var"):
        assert torch.equal(state[name], own[name])


def test_adding_a_score(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    run_page("add-a-score.md")
    members = resnets(2)
    plan = fxfuse.fuse(members, images(), score="spread", variant="iterative").plan
    assert plan.options == {"score": "spread", "variant": "iterative"}


@pytest.mark.parametrize(
    "page",
    [
        "refit.md",
        "stack.md",
        "choose-a-width.md",
        "different-members.md",
        "prune.md",
        "keep-a-plan.md",
        "use-as-a-compiler-pass.md",
        "large-members.md",
    ],
)
def test_a_page_that_prints(page: str, capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {"__name__": page}
    for kind, content in BLOCK.findall((PAGES / page).read_text()):
        if kind == "python":
            exec(compile(content, page, "exec"), namespace)
        else:
            assert capsys.readouterr().out == content


def test_links_between_pages_lead_somewhere():
    docs = PAGES.parent
    for page in docs.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page}: {target}"
    for entry in re.findall(r"[\w/-]+\.md", (docs.parent / "mkdocs.yml").read_text()):
        assert (docs / entry).is_file(), entry


def run_page(page: str) -> dict[str, object]:
    """Runs all Python blocks of a page, one after the other; returns what they define."""
    names: dict[str, object] = {"__name__": "page"}
    for kind, block in BLOCK.findall((PAGES / page).read_text()):
        if kind == "python":
            exec(compile(block, page, "exec"), names)
    return names


def test_partial_fusion(capsys):
    """Real digits: after a short fine-tuning, both heads are far above chance."""
    torch.manual_seed(0)
    found = run_page("partial-fusion.md")
    assert "even or odd: alone" in capsys.readouterr().out
    chance = (0.5, 0.1)
    for alone, tuned, guess in zip(found["alone"], found["tuned"], chance, strict=True):
        assert alone > guess + 0.3
        assert tuned > guess + 0.3
        assert tuned > alone - 0.1
    network = found["network"]
    assert network.get_parameter("heads.1.head.weight").shape == (10, 64)
    assert found["result"].verification.passed


def test_looking_at_a_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page("report.md")
    assert "Two networks" not in (tmp_path / "report.html").read_text()
    assert "best member" in (tmp_path / "report.html").read_text()
