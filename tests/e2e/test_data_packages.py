"""Data packages with real processes: published, deployed, mounted, switched, taken back, undone."""

import asyncio
import urllib.request
from pathlib import Path

import pytest
import wasmtime

from tests.e2e.stage import GROUP

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(180)]

READS = Path(__file__).parents[2] / "components" / "guests" / "reads.wat"
TOML = """
name = "reader"
version = "1.0.0"
trigger = "http"

[data.m]
path = "/models/m"
version = ">=1, <3"

[health]
probation = "1s"
min_calls = 0
"""


def test_data_is_pushed_mounted_switched_and_undone(stage, tmp_path):
    component, model = tmp_path / "reader.wasm", tmp_path / "model.bin"
    component.write_bytes(wasmtime.wat2wasm(READS.read_text()))
    (tmp_path / "component.toml").write_text(TOML)

    async def ok(*arguments):
        code, output, errors = await stage.fleet(*arguments)
        assert code == 0, output + errors
        return output

    async def push(text):
        model.write_text(text)
        return await ok("data", "push", str(model), "--name", "m", "--group", GROUP, "--waves", "100%")

    def read(device):
        url = f"http://127.0.0.1:{device.port}/reader/"
        with urllib.request.urlopen(urllib.request.Request(url, data=b"0m", method="GET"), timeout=10) as answer:
            return answer.read().decode()

    async def content(device):
        return await asyncio.to_thread(read, device)

    def kept(device):
        row = stage.scene.client.device(device.device).row
        return [target.rsplit("/", 1)[1].partition(".")[0] for target in row.data.values()]

    async def story():
        device = await stage.scene.add_device("berlin", GROUP)
        await push("weights 1")
        await ok("push", str(component), "--group", GROUP, "--waves", "100%")
        assert await content(device) == "weights 1"
        await push("weights 2")
        assert await content(device) == "weights 2"
        assert "m@2.0.0" in await ok("data", "list")
        # The reader takes no version 3: the device keeps it, and the reader stays.
        await push("weights 3")
        assert await content(device) == "weights 2"
        await ok("undo")
        assert await content(device) == "weights 2"
        await ok("undo", "3")
        assert await content(device) == "weights 1"
        await stage.until("the device says which data it keeps", lambda: kept(device) == ["1"] or None)
        assert "main/m@1.0.0" in await ok("device", device.device)

    stage.do(story())
