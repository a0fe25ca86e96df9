"""A component built for wasi:http, pushed as it is: signed, composed on the device, swapped in under load."""

import http.client
import shutil
from pathlib import Path

import pytest

from fleet.demo.load import Load
from fleet.protocol.codes import Phase
from tests import packed
from tests.e2e.stage import GROUP, HELLO

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

COMPONENTS = Path(__file__).resolve().parents[2] / "components"
PROBE = packed.guest_file("probe")
TICKER = COMPONENTS / "demo" / "ticker.wasm"


@pytest.fixture
def probe(tmp_path):
    """The adapter's test guest, with the component.toml that grants what it imports."""
    shutil.copy(PROBE, tmp_path)
    (tmp_path / "component.toml").write_text(
        'name = "probe"\nversion = "1.0.0"\n\n[grants]\ninterfaces = ["wasi:http/outgoing-handler"]\n'
    )
    return tmp_path / PROBE.name


def get(device, path):
    client = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
    try:
        client.request("GET", f"/{HELLO}{path}")
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def test_without_its_grant_a_component_is_refused_with_the_file_to_save(stage, device, tmp_path):
    shutil.copy(TICKER, tmp_path)
    code, output, errors = stage.do(stage.push(tmp_path / TICKER.name))
    assert code != 0
    assert "wasi:logging/logging" in output + errors


def test_it_takes_over_from_a_native_component_and_nobody_notices(stage, device, probe):
    async def story():
        async with Load(port=device.port, path=f"/{HELLO}/", kept_alive=2, fresh=2, pause_s=0.01) as load:
            await load.sent(50)
            await stage.pushed(probe)
            await load.sent(50)
            return await load.stop()

    result = stage.do(story())
    assert result.lost == 0, result.losses
    assert get(device, "/") == (200, b"hello over wasi:http\n")
    status, seen = get(device, "/describe?a=1")
    assert status == 200
    assert seen.startswith(b"get /describe?a=1 http 127.0.0.1")


def test_when_it_traps_in_probation_the_device_takes_the_native_one_back(stage, device, probe):
    text = probe.with_name("component.toml").read_text()
    probe.with_name("component.toml").write_text(text.replace("1.0.0", "1.0.1") + "\n[health]\nprobation = '60s'\n")
    stage.do(stage.pushed("v2.wasm"))

    async def story():
        began = await stage.latest(device)
        pushed = stage.fleet("push", str(probe), "--as", HELLO, "--group", GROUP, "--waves", "100%", "--detach")
        await pushed
        await stage.reported(device, phase=Phase.PROBATION, after=began)
        get(device, "/trap")
        entry = await stage.reported(device, phase=Phase.ROLLED_BACK, after=began)
        return entry, await stage.version(device)

    entry, version = stage.do(story())
    assert entry.code == "trapped"
    assert version == "2"
