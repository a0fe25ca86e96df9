"""Habits of tests that are read from their source: no imports of tests, no event loops by hand, no sleeping."""

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
        "from tests.agent.update.test_receiver import Case",
        "from tests.agent import test_desired",
        "import tests.agent.update.test_receiver as cases",
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


# -- event loops


def calls(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_no_test_runs_an_event_loop_by_hand() -> None:
    # a support module may, for a server in a thread of its own
    found = [
        f"{file.relative_to(TESTS.parent)}:{line}: mark the test with pytest.mark.asyncio"
        for file in sorted(TESTS.rglob("test_*.py"))
        for line, name in calls(file.read_text(encoding="utf-8"))
        if name == "asyncio.run"
    ]
    assert not found, "\n".join(found)


# -- waiting

# file -> why it sleeps; whoever waits for something takes an event, or `eventually` where there is none
SLEEPS = {
    "tests/eventually.py": "the one place for what has no event",
    "tests/agent/host/support.py": "reads what the kernel tells of a connection; runs on boards with this folder alone",
    "tests/agent/link/test_https.py": "a server that is slow: the pauses are what is tested",
    "tests/bench/test_host.py": "counts what happens in a time at rest",
    "tests/boards/operator_side.py": "the API's listings have nothing to wait on",
    "tests/boards/rig.py": "QEMU tells nobody when it listens",
    "tests/boards/test_power.py": "cuts the power at a moment; waits for a board that boots",
    "tests/boards/test_soak.py": "breaks things at a moment, for a time; measures what happens in a time at rest",
    "tests/e2e/test_soak.py": "breaks things at a moment, for a time; measures what happens in a time at rest",
}


def idle(source: str) -> Iterator[tuple[int, str]]:
    """Yield each place that sleeps, gives the processor away, or spins with nothing to do."""
    for line, name in calls(source):
        if name in {"time.sleep", "os.sched_yield", "threading.Event().wait", "Event().wait"}:
            yield line, name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.While) and all(isinstance(each, ast.Pass | ast.Continue) for each in node.body):
            yield node.lineno, "while ...: pass"
        # asyncio.sleep(0) lets what is due run
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "asyncio.sleep"
            and ast.unparse(node.args[0]) != "0"
        ):
            yield node.lineno, "asyncio.sleep"


def test_nobody_sleeps_or_spins_but_for_a_reason() -> None:
    sleeping = {
        str(file.relative_to(TESTS.parent)): found
        for file in sorted(TESTS.rglob("*.py"))
        if (found := list(idle(file.read_text(encoding="utf-8"))))
    }
    assert {name: found for name, found in sleeping.items() if name not in SLEEPS} == {}
    assert set(SLEEPS) <= set(sleeping), "a file that sleeps no more leaves the list"


@pytest.mark.parametrize(
    "source",
    ["while lane in lanes_of(host):\n    pass", "while not done:\n    os.sched_yield()", "await asyncio.sleep(0.01)"],
)
def test_each_way_to_spin_is_seen(source: str) -> None:
    assert list(idle(f"async def test():\n    {source.replace(chr(10), chr(10) + '    ')}"))
