"""Tests import no tests: what several of them need stands in support modules beside them, or in fixtures."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import, wherever it stands in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def of_tests(source: str) -> list[tuple[int, str]]:
    """List the imports of test modules, by line."""
    # `from test_life import x` and `from tests.agent import test_life` alike; a name like `test_x` in a support module
    # would be a test too
    return [
        (line, name) for line, name in imported(source) if any(part.startswith("test_") for part in name.split("."))
    ]


def test_no_test_and_no_support_module_imports_a_test() -> None:
    found = [
        f"{file.relative_to(TESTS.parent)}:{line} imports {name}"
        for file in sorted(TESTS.rglob("*.py"))
        for line, name in of_tests(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "from test_life import lanes_of",
        "import test_life",
        "from tests.agent.test_desired import Case",
        "from tests.agent import test_desired",
        "import tests.agent.test_desired as cases",
        "def late():\n    from test_router import ECHO",
    ],
)
def test_each_way_to_import_a_test_is_seen(line: str) -> None:
    assert of_tests(line)


@pytest.mark.parametrize(
    "line", ["from tests.agent.desired_case import Case", "import support", "from latest_x import y"]
)
def test_support_modules_may_be_imported(line: str) -> None:
    assert not of_tests(line)
