"""Data packages in real workers: mounted read-only for those that read them, and for nobody else."""

import contextlib
import os

import pytest
import support

from agent.host.ipc import host_api
from fleet.protocol.codes import RejectCode

FILES = support.Grants(interfaces=("wasi:filesystem", "wasi:io"))
# Numbers of errors in wasi:filesystem/types
ACCESS, BUSY, IO, NOT_PERMITTED, READ_ONLY = 400, 404, 413, 431, 433  # the engine makes IO of the kernel's EROFS


@pytest.fixture
def package(tmp_path):
    """Make a file as the agent keeps it."""
    tmp_path.chmod(0o755)

    def make(name="m", data=b"weights of version 1"):
        file = tmp_path / name
        file.write_bytes(data)
        file.chmod(0o666)  # whatever its mode, the mount is read-only
        return file

    return make


def mounted(**paths):
    return tuple(host_api.DataMount(path=path, file=str(file)) for path, file in paths.values())


def started(host, *packages, grants=None, name="reader", generation=1):
    port = support.free_port()
    run = support.a_run(name, generation, port=port, grants=grants, packages=packages)
    return port, host.start("reads", run)


def ask(port, method, where):
    body = where.encode()
    request = b"%s / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (method.encode(), len(body)) + body
    status, _, answer = support.http(port, request)
    return status, answer


def test_a_guest_reads_its_package_at_its_path_and_can_change_nothing_of_it(host, package):
    file = package()
    port, reply = started(host, host_api.DataMount(path="/models/m", file=str(file)))
    assert isinstance(reply, host_api.Started), reply
    assert ask(port, "GET", "0m") == (200, b"weights of version 1")
    for method, where in (("PUT", "0m"), ("PUT", "0other"), ("DELETE", "0m")):
        assert ask(port, method, where)[0] in {ACCESS, NOT_PERMITTED, READ_ONLY}, (method, where)
    assert ask(port, "GET", "0../../etc/passwd")[0] == NOT_PERMITTED
    assert ask(port, "GET", "1m")[0] == 499, "no directory besides"
    assert file.read_bytes() == b"weights of version 1"


def test_a_package_stands_beside_the_files_that_are_the_instances_own(host, package):
    file = package()
    port, reply = started(host, host_api.DataMount(path="/data/m", file=str(file)), grants=FILES)
    assert isinstance(reply, host_api.Started), reply
    assert ask(port, "GET", "0m") == (200, b"weights of version 1")
    assert ask(port, "PUT", "0notes")[0] == 200
    assert ask(port, "PUT", "0m")[0] in {IO, READ_ONLY}
    assert ask(port, "DELETE", "0m")[0] in {BUSY, READ_ONLY, NOT_PERMITTED}
    assert file.read_bytes() == b"weights of version 1"
    # The next version of the data takes its place.
    newer = package("m-2", b"weights of version 2")
    port, reply = started(host, host_api.DataMount(path="/data/m", file=str(newer)), grants=FILES, generation=2)
    assert isinstance(reply, host_api.Started), reply
    assert ask(port, "GET", "0m") == (200, b"weights of version 2")


def test_several_packages_share_a_directory_or_have_their_own(host, package):
    mounts = [
        host_api.DataMount(path=path, file=str(package(name, name.encode())))
        for path, name in (("/maps/eu", "one"), ("/maps/us", "two"), ("/data/m", "three"), ("/top", "four"))
    ]
    port, reply = started(host, *mounts)
    assert isinstance(reply, host_api.Started), reply
    found = {ask(port, "GET", f"{number}{name}")[1] for number in range(3) for name in ("eu", "us", "m", "top")}
    assert found >= {b"one", b"two", b"three", b"four"}


def test_an_instance_without_the_package_does_not_see_it(host, package):
    file = package()
    started(host, host_api.DataMount(path="/models/m", file=str(file)))
    port, reply = started(host, name="other")
    assert isinstance(reply, host_api.Started), reply
    assert ask(port, "GET", "0m")[0] == 499


@pytest.mark.parametrize("kind", ["gone", "link", "directory", "fifo"])
def test_what_is_no_file_of_the_agents_is_refused_in_words_and_mounted_nowhere(kind, host, package, tmp_path):
    file = tmp_path / "m"
    match kind:
        case "link":
            file.symlink_to("/etc/passwd")
        case "directory":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
    _, reply = started(host, host_api.DataMount(path="/models/m", file=str(file)))
    assert isinstance(reply, host_api.Failed)
    assert reply.code is RejectCode.CONTAINMENT
    assert "data package for" in reply.message


def test_a_file_of_somebody_else_is_not_mounted_although_the_agent_names_it(host):
    """An agent that was taken over has no more than its own files mounted, whatever the host itself may read."""
    if os.geteuid() in {0, 65534}:
        pytest.skip("root may have anything mounted, and nobody looks like every user of outside a user namespace")
    _, reply = started(host, host_api.DataMount(path="/models/m", file="/etc/passwd"))
    assert isinstance(reply, host_api.Failed)
    assert "no file of whoever asks" in reply.message


def test_a_directory_of_the_guests_own_at_the_path_is_refused_in_words(host, package):
    own = host.state / "data" / "reader" / "0" / "folder"
    own.mkdir(parents=True)
    try:
        _, reply = started(host, host_api.DataMount(path="/data/folder", file=str(package())), grants=FILES)
        assert isinstance(reply, host_api.Failed)
        assert "has no place at /data/folder" in reply.message
    finally:
        with contextlib.suppress(OSError):
            own.rmdir()


def test_an_instance_that_reads_data_shares_no_worker(host, package):
    mount = host_api.DataMount(path="/models/m", file=str(package()))
    run = support.a_run("reader", 1, share_worker=True, packages=(mount,))
    assert isinstance(host.start("reads", run), host_api.Started)
    assert not host.health("reader").shared_worker
