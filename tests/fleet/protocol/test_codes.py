"""Closed vocabularies: declared once, each code with a remediation."""

import ast
from pathlib import Path

from fleet.protocol.codes import REMEDIATION, RejectCode, remediation

ROOT = Path(__file__).resolve().parents[3]


def vocabularies():
    """Every StrEnum of the product: its place and its words."""
    for package in ("agent", "fleet", "signing"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "StrEnum" for base in node.bases):
                    values = [each.value for each in node.body if isinstance(each, ast.Assign)]
                    words = frozenset(each.value for each in values if isinstance(each, ast.Constant))
                    yield f"{file.relative_to(ROOT)}: {node.name}", words


def test_no_vocabulary_is_declared_twice():
    places = {}
    for place, words in vocabularies():
        places.setdefault(words, set()).add(place)
    twins = [sorted(each) for each in places.values() if len(each) > 1]
    assert not twins, f"import these from fleet.protocol.codes: {twins}"


def test_every_code_has_a_remediation_but_the_one_where_nothing_is_wrong():
    assert set(REMEDIATION) == set(RejectCode)
    assert [code for code in RejectCode if not remediation(code)] == [RejectCode.SUPERSEDED]
    assert remediation("a-code-of-tomorrow") == ""
