"""The pages: the code that they show runs and prints what they say, and what they name exists."""

from __future__ import annotations

import importlib.util
import itertools
import linecache
import math
import os
import re
import shlex
import shutil
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from PIL import Image

import fxfuse
from benchmarks import site_check
from benchmarks.site_check import SCHEMES, SHOWN, WIDTHS
from fxfuse import Transplant
from fxfuse.analysis.rules import registry
from fxfuse.cli.app import app
from fxfuse.cli.lazy import COMMANDS
from fxfuse.planning.methods import registry as methods
from fxfuse.planning.scores import registry as scores
from tests.forked import Child
from tests.forked import script as run_script
from tests.nets import images, resnets

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: All pages that somebody reads, found and not listed: a page cannot be forgotten here.
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        ROOT / "changelog.d" / "README.md",
    )
}
#: A title on a block of output says that numbers vary: they are compared loosely.
BLOCK = re.compile(r"^```(\w+)( title=\"[^\"\n]*\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
KINDS = {"python", "bash", "text", "toml", "yaml"}


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    varies: bool
    content: str


def blocks(page: str) -> list[Block]:
    found = BLOCK.findall(PAGES[page].read_text())
    return [Block(kind, bool(title), content) for kind, title, content in found]


def with_code(kind: str) -> list[str]:
    return sorted(page for page in PAGES if any(block.kind == kind for block in blocks(page)))


# What Python blocks do.


@pytest.fixture
def own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a page registers is forgotten afterwards, and what it writes is not in the way."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    monkeypatch.chdir(tmp_path)


def run(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Runs the Python blocks of a page one after the other; returns what they define."""
    names: dict[str, Any] = {"__name__": Path(page).stem}
    capsys.readouterr()
    for number, (kind, varies, content) in enumerate(blocks(page)):
        if kind == "python":
            name = f"{page}#{number}"
            # So that torch.library can read the source, and reasons name the line.
            linecache.cache[name] = (len(content), None, content.splitlines(keepends=True), name)
            # Without the futures that this file imports: a user has none of them.
            exec(compile(content, name, "exec", dont_inherit=True), names)
        elif kind == "text":
            printed = capsys.readouterr().out
            if varies:
                assert alike(printed, content), printed
            else:
                assert printed == content
    return names


def alike(printed: str, shown: str) -> bool:
    """Whether two texts agree but for numbers, and those to 2 or a fifth of the larger one."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", shown).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.2, abs_tol=2) for a, b in pairs)


#: Pages whose program several processes run, as torchrun starts them.
SEVERAL = [
    page
    for page in with_code("python")
    if any(b.kind == "bash" and b.content.startswith("torchrun ") for b in blocks(page))
]


#: Pages that compile ahead of time, or need packages that the other tests do not.
NIGHTLY = {"docs/how-to/deploy.md": ("torchao", "onnxruntime", "executorch")}


@pytest.mark.usefixtures("own_world")
@pytest.mark.parametrize("page", sorted(set(with_code("python")) - set(SEVERAL) - set(NIGHTLY)))
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]):
    names = run(page, capsys)
    if page in AFTERWARDS:
        AFTERWARDS[page](names)


@pytest.mark.nightly
@pytest.mark.usefixtures("own_world")
@pytest.mark.parametrize("page", NIGHTLY)
def test_the_code_of_a_page_that_takes_long_runs(page: str, capsys: pytest.CaptureFixture[str]):
    for package in NIGHTLY[page]:
        pytest.importorskip(package)
    run(page, capsys)


