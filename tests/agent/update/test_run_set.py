"""Run request for the host: assignment, manifest and the device owner's policy combined."""

from agent.config import Policy
from agent.update.restore import run_of
from fleet.protocol.assignment import Item
from fleet.protocol.manifest import Http, Manifest


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
