"""Ordinary programs with real processes: a schedule and a service are pushed, watched, taken back and stopped."""

from pathlib import Path

import pytest
import wasmtime

from fleet.protocol.codes import Phase
from tests.e2e.stage import GROUP

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(180)]

COMMAND = Path(__file__).parents[2] / "components" / "guests" / "command.wat"
TOML = """
name = "{name}"
version = "{version}"
trigger = {trigger}

[health]
probation = "1s"
min_calls = 2
"""
RUNS = '{ type = "schedule", every = "100ms", args = ["print"] }'
SERVES = '{ type = "service", args = ["serve"] }'
ENDS = '{ type = "service", args = ["exit"] }'


def test_programs_are_pushed_and_one_that_ends_is_taken_back(stage, tmp_path):
    component = tmp_path / "program.wasm"
    component.write_bytes(wasmtime.wat2wasm(COMMAND.read_text()))

    async def push(name, version, trigger):
        component.with_suffix(".toml").write_text(TOML.format(name=name, version=version, trigger=trigger))
        return await stage.fleet("push", str(component), "--as", name, "--group", GROUP, "--waves", "100%")

    async def ok(*arguments):
        code, output, errors = await stage.fleet(*arguments)
        assert code == 0, output + errors
        return output

    async def logged(device, instance, line, times=1):
        """Wait until the device's own log of an instance has a line so often: no policy of its owner is in between."""

        def found():
            files = (stage.scene.directory / "devices" / device.name).rglob(f"{instance}.log")
            return sum(file.read_text().count(line) for file in files) >= times or None

        await stage.until(f"{instance} logs {line!r}", found)

    async def story():
        device = await stage.scene.add_device("berlin", GROUP)
        for name, trigger in (("reporter", RUNS), ("meter", SERVES)):
            before = await stage.latest(device)
            code, output, errors = await push(name, "1.0.0", trigger)
            assert code == 0, output + errors
            report = await stage.reported(device, phase=Phase.COMMITTED, after=before)
            assert report.code != "committed-unexercised"
        await logged(device, "reporter", "info hello from run")
        await logged(device, "meter", "info up")

        # One that ends by itself does not outlive its probation, and the one before runs again.
        before = await stage.latest(device)
        code, output, errors = await push("meter", "2.0.0", ENDS)
        assert (code, "rolled back" in output) == (1, True), output + errors
        report = await stage.reported(device, phase=Phase.ROLLED_BACK, after=before)
        assert report.code == "trapped"
        why = await ok("why", device.device, "--log")
        assert "exit code 1" in why, why

        await logged(device, "meter", "info up", times=2)
        await ok("remove", "meter", "--group", GROUP)

    stage.do(story())
