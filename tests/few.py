"""A pytest plugin for quick looks: of a test with parameters, the first two only.

pytest -p tests.few
"""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    kept, left = [], []
    for item in items:
        key = str(item.path), getattr(item, "originalname", item.name)
        seen[key] += 1
        (kept if seen[key] <= 2 else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