@pytest.mark.parametrize("page", SEVERAL)
def test_the_code_of_a_page_for_several_processes_runs(page: str, tmp_path: Path):
    content = {k: [b.content for b in blocks(page) if b.kind == k] for k in ("python", "text")}
    script = tmp_path / "train.py"
    script.write_text("\n".join(content["python"]))
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            # What torchrun tells each of its processes.
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group["WORLD_SIZE"] = "2"
        processes = [
            Child(run_script, script, environment={**group, "RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        codes, outs, errs = zip(*(process.ended() for process in processes), strict=True)
        # Once in many runs gloo's threads abort a program that is over (pytorch/pytorch#179291).
        if "terminate called without an active exception" not in "".join(errs):
            break
    assert codes == (0, 0), errs
    assert "".join(outs) == "".join(content["text"])


def a_method_was_added(names: dict[str, Any]) -> None:
    members, x = resnets(2), images()
    state, own = fxfuse.fuse(members, x, method="first").state_dict(), members[0].state_dict()
    for name in ("stem.weight", "block1.conv2.weight", "bn.running_var"):
        assert torch.equal(state[name], own[name])


def a_score_was_added(names: dict[str, Any]) -> None:
    plan = fxfuse.fuse(
        resnets(2), images(), method=Transplant(score="spread", variant="iterative")
    ).plan
    assert plan.options == {"score": "spread", "variant": "iterative"}


def both_heads_answer(names: dict[str, Any]) -> None:
    """Real digits: after a short fine-tuning, both heads are far above chance."""
    for alone, tuned, guess in zip(names["alone"], names["tuned"], (0.5, 0.1), strict=True):
        assert alone > guess + 0.3
        assert tuned > guess + 0.3
        assert tuned > alone - 0.1
    assert names["network"].get_parameter("heads.1.head.weight").shape == (10, 64)


def a_report_was_written(names: dict[str, Any]) -> None:
    written = Path("report.html").read_text()
    assert "Two networks" not in written  # the second report replaced the first
    assert "best member" in written


def specialists_are_worth_fusing(names: dict[str, Any]) -> None:
    """What the tutorial says of its table, with room for other machines' numbers."""
    table = torch.tensor(names["rows"])
    best, matched, fused, ensemble, tuned = table.T
    assert (fused > best + 5).all()
    assert abs(fused.mean() - matched.mean()) < 2
    assert fused.mean() > ensemble.mean() - 3
    assert (fused > ensemble - 6).all()
    assert (tuned > ensemble).all()
    assert names["accuracy"](names["plain"].module) < fused[0] - 10


#: What is checked besides that a page runs and prints what it says.
AFTERWARDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/how-to/add-a-method.md": a_method_was_added,
    "docs/how-to/add-a-score.md": a_score_was_added,
    "docs/how-to/partial-fusion.md": both_heads_answer,
    "docs/how-to/report.md": a_report_was_written,
    "docs/tutorial.md": specialists_are_worth_fusing,
}


def test_checks_of_pages_belong_to_pages_that_run():
    assert set(AFTERWARDS) <= set(with_code("python"))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_is_one_that_is_looked_at(page: str):
    """No fence that BLOCK overlooks (indented, tildes, unclosed, without a language)."""
    fences = re.findall(r"^[ >]*(?:```|~~~)", PAGES[page].read_text(), re.MULTILINE)
    found = blocks(page)
    assert len(fences) == 2 * len(found)
    assert {block.kind for block in found} <= KINDS


# What is written for the shell.


def shell_commands(page: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command of a page, and whether it stands there whole."""
    text = BLOCK.sub("", PAGES[page].read_text())
    for inline in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield inline.split(), False
    for block in blocks(page):
        if block.kind != "bash":
            continue
        for line in block.content.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for separator, command in itertools.groupby(words, ("&&", ";", "|").__contains__):
                if not separator:
                    yield list(command), True


def test_every_fxfuse_command_can_be_parsed():
    group = typer.main.get_command(app)
    context = group.make_context("fxfuse", ["demo"])
    seen = 0
    for page in set(PAGES) - {"docs/errors.md"}:  # its commands are wrong on purpose
        for words, whole in shell_commands(page):
            if words[:1] != ["fxfuse"] or len(words) < 2 or words[1].startswith("-"):
                continue
            assert words[1] in COMMANDS, f"{page}: {words}"
            _, command, arguments = group.resolve_command(context, words[1:])
            if whole and "..." not in words:
                command.make_context(words[1], arguments)  # raises where it cannot be parsed
            known = {option for parameter in command.params for option in parameter.opts}
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert options <= known | {"--help"}, f"{page}: {words}"
            seen += 1
    assert seen > 10


def test_every_module_and_script_that_a_command_names_exists():
    seen = 0
    for page in PAGES:
        for words, _ in shell_commands(page):
            if words[:1] != ["python"] or len(words) < 2 or re.search(r"[<$]", " ".join(words)):
                continue
            if words[1] == "-m" and words[2].startswith(("benchmarks.", "fxfuse.")):
                assert importlib.util.find_spec(words[2]) is not None, f"{page}: {words}"
                seen += 1
            elif words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), f"{page}: {words}"
                seen += 1
    assert seen > 10


# What pages say of each other.


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str):
    text = BLOCK.sub("", PAGES[page].read_text())
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (PAGES[page].parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    """`mkdocs build --strict` checks it, too; here it needs no mkdocs."""
    navigation = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(navigation) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_few_entries_of_the_navigation_are_in_sight_at_a_time():
    """The tabs, the entries of one tab with its folders closed, and those of one open folder."""
    tabs = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    names = ["Get started", "How to", "Concepts", "Reference", "Performance", "Project"]
    assert [name for tab in tabs for name in tab] == names
    for name, entries in ((name, entries) for tab in tabs for name, entries in tab.items()):
        folders = [len(next(iter(e.values()))) for e in entries if not leads_to_a_page(e)]
        # Those who open the paper's experiments or the decisions want all of them.
        most = 0 if name == "Project" else max(folders, default=0)
        assert len(tabs) + len(entries) + most <= 25, name
    how_to = next(tab["How to"] for tab in tabs if "How to" in tab)
    assert leads_to_a_page(how_to[0])
    assert "Extend" in how_to[-1]  # what contributors read comes last


def leads_to_a_page(entry: str | dict[str, Any]) -> bool:
    return isinstance(entry, str) or isinstance(next(iter(entry.values())), str)


@pytest.mark.nightly
def test_pages_in_a_browser(tmp_path: Path):
    """None scrolls sideways. FXFUSE_SCREENSHOTS=docs/pictures renews the pictures of four pages.

    With FXFUSE_AXE, the path of axe-core's script, nothing that it calls serious is found either.
    """
    build = pytest.importorskip("mkdocs.commands.build").build
    config = pytest.importorskip("mkdocs.config").load_config
    pytest.importorskip("material")
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    build(config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    shots = Path(os.environ.get("FXFUSE_SCREENSHOTS", tmp_path / "shots"))
    axe = ["--axe", os.environ["FXFUSE_AXE"]] if "FXFUSE_AXE" in os.environ else []
    assert site_check.main([str(tmp_path / "site"), "--shots", str(shots), *axe]) == 0
    for page, width, scheme in itertools.product(SHOWN, WIDTHS, SCHEMES):
        with Image.open(shots / f"site-{page}-{width}-{scheme}.png") as image:
            assert image.size == (width, 900)
            # Not blank, and in the colours that the reader asked for.
            pixels = image.convert("RGB")
            assert len(pixels.getcolors()) > 16
            assert (sum(pixels.getpixel((2, 600))) < 200) is (scheme == "dark")


def test_every_change_is_one_that_towncrier_finds():
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changelog.d").glob("[!.]*"):
        if path.name == "README.md":
            continue
        found = re.fullmatch(r"\+[\w-]+\.(\w+)\.md", path.name)
        assert found is not None, f"{path.name}: see changelog.d/README.md"
        assert found[1] in kinds, path.name
        for target in re.findall(r"\]\(([^)#:\s]+)", path.read_text()):
            assert (ROOT / target).exists(), f"{path.name}: {target}"
