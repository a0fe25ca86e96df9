"""What the host is told of an instance is what the assignment, the manifest and the board's policy say together."""

from agent.config import Policy
from agent.update.restore import run_of
from fleet.protocol.assignment import Item
from fleet.protocol.manifest import Http, Manifest


def test_what_the_operator_says_of_an_instance_reaches_the_host():
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
    assert not item.same_as(sharing), "it is another thing to run: the board must act on it"
