"""Cancellation always ends a task of the product."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("agent", "fleet", "signing") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_wait_swallows_a_cancellation(path):
    """Python 3.11's `wait_for` does where its result comes in the same turn; `asyncio.timeout` does not."""
    assert "asyncio.wait_for" not in path.read_text(encoding="utf-8")
