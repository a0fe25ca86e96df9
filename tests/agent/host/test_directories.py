"""Read-only directories of the device, in real workers and their sandbox: granted, shared, denied, and attacked."""

import tempfile
from pathlib import Path

import pytest

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants
from tests.agent.host import files_guest, support
from tests.agent.host.files_guest import Files

MAPS = Grants(directories={"/maps": "maps"})


@pytest.fixture
def maps():
    """A directory of the device that every user may read, as its owner made it."""
    with tempfile.TemporaryDirectory(prefix="wasmfleet-maps-") as name:
        made = Path(name) / "maps"
        (made / "deep").mkdir(parents=True)
        (made / "site.json").write_text("a map")
        (made / "deep" / "est.json").write_text("another")
        (made / "private").write_text("of root alone")
        (made / "private").chmod(0o600)
        (Path(name) / "secret").write_text("beside the maps")
        for link, to in {"out": "../secret", "far": "/etc/passwd", "up": "..", "in": "deep/est.json"}.items():
            (made / link).symlink_to(to)
        for path in (Path(name), made, made / "deep"):
            path.chmod(0o755)
        yield made


@pytest.fixture
def run(host):
    """Start the guest under a name; where it answers."""

    def start(name, directories, *, grants=MAPS, **rest):
        port = support.free_port()
        run = support.a_run(name, rest.pop("generation", 1), port=port, grants=grants, directories=directories, **rest)
        reply = host.start(files_guest.guest(), run)
        assert isinstance(reply, host_api.Started), reply
        return Files(port)

    return start


def test_two_components_read_one_directory_each_at_a_place_of_its_own(maps, run):
    here = run("reads", {"/maps": str(maps)})
    there = run("too", {"/srv/geo": str(maps)}, grants=Grants(directories={"/srv/geo": "maps"}))
    assert here.places() == ["/maps"]
    assert there.places() == ["/srv/geo"]
    for files in (here, there):
        assert files.ask("r", 0, "site.json") == b"a map"
        assert files.ask("r", 0, "deep/est.json") == b"another"
        assert files.ask("r", 0, "in") == b"another", "a link within the directory leads where it says"
    (maps / "site.json").write_text("a newer map")
    assert here.ask("r", 0, "site.json") == there.ask("r", 0, "site.json") == b"a newer map"


def test_beside_a_components_own_data_which_it_still_writes(maps, run):
    both = Grants(interfaces=("wasi:filesystem",), directories={"/maps": "maps", "/more": "more"})
    files = run("both", {"/maps": str(maps), "/more": str(maps / "deep")}, grants=both)
    assert files.places() == ["/data", "/maps", "/more"]
    assert files.ask("w", 0, "log") == b""
    assert files.ask("r", 1, "site.json") == b"a map"
    assert files.ask("r", 2, "est.json") == b"another"


@pytest.mark.parametrize("op", ["w", "u", "m", "l", "a"])
def test_nothing_in_it_can_be_written_removed_or_made(maps, run, op):
    files = run("writes", {"/maps": str(maps)})
    path = "site.json" if op in "ua" else "new"
    before = sorted(maps.iterdir())
    assert files.ask(op, 0, path) in {"not-permitted", "read-only"}
    assert sorted(maps.iterdir()) == before
    assert (maps / "site.json").read_text() == "a map"


@pytest.mark.parametrize("path", ["out", "far", "up/secret", "../secret", "/etc/passwd", "deep/../../secret"])
def test_no_link_and_no_path_leads_out_of_it(maps, run, path):
    assert run("leaves", {"/maps": str(maps)}).ask("r", 0, path) in {"not-permitted", "no-entry"}


def test_without_a_grant_there_is_none(run):
    assert run("none", {}, grants=Grants()).places() == []


def test_a_new_version_reads_on_and_one_without_the_grant_does_not(maps, run):
    assert run("swaps", {"/maps": str(maps)}).ask("r", 0, "site.json") == b"a map"
    assert run("swaps", {"/maps": str(maps)}, generation=2).ask("r", 0, "site.json") == b"a map"
    assert run("swaps", {}, grants=Grants(), generation=3).places() == []


@pytest.mark.parametrize("gone", ["missing", "site.json"])
def test_a_directory_that_is_not_there_is_named_and_tried_again_once_it_is(host, maps, run, gone):
    reply = host.start(
        files_guest.guest(), support.a_run("late", 1, grants=MAPS, directories={"/maps": str(maps / gone)})
    )
    assert isinstance(reply, host_api.Failed)
    assert reply.code == "internal", "not the component's fault"
    assert "its directory maps ([policy.directories] of the device) cannot be read" in reply.message
    assert str(maps) not in reply.message
    assert run("late", {"/maps": str(maps)}).ask("r", 0, "site.json") == b"a map"


@pytest.mark.root
def test_a_component_reads_no_more_than_any_user_of_the_device(host, maps, run):
    files = run("user", {"/maps": str(maps)})
    assert files.ask("r", 0, "private") == "access"
    maps.parent.chmod(0o700)
    reply = host.start(files_guest.guest(), support.a_run("user", 2, grants=MAPS, directories={"/maps": str(maps)}))
    assert isinstance(reply, host_api.Failed)
    assert "cannot be read: Permission denied" in reply.message
