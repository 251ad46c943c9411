"""The how-to pages: what they show runs, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxfuse.rules import registry

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


def test_links_between_pages_lead_somewhere():
    docs = PAGES.parent
    for page in docs.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page}: {target}"
    for entry in re.findall(r"[\w/-]+\.md", (docs.parent / "mkdocs.yml").read_text()):
        assert (docs / entry).is_file(), entry
