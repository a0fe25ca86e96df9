"""Names that are not there: one exit code over all commands, against a real server."""

import asyncio
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.base import Exit
from fleet.cli.main import main

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
DEVICE = "gate-00000000"
UNKNOWN = (
    *("rollouts --group nope", "undo --group nope", "freeze --group nope --reason x", "unfreeze --group nope"),
    *("remove hello --group nope", "deploy hello@1.0.0 --group nope", "deploy hello@1.0.0 --group nope --dry-run"),
    *("push hello.wasm --group nope", "push hello.wasm --group nope --dry-run"),
    *("group policy nope", "devices --group nope", "bundle create --group nope -o b.tar", "secret rm x --group nope"),
    *("secret set x --group nope --instance hello", "rollout simulate --group nope"),
    *("component check hello.wasm --group nope", "operators revoke nope", "operators rotate nope"),
    *(f"device {DEVICE}", f"why {DEVICE}", f"pin {DEVICE} hello@1.0.0", f"unpin {DEVICE} hello"),
    *(f"retry {DEVICE} hello", f"restart {DEVICE} hello", f"logs hello --device {DEVICE}", f"label {DEVICE} a=b"),
    *(f"revoke {DEVICE} --yes", f"device set {DEVICE} hello a=b", f"device unset {DEVICE} hello a"),
    *(f"deploy hello@1.0.0 --device {DEVICE}", f"remove hello --device {DEVICE}", f"push hello.wasm --device {DEVICE}"),
    *(f"bundle create --device {DEVICE} -o b.tar", f"group change g --add {DEVICE}", f"audit verify {DEVICE}"),
    *(f"secret set x --device {DEVICE} --instance hello", f"component check hello.wasm --device {DEVICE}"),
    *(f"rollout cancel-device 99 {DEVICE}", "rollout 99", "rollout pause 99", "rollout resume 99", "rollout abort 99"),
    *("rollout retry 99", "rollout approve 99", "undo 99", "sbom show nope@1.0.0", "withdraw nope@1.0.0"),
    *("components nope", "keys rotate nope --yes", "sign renew nope --yes", "ca revoke abcd"),
)


@pytest.mark.asyncio
async def test_what_is_not_there_is_refused_by_every_command(new_fleet, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO / "v1.wasm", "hello.wasm")
    async with new_fleet() as fleet:
        await fleet.operator.publish("1.0.0")

        def codes() -> dict[str, tuple[int, str]]:
            found = {}
            for line in UNKNOWN:
                words = ["--home", str(fleet.home), *line.split()]
                done = CliRunner().invoke(main, words, input="a long value\n")
                found[line] = (done.exit_code, done.stderr)
            return found

        found = await asyncio.to_thread(codes)
    assert {line: each for line, each in found.items() if each[0] != Exit.REFUSED} == {}
    for line, (_, said) in found.items():
        assert len(said.splitlines()) == 1, (line, said)
        if "--group nope" in line and "unfreeze" not in line:
            assert "there is no group 'nope'" in said, (line, said)
    assert not (tmp_path / "b.tar").exists()


@pytest.mark.asyncio
async def test_a_withdrawn_release_is_called_withdrawn(new_fleet) -> None:
    """Nobody is told to publish again what can never be published again."""
    async with new_fleet() as fleet:
        await fleet.device("gate")
        await fleet.operator.publish("1.0.0")
        assert (await fleet.command("withdraw", "hello@1.0.0", "--yes")).code == 0
        for more in ((), ("--dry-run",)):
            done = await fleet.command("deploy", "hello@1.0.0", "--group", "edge", *more)
            assert done.code == Exit.REFUSED
            assert "main/hello@1.0.0 was withdrawn; a withdrawal is for good; deploy another version" in done.stderr
        # moved into hash bins, it is still nothing new
        moved = await fleet.command("sign", "bins", "--bits", "2", "--yes")
        assert moved.code == 0, moved.stderr
        assert "hello@1.0.0" not in moved.stderr
        done = await fleet.command("deploy", "hello@1.0.0", "--group", "edge")
        assert "was withdrawn" in done.stderr
