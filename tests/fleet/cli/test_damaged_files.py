"""An operator's directory after a power cut: every file in turn is empty, full of zeros or cut off.

Two outcomes are right for every command: it works, or one line names the file and says what to do. It is never a bug.
"""

import asyncio
import shutil

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from tests.fleet.server.conftest import Fleet

DAMAGES = {
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
    "cut off": lambda data: data[: len(data) // 2],
}
COMMANDS = (("status",), ("audit", "verify"), ("keys", "list"), ("sign", "status"), ("ca", "status"))
BUG = 70


def run(home, *words):
    found = CliRunner().invoke(main, ["--home", str(home), *words])
    return found.exit_code, found.output.strip().splitlines()[-1]


def play(home, place):
    """Damage every file in turn; what is wrong afterwards."""
    for words in COMMANDS:
        assert run(home, *words)[0] == 0
    operator = home / "operator"
    found = sorted(path.relative_to(operator) for path in operator.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(found) > 10
    wrong = []
    for name in found:
        for damage, change in DAMAGES.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(operator, place / "operator")
            path = place / "operator" / name
            path.write_bytes(change(path.read_bytes()))
            for words in COMMANDS:
                code, said = run(place, *words)
                named = str(path) in said or (name.name == "token" and "operator/token" in said)
                if code == BUG or (code != 0 and not named):
                    wrong.append((damage, str(name), words[0], said))
    return wrong


@pytest.mark.asyncio
@pytest.mark.parametrize("size", ["dev", "solo"])
async def test_every_file_of_an_operator_in_turn(tmp_path, size):
    async with Fleet(tmp_path, "auto", size) as fleet:
        await fleet.enrol("a")
        assert await asyncio.to_thread(play, fleet.home, tmp_path / "other") == []
