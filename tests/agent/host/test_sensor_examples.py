"""The sensors of components/examples in real workers: they read a meter, keep a total, and send readings."""

import json
import os
import subprocess
import sys

import pytest
import support
from modbus_server import Meter

from agent.host.engine.runtime import Engine
from agent.host.ipc import host_api
from fleet.component import component_toml, reader
from tests.eventually import eventually

SENSOR = support.ROOT / "components" / "examples" / "sensor"


@pytest.fixture
def meter():
    made = Meter()
    yield made
    made.close()


@pytest.fixture(scope="module", params=["rust", "python"])
def component(request, tmp_path_factory):
    """What the language's toolchain makes of the example."""
    out = tmp_path_factory.mktemp("sensor") / "sensor.wasm"
    done = subprocess.run(
        [sys.executable, SENSOR / "build.py", request.param, "-o", out], capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


def take(host, before=None):
    """Take messages as the agent does, once those of `before` are kept."""
    done = before.messages[-1].number if before and before.messages else 0
    session = before.session if before else ""
    reply = host.ask(host_api.TakeMessages, session=session, done=done, refused={}, wait_s=30)
    assert isinstance(reply, host_api.Messages), reply
    return reply


def sensor(component, meter, generation):
    """A run of the example with its own manifest, whose meter is on this machine."""
    text = (SENSOR / "sensor.toml").read_text().replace("10.1.0.5:502", f"127.0.0.1:{meter.port}")
    manifest = component_toml.describe(reader.read(component), text.replace('every = "10s"', 'every = "200ms"'))
    return host_api.Run(
        instance="sensor",
        generation=generation,
        target=f"components/main/sensor-{len(support.TESTS)}/1.0.{generation}.wasm",
        manifest=manifest,
        grants=manifest.grants,
        limits=manifest.limits,
        config={key: entry.default for key, entry in manifest.config.items()},
    )


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_readings_and_their_total_reach_the_operator_and_outlast_a_swap(host, meter, component):
    image = Engine().compile(component, sockets=True)

    def start(generation):
        fd = support.sealed(image)
        try:
            started = host.ask(host_api.Start, fd, run=sensor(component, meter, generation))
        finally:
            os.close(fd)
        assert isinstance(started, host_api.Started), started

    start(1)
    got = take(host)
    readings = [json.loads(each.data) for each in got.messages]
    assert readings[0] == {"celsius": 23.0, "readings": 1}
    assert {each.topic for each in got.messages} == {"plant/boiler/temperature"}
    start(2)
    while readings[-1]["readings"] < 5:
        got = take(host, got)
        readings += [json.loads(each.data) for each in got.messages]
    assert [each["readings"] for each in readings] == list(range(1, len(readings) + 1))
    take(host, got)
    eventually(lambda: any("info sent {" in line for line in host.lines_of("sensor")), "it says what it sent")
    assert host.health("sensor").errors == 0
