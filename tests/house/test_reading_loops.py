"""A loop that reads until something has come ends when the other end closes: a read that returns nothing stays so.

A thread that goes on takes a processor, and the interpreter, from every test after it in the same process.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READS = frozenset({"recv", "recv_into"})
CALLS = frozenset({"fail", "_exit"})  # that end a loop too
ENDS = (ast.Break, ast.Return, ast.Raise, ast.Assert, ast.NamedExpr)


def goes_on_at_the_end(loop: ast.While) -> bool:
    """Tell whether a loop reads a socket and has no way out but what it waits for."""
    called = [each.func.attr for each in ast.walk(loop) if isinstance(each, ast.Call) and hasattr(each.func, "attr")]
    leaves = any(isinstance(each, ENDS) for each in ast.walk(loop))
    return not leaves and CALLS.isdisjoint(called) and not READS.isdisjoint(called)


def endless(text: str) -> list[int]:
    """Return the lines of such loops."""
    return [
        each.lineno for each in ast.walk(ast.parse(text)) if isinstance(each, ast.While) and goes_on_at_the_end(each)
    ]


def test_loops_that_read_end_with_the_connection():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("agent", "fleet", "signing", "components", "deploy", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ".recv" in (text := path.read_text())
        for line in endless(text)
    ]
    assert not found, f"these go on for ever when the other end closes: {found}"


def test_such_a_loop_is_found():
    assert endless("while b'x' not in data:\n    data += sock.recv(9)\n") == [1]
    assert endless("while b'x' not in data:\n    data += sock.recv(9) or pytest.fail('closed')\n") == []
    assert endless("while more := sock.recv(9):\n    data += more\n") == []
