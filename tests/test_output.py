"""Results are written whole or not at all, and never over something of the user's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.reliability import killed
from fxfuse.common import output
from fxfuse.common.output import MARK, atomic_folder, check_output, locked, write_text
from fxfuse.errors import OutputError

NAMES = ("a.txt", "b.txt")


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(path, text, **options):
    with atomic_folder(path, NAMES, **options) as folder:
        (folder / "a.txt").write_text(f"{text}. {MARK}")


def test_writes_a_new_folder_and_nothing_else(tmp_path):
    write(tmp_path / "out", "one")
    assert contents(tmp_path) == ["out", "out/a.txt"]


def test_makes_missing_parents(tmp_path):
    write(tmp_path / "x" / "y" / "out", "one")
    assert contents(tmp_path) == ["x", "x/y", "x/y/out", "x/y/out/a.txt"]


def test_permissions_are_those_of_an_ordinary_folder(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_target_appears_only_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "out", NAMES) as folder:
        (folder / "a.txt").write_text(f"one. {MARK}")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a.txt").read_text() == f"one. {MARK}"


@pytest.mark.parametrize("error", [RuntimeWarning, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("path", ["out", "x/y/out"])
def test_an_error_leaves_nothing_behind(tmp_path, error, path):
    def write_and_fail():
        with atomic_folder(tmp_path / path, NAMES) as folder:
            (folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert contents(tmp_path) == []


def test_an_error_leaves_the_earlier_result(tmp_path):
    write(tmp_path / "out", "one")

    def write_and_fail():
        with atomic_folder(tmp_path / "out", NAMES, force=True) as folder:
            (folder / "a.txt").write_text("half")
            raise RuntimeWarning

    with pytest.raises(RuntimeWarning):
        write_and_fail()
    assert contents(tmp_path) == ["out", "out/a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == f"one. {MARK}"


def test_an_existing_folder_is_refused(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(OutputError, match="force=True"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "a.txt").read_text() == f"one. {MARK}"


def test_force_replaces_the_whole_folder(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "b.txt").write_text(f"stale. {MARK}")
    write(tmp_path / "out", "two", force=True)
    assert contents(tmp_path) == ["out", "out/a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == f"two. {MARK}"


def test_force_never_deletes_files_of_the_user(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        write(tmp_path / "out", "two", force=True)
    assert contents(tmp_path) == ["out", "out/a.txt", "out/thesis.tex"]


@pytest.mark.parametrize("kind", ["folder", "link", "by hand", "compiled"])
def test_force_replaces_only_files_with_the_mark(tmp_path, kind):
    """What has the name of one of ours may still be the user's."""
    path = tmp_path / "out" / "a.txt"
    path.parent.mkdir()
    names = (*NAMES, "network.onnx")
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    elif kind == "link":
        (tmp_path / "other").write_text(MARK)
        path.symlink_to(tmp_path / "other")
    elif kind == "compiled":
        path = path.with_name("network.onnx")
        path.write_text("years of work")
    else:
        path.write_text("years of work")
    if kind != "compiled":
        (tmp_path / "out" / "b.txt").write_text(MARK)
    before = contents(tmp_path)
    with (
        pytest.raises(OutputError, match=path.name),
        atomic_folder(tmp_path / "out", names, force=True) as folder,
    ):
        (folder / "a.txt").write_text(MARK)
    assert contents(tmp_path) == before


def test_compiled_forms_are_replaced_with_the_rest(tmp_path):
    for _ in range(2):
        with atomic_folder(tmp_path / "out", ("a", "network.onnx"), force=True) as folder:
            (folder / "a").write_text(MARK)
            (folder / "network.onnx").write_text("compiled")


def test_force_replaces_neither_files_nor_links(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(OutputError, match="not a folder"):
            check_output(tmp_path / name, NAMES, force=True)


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def race():
        with atomic_folder(tmp_path / "out", NAMES) as folder:
            (folder / "a.txt").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a.txt").write_text("theirs")

    with pytest.raises(OutputError, match="out exists already"):
        race()
    assert contents(tmp_path) == ["out", "out/a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "theirs"


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("out", "one")
    assert contents(tmp_path) == ["out", "out/a.txt"]


def test_write_text_replaces_a_file_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "2")
    assert contents(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"


def test_write_text_leaves_nothing_after_an_error(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "a.json", "1")
    assert contents(tmp_path) == ["a.json"]


def test_a_writer_that_is_killed_leaves_the_old_or_the_new():
    counts = killed(rounds=12)
    assert counts["rounds"] == 12
    # It was killed at work, and not before or after it.
    assert counts["replaced"] > 0
    assert counts["left over"] == 0


def test_an_old_result_that_stepped_aside_comes_back(tmp_path: Path):
    """Where two folders cannot be exchanged, a writer may be killed between the two renames."""
    (tmp_path / ".out.0123abcd.old").mkdir()
    (tmp_path / ".out.0123abcd.old" / "a.txt").write_text("old")
    (tmp_path / ".out.4567cdef.partial").mkdir()
    (tmp_path / ".out.of-the-user.partial").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", NAMES, force=True):
        raise ZeroDivisionError
    assert contents(tmp_path) == [".out.of-the-user.partial", "out", "out/a.txt"]


def test_without_exchange_the_old_one_steps_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "result", ["a"], force=True) as folder:
            (folder / "a").write_text(f"{text}. {MARK}")
    assert (tmp_path / "result" / "a").read_text() == f"new. {MARK}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize(("force", "name"), [(False, "a"), (False, "thesis"), (True, "thesis")])
def test_what_appears_at_the_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, force: bool, name: str
):
    """After the last look at the name, and before it is taken."""
    path = tmp_path / "result"
    original = output._swap_in

    def late(work: Path, target: Path, names: object, *, force: bool) -> None:
        target.mkdir(exist_ok=True)
        (target / name).write_text("theirs")
        original(work, target, names, force=force)

    monkeypatch.setattr(output, "_swap_in", late)
    if not exchanges:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_folder(path, ["a"], force=force) as folder,
    ):
        (folder / "a").write_text("ours")
    assert (path / name).read_text() == "theirs"
    assert contents(tmp_path) == ["result", f"result/{name}"]


def test_the_lock_is_no_link_to_somewhere_else(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for target in ("thesis.tex", "nowhere"):
        (tmp_path / ".out.lock").symlink_to(tmp_path / target)
        with pytest.raises(OutputError, match="symbolic link"):
            write(tmp_path / "out", "one")
        (tmp_path / ".out.lock").unlink()
    assert contents(tmp_path) == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_another_thread_writes_nothing_meanwhile(tmp_path: Path):
    with locked(tmp_path / "out"), ThreadPoolExecutor() as pool:
        other = pool.submit(write, tmp_path / "out", "two")
        with pytest.raises(OutputError, match="another process is writing"):
            other.result()
        write(tmp_path / "out", "one")
    assert contents(tmp_path) == ["out", "out/a.txt"]
