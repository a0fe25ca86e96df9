"""Run request for the host: assignment, manifest and the device owner's policy combined."""

from agent.config import Policy
from agent.update.restore import run_of
from fleet.protocol.assignment import Item
from fleet.protocol.hardware import Hardware, SerialPort
from fleet.protocol.manifest import Grants, Http, Manifest


def test_the_operators_settings_of_an_instance_reach_the_host():
    manifest = Manifest(name="hello", version="1.0.0", trigger=Http())
    item = Item(
        instance="hello",
        target="components/main/hello/1.0.0.wasm",
        length=1,
        sha256="00" * 32,
        manifest_sha256=manifest.digest(),
        port=8081,
    )
    told = run_of(item, manifest, 3, Policy())
    assert (told.generation, told.port, told.share_worker) == (3, 8081, False)
    sharing = Item(**{**{name: getattr(item, name) for name in item.__struct_fields__}, "share_worker": True})
    assert run_of(sharing, manifest, 3, Policy()).share_worker
    assert not run_of(sharing, manifest, 3, Policy(share_workers=False)).share_worker, "the owner of the device decides"
    assert not item.same_as(sharing), "it is another thing to run: the device must act on it"


def test_the_host_is_told_the_device_of_each_serial_port_that_is_granted_and_of_no_other():
    ports = (SerialPort(name="meter", baud=9600),)
    grants = Grants(interfaces=("wasmfleet:serial",), hardware=Hardware(serial=ports))
    manifest = Manifest(name="hello", version="1.0.0", trigger=Http(), grants=grants)
    item = Item(
        instance="hello",
        target="components/main/hello/1.0.0.wasm",
        length=1,
        sha256="00" * 32,
        manifest_sha256=manifest.digest(),
    )
    owners = Policy(serial={"meter": "/dev/ttyUSB0", "modem": "/dev/ttyUSB1"})
    assert run_of(item, manifest, 1, owners).serial == {"meter": "/dev/ttyUSB0"}
    assert run_of(item, manifest, 1, Policy()).serial == {}
