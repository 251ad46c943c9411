"""What is kept of a coverage report."""

from __future__ import annotations

import json

import pytest

from benchmarks import tests_covered


def summary(statements: int, covered: int, branches: int, taken: int) -> dict[str, int]:
    return {
        "num_statements": statements,
        "covered_lines": covered,
        "num_branches": branches,
        "covered_branches": taken,
    }


def report(covered: int) -> dict[str, object]:
    behind, ahead = summary(50, covered - 50, 4, 1), summary(50, 50, 0, 0)
    return {
        "meta": {"version": "7.17.5", "timestamp": "2026-11-28T00:00:00"},
        "totals": summary(100, covered, 4, 1),
        "files": {"fxfuse/b.py": {"summary": behind}, "fxfuse/a.py": {"summary": ahead}},
    }


def test_shares_and_the_files_that_are_behind_are_kept():
    kept = tests_covered.kept(report(91), wanted=90)
    assert kept["total"] == {"lines": 91.0, "branches": 25.0}
    assert kept["behind"] == {"fxfuse/b.py": {"lines": 82.0, "branches": 25.0}}


@pytest.mark.parametrize(("covered", "status"), [(90, 0), (89, 1)])
def test_too_little_is_an_exit_status(covered: int, status: int, tmp_path, monkeypatch):
    path = tmp_path / "coverage.json"
    path.write_text(json.dumps(report(covered)))
    monkeypatch.setattr(tests_covered, "RESULTS", tmp_path / "kept.json")
    monkeypatch.setattr("sys.argv", ["tests_covered", str(path)])
    assert tests_covered.main() == status
    assert json.loads((tmp_path / "kept.json").read_text())["statements"] == 100
