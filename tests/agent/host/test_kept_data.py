"""Data of instances that no longer run: removed by a real host unless the agent names them, and of older schemas."""

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants
from tests.agent.host import files_guest, pairs_guest, support
from tests.agent.host.files_guest import Files
from tests.agent.host.pairs_guest import Pairs

FILES = Grants(interfaces=("wasi:filesystem",))
PAIRS = Grants(interfaces=("wasi:keyvalue",))


def begun(host, guest, name, generation=1, *, grants, **rest):
    port = support.free_port()
    reply = host.start(guest, support.a_run(name, generation, port=port, grants=grants, **rest))
    assert isinstance(reply, host_api.Started), reply
    return port


def files(host, name, generation=1, **rest):
    return Files(begun(host, files_guest.guest(), name, generation, grants=FILES, **rest))


def pairs(host, name, generation=1, **rest):
    return Pairs(begun(host, pairs_guest.guest(), name, generation, grants=PAIRS, **rest))


def keep(host, *names):
    assert isinstance(host.ask(host_api.KeepData, instances=names), host_api.Done)


def test_data_of_instances_that_neither_run_nor_are_named_is_removed(host):
    for name in ("gone", "kept", "runs"):
        assert files(host, f"{name}-files").ask("w", 0, "log") == b""
        assert pairs(host, f"{name}-pairs").set(b"a", b"one") is None
    for name in ("gone", "kept"):
        for kind in ("files", "pairs"):
            host.ask(host_api.Stop, instance=f"{name}-{kind}")
    keep(host, "kept-files", "kept-pairs")
    assert {path.name for path in (host.state / "data").iterdir()} >= {"kept-files", "runs-files"}
    assert not (host.state / "data" / "gone-files").exists()
    assert not (host.state / "keyvalue" / "gone-pairs").exists()
    assert {path.name for path in (host.state / "keyvalue").iterdir()} >= {"kept-pairs", "runs-pairs"}
    assert files(host, "kept-files", 2).ask("r", 0, "log") != "no-entry"
    assert files(host, "gone-files", 2).ask("r", 0, "log") == "no-entry"
    assert pairs(host, "kept-pairs", 2).get(b"a") == b"one"
    assert pairs(host, "runs-pairs", 2).get(b"a") == b"one"
    again = pairs(host, "gone-pairs", 2)
    assert again.get(b"a") is None
    assert again.set(b"a", b"anew") is None
    assert again.get(b"a") == b"anew"


def test_a_commit_removes_the_pairs_of_other_schemas_and_a_rollback_before_it_finds_them(host):
    home = host.state / "keyvalue" / "schemas"
    assert pairs(host, "schemas", 1, schema=1).set(b"a", b"one") is None
    assert pairs(host, "schemas", 2, schema=2).set(b"a", b"two") is None
    host.ask(host_api.Revert, instance="schemas", generation=2)
    assert (home / "1.db").exists()
    later = pairs(host, "schemas", 3, schema=3)
    assert later.get(b"a") == b"one"
    assert host.ask(host_api.Commit, instance="schemas", generation=3)
    assert sorted({path.name.partition(".")[0] for path in home.iterdir()}) == ["3"]
    assert later.get(b"a") == b"one"
