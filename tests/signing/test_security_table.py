"""docs/security.md lists every simulated attack, no other, and only existing tests."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "security.md"
STORIES = (HERE / "test_attacks.py", HERE / "test_attacks_stolen_keys.py")


def rows() -> list[tuple[str, str, str]]:
    """Read the table of attacks: (attack, codes, test)."""
    table = DOCUMENT.read_text().partition("## The attacks")[2]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    return [(attack, codes, test.strip("` |")) for attack, _, codes, test in cells[2:]]


def stories() -> dict[str, tuple[str, str]]:
    """Read code and file of each attack from the decorators of the stories."""
    found = {}
    for file, node in ((path, node) for path in STORIES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attack":
            name, code = node.args
            assert isinstance(name, ast.Constant)
            assert isinstance(code, ast.Attribute)
            found[name.value] = (code.attr.lower().replace("_", "-"), str(file.relative_to(ROOT)))
    return found


def test_every_simulated_attack_is_in_the_table_with_its_code_and_file() -> None:
    listed = {attack: (codes.strip("`"), test) for attack, codes, test in rows() if "::" not in test}
    assert listed == stories()


@pytest.mark.parametrize(("attack", "codes", "test"), rows(), ids=[row[0] for row in rows()])
def test_every_row_names_a_test_that_exists(attack: str, codes: str, test: str) -> None:
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text()
    assert not name or re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE)
