"""`docs/device.md` names what there is: commands, settings, sentences of the product, files.

Its shell lines are run on an emulated board (`tests/boards/test_soak.py`).
"""

import ast
import re
from pathlib import Path

import pytest

from fleet.protocol.codes import Outcome, Phase, RejectCode

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/device.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))))
LINES = [line for block in re.findall(r"```sh board\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PROGRAMS = re.compile(r"(fleet-(?:agent|host)) ([a-z][a-z-]+)((?: -[\w-]+)*)")
COMMANDS = sorted({found for text in (*CODE, *LINES) for found in PROGRAMS.findall(text)})
KEYS = re.compile(r"(policy|disk|network)\.\w+|recheck_s|health_s")


def words():
    """Every literal string of the agent and the host."""
    for file in (ROOT / "agent").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_commands_of_the_page_exist():
    commands = [each for each in COMMANDS if not each[1].startswith("fleet")]
    assert len(commands) >= 8
    for program, command, options in commands:
        text = (ROOT / f"tests/golden/commands/{program}.txt").read_text()
        assert re.search(rf"\b{program} {command}\b", text), (program, command)
        assert all(option in text for option in options.split())


@pytest.mark.parametrize("key", [each for each in CODE if KEYS.fullmatch(each)])
def test_settings_of_the_page_are_settings_of_the_agent(key):
    assert f"| `{key}` |" in (ROOT / "docs/agent.md").read_text()


@pytest.mark.parametrize("sentence", sorted(set(re.findall(r'^\| [^|]*"[^|]*"', PAGE, re.MULTILINE))))
def test_what_a_device_says_is_what_the_page_quotes(sentence):
    there = list(words())
    for quoted in re.findall(r'"([^"]+)"', sentence):
        assert any(quoted in each for each in there), quoted


def test_codes_of_the_page_are_codes_of_the_product():
    first = [row.split("|")[1] for row in PAGE.partition("## What to do when")[2].splitlines() if row.startswith("| `")]
    known = {each.value for kind in (Outcome, Phase, RejectCode) for each in kind}
    found = {code for cell in first for code in re.findall(r"`([a-z-]+)`", cell)}
    assert len(found) >= 4
    assert found <= known


@pytest.mark.parametrize("file", [each for each in CODE if re.fullmatch(r"(agent|tests)/[\w/]+\.py", each)])
def test_files_of_the_page_exist(file):
    assert (ROOT / file).exists()
