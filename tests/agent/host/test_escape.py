"""Native code in a worker, as after an escape from WebAssembly, against the kernel, for each way of running a host."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import support
from gpio_chips import Chips
from host_processes import lanes_of

from agent.host.ipc import host_api
from agent.host.sandbox import sandbox
from fleet.protocol.codes import RejectCode
from fleet.protocol.hardware import GpioLine, Hardware, SerialPort

NOBODY = 65534
SECRET = "the-secret-that-only-the-sibling-may-know"
WITHOUT_NAMESPACES = """
import errno, os, sys, pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "unshare")
rules.load()
os.execv(sys.argv[1], sys.argv[1:])
"""

ROOT, USER, USER_WITHOUT = sandbox.WAYS
# What each way of running a host has, of the layers around a worker.
COLUMNS = {
    ROOT: {"limits", "user", "network", "mount", "privileges", "landlock", "seccomp"},
    USER: {"limits", "user", "network", "mount", "privileges", "landlock", "seccomp"},
    USER_WITHOUT: {"limits", "privileges", "landlock", "seccomp"},
}
# Where the kernel itself lacks a layer, as on a device without Landlock, the others have to hold.
LACKS = set(os.environ.get("WASMFLEET_TEST_LACKS", "").split())


def as_nobody():
    """How to start Python as an ordinary user: (prefix, interpreter)."""
    if os.geteuid() != 0:
        return [], sys.executable
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all"]
    for python in (sys.executable, "/usr/bin/python3"):
        env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
        code = "import subprocess, sys, wasmtime, msgspec, pyseccomp; subprocess.check_call([sys.executable, '-V'])"
        if subprocess.run([*prefix, python, "-c", code], env=env, check=False, capture_output=True).returncode == 0:
            return prefix, python
    pytest.skip("no Python here that an ordinary user may run")
    raise AssertionError


@pytest.fixture(params=[pytest.param(ROOT, marks=pytest.mark.root), USER, USER_WITHOUT])
def escaped(request):
    """A host run one of the three ways, in whose workers every guest is an escaped one."""
    directory = Path(tempfile.mkdtemp(prefix="wasmfleet-escape-"))
    prefix, python = ([], sys.executable) if request.param == ROOT else as_nobody()
    if request.param == USER_WITHOUT:
        prefix = [*prefix, python, "-c", WITHOUT_NAMESPACES]
    if prefix and os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    path = os.pathsep.join([str(Path(__file__).parent / "escape"), str(support.ROOT), sysconfig.get_path("purelib")])
    chips = Chips(directory / "chips", gpiochip0=2)
    for each in (chips.directory, *chips.directory.rglob("*")):
        each.chmod(0o777)  # as their own user's, for a host that is not this one's
    env = {"PYTHONPATH": path, "SOME_TOKEN": SECRET, "WASMFLEET_TEST_CHIPS": str(chips.directory)}
    host = support.Host(directory, prefix=prefix, python=python, env=env)
    host.column = request.param
    host.directory = directory
    yield host
    host.close()
    print((directory / "host.log").read_text())  # shown where the test fails
    shutil.rmtree(directory)


def test_an_escaped_guest_is_refused_everything_by_the_kernel(escaped):
    host = escaped
    key = host.directory / "device.key"
    key.write_text("secret")
    data = host.directory / "data-of-another"
    data.mkdir()
    key.chmod(0o644)  # even what its user may read
    welcome = host.ask(host_api.Hello)
    held = {layer for layer, holds in welcome.containment.items() if holds}
    assert held - {"cgroup"} == COLUMNS[host.column] - LACKS
    assert welcome.runs_as == host.column

    # A sibling with a secret is started first, so that what is inherited by a fork would be inherited here.
    patient = support.Limits(start_ms=60_000)  # an emulated board forks and loads at a tenth of a device's speed
    host.start("hello", support.a_run("sibling", 1, limits=patient, config={"token": SECRET}))
    (sibling,) = lanes_of(host)
    # It may send requests: that gives it a socket to ask on, and no network.
    grants = support.Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("http://127.0.0.1:8080",))
    assert isinstance(host.start("hello", support.a_run("bad", 1, limits=patient, grants=grants)), host_api.Started)
    (lane,) = set(lanes_of(host)) - {sibling}
    facts = {
        "host": host.process.pid,
        "sibling": sibling,
        "key": str(key),
        "other": str(data),
        "sock": str(host.runtime / "host.sock"),
    }
    body = json.dumps(facts).encode()
    request = b"POST /bad/ HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    status, _, answer = support.http(host.port, request)
    assert status == 200, answer
    said = json.loads(answer)

    assert {what: result for what, result in said["tried"].items() if result not in {"EPERM", "EACCES", "ENOSYS"}} == {}
    assert len(said["tried"]) > 20
    # Its descriptors: the standard three, of which two are its channel, what wasmtime maps, its epoll; sockets:
    # supervisor, egress.
    kinds = list(said["descriptors"].values())
    assert kinds.count("socket") <= 4 + (said["descriptors"].get("2") == "socket")
    assert [said["descriptors"][fd] for fd in "01"] == ["socket"] * 2
    assert len(kinds) <= 11, said["descriptors"]
    assert said["pages"] == 1, "its own page of figures, and not that in which the router records its calls"
    assert SECRET not in str(said["environment"])
    if host.column == ROOT:
        assert said["uid"] not in {0, Path(f"/proc/{sibling}").stat().st_uid}
        assert not support.remembers(lane, SECRET.encode())
        assert support.remembers(sibling, SECRET.encode()), "this way of looking would have found it"
    assert host.health("sibling").restarts == 0


def test_sockets_of_an_escaped_guest_lead_where_its_grants_say_and_nowhere_else(escaped):
    host = escaped
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as granted,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
        socket.create_server(("127.0.0.1", 0)) as same_port,
    ):
        granted.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", same_port.getsockname()[1]))
        tcp, udp = server.getsockname()[1], granted.getsockname()[1]
        outbound = (f"tcp://127.0.0.1:{tcp}", f"udp://127.0.0.1:{udp}", "tcp://granted.example:*")
        limits = support.Limits(start_ms=60_000)
        run = support.a_run("bad", 1, limits=limits, grants=support.Grants(outbound=outbound))
        assert isinstance(host.start("hello", run), host_api.Started)
        body = json.dumps({"granted": ["127.0.0.1", tcp, udp], "other": other.getsockname()}).encode()
        head = b"POST /bad/sockets HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        status, _, answer = support.http(host.port, head + body)
        assert status == 200, answer
        said = json.loads(answer)
        other.setblocking(False)
        same_port.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(100)
        with pytest.raises(BlockingIOError):
            same_port.accept()
    assert said["families"] == ["AF_INET", "AF_UNIX"]
    refused = {"EPERM", "EACCES", "HTTP-request-denied", "destination-IP-prohibited", "TypeError", "EISCONN", "EINVAL"}
    assert {what: result for what, result in said["tried"].items() if result not in refused} == {}
    assert len(said["tried"]) > 10


def test_an_escaped_guest_reads_the_directory_it_was_granted_and_nothing_more(escaped):
    host = escaped
    maps, books = host.directory / "maps", host.directory / "books"
    for made in (maps, books):
        made.mkdir()
        (made / "site.json").write_text(f"a file of {made.name}")
    (host.directory / "secret").write_text("beside the maps")
    (maps / "out").symlink_to("../secret")
    for path in (host.directory, maps, books):
        path.chmod(0o755)
    limits = support.Limits(start_ms=60_000)
    for name, directory in (("bad", maps), ("good", books)):
        run = support.a_run(
            name,
            1,
            limits=limits,
            grants=support.Grants(directories={"/here": directory.name}),
            directories={"/here": str(directory)},
        )
        assert isinstance(host.start("hello", run), host_api.Started)
    body = json.dumps({"secret": str(host.directory / "secret"), "other": str(books / "site.json")}).encode()
    head = b"POST /bad/directories HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    status, _, answer = support.http(host.port, head + body)
    assert status == 200, answer
    said = json.loads(answer)
    assert said["read"] == "a file of maps"
    refused = {"EPERM", "EACCES", "EROFS", "ENOENT", "EXDEV"}
    assert {what: result for what, result in said["tried"].items() if result not in refused} == {}
    assert len(said["tried"]) > 10
    assert sorted(path.name for path in maps.iterdir()) == ["out", "site.json"]
    assert (maps / "site.json").read_text() == "a file of maps"


def test_whatever_an_escaped_guest_writes_as_its_own_figures_harms_nobody(escaped):
    host = escaped
    limits = support.Limits(start_ms=60_000)
    for name in ("bad", "good"):
        run = support.a_run(name, 1, limits=limits, grants=support.Grants(interfaces=("wasmfleet:metrics",)))
        assert isinstance(host.start("measures", run), host_api.Started)
    status, _, answer = support.http(host.port, "GET /bad/metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 200, answer
    assert json.loads(answer) == {"truncate": "EPERM"}
    assert host.health("bad").metrics == host.health("good").metrics == ()
    assert host.health("good").restarts == 0


def test_hardware_of_an_escaped_guest_is_what_its_grants_say_and_nothing_else(escaped):
    host = escaped
    terminal, port = os.openpty()
    node = os.ttyname(port)
    if os.geteuid() == 0:
        os.chmod(node, 0o666)  # noqa: PTH101 - for a host of another user
    granted = Hardware(
        gpio=(GpioLine(name="door", chip="gpiochip0", line=1),), serial=(SerialPort(name="meter", baud=9600),)
    )
    grants = support.Grants(interfaces=("wasi:gpio", "wasmfleet:serial"), hardware=granted)
    limits = support.Limits(start_ms=60_000)
    run = support.a_run("bad", 1, limits=limits, grants=grants, serial={"meter": node})
    reply = host.start("hello", run)
    assert isinstance(reply, host_api.Started), reply
    status, _, answer = support.http(host.port, "POST /bad/hardware HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    os.close(terminal)
    os.close(port)
    assert status == 200, answer
    said = json.loads(answer)
    refused = {"EPERM", "EACCES", "ENOENT"} if host.column != USER_WITHOUT else {"EPERM", "EACCES"}
    assert {what: result for what, result in said["tried"].items() if result not in refused} == {}
    assert len(said["tried"]) > 12
    # The kernel has no file in place of a line here, and says so where seccomp lets a call through.
    assert said["allowed"] == {"read the line": "ENOTTY", "set the line": "ENOTTY", "drop input": "done"}
    assert [said["descriptors"][fd] for fd in said["descriptors"] if int(fd) > 2].count("device") == 1, "its own port"


def test_an_escaped_guest_reads_its_own_data_package_and_can_do_nothing_else_with_it(escaped):
    host = escaped
    files = {name: host.directory / f"{name}.data" for name in ("own", "another")}
    for name, file in files.items():
        file.write_text(f"data of {name}")
        file.chmod(0o666)  # whatever its mode, the mount is read-only
        if os.geteuid() == 0:
            os.chown(file, NOBODY, NOBODY)
    limits = support.Limits(start_ms=60_000)
    replies = [
        host.start(
            "hello",
            support.a_run(
                name, 1, limits=limits, packages=(host_api.DataMount(path="/models/m", file=str(files[of])),)
            ),
        )
        for name, of in (("bad", "own"), ("sibling", "another"))
    ]
    if host.column == USER_WITHOUT:  # without the mount layer nothing is mounted, and the start is refused in words
        assert [reply.code for reply in replies] == [RejectCode.CONTAINMENT] * 2
        assert "data packages need the mount layer" in replies[0].message
        return
    assert all(isinstance(reply, host_api.Started) for reply in replies), replies
    facts = {"inside": "/package-0/m", "outside": str(files["own"]), "another": str(files["another"])}
    body = json.dumps(facts).encode()
    request = b"POST /bad/data HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    status, _, answer = support.http(host.port, request)
    assert status == 200, answer
    said = json.loads(answer)
    assert said["text"] == "data of own"
    refused = {"EPERM", "EACCES", "EROFS", "ENOENT", "EBADF", "EBUSY", "PermissionError"}
    assert {what: result for what, result in said["tried"].items() if result not in refused} == {}
    assert [file.read_text() for file in files.values()] == ["data of own", "data of another"]


def test_no_call_runs_on_for_what_an_escaped_guest_writes_in_its_page_of_figures(escaped):
    """Over the channel, its limits hold from outside: the router records the call where the worker cannot write."""
    host = escaped
    limits = support.Limits(start_ms=60_000, call_ms=300)
    host.start("hello", support.a_run("bad", 1, limits=limits))
    status, _, answer = support.http(host.port, "GET /bad/hang HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 502, answer
    ended = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert "of its own time, 300 are allowed" in ended.message


def test_who_escapes_in_a_shared_worker_has_its_mates_and_nothing_beyond(escaped):
    """One process is one address space: between mates there is no wall, and all others are as they were."""
    host = escaped
    host.start("hello", support.a_run("sibling", 1, config={"token": SECRET}))
    (sibling,) = lanes_of(host)
    for name, namespace in (("stranger", "others"), ("mate", "main"), ("bad", "main")):
        config = {"token": f"what {name} knows"}
        run = support.a_run(name, 1, config=config, namespace=namespace, share_worker=True)
        assert isinstance(host.start("hello", run), host_api.Started)
    assert (
        host.health("mate").shared_worker == host.health("bad").shared_worker != host.health("stranger").shared_worker
    )
    key = host.directory / "device.key"
    key.write_text("secret")
    facts = {"host": host.process.pid, "sibling": sibling, "key": str(key), "other": str(host.state)}
    body = json.dumps({**facts, "sock": str(host.runtime / "host.sock")}).encode()
    request = b"POST /bad/ HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    status, _, answer = support.http(host.port, request)
    assert status == 200, answer
    said = json.loads(answer)
    # This is lost, and the table says so: `fleet-host check`, and docs/host.md.
    assert sorted(said["known"]) == ["what bad knows", "what mate knows"]
    # Nothing else is.
    assert {what: result for what, result in said["tried"].items() if result not in {"EPERM", "EACCES", "ENOSYS"}} == {}
    assert "device" not in {kind for fd, kind in said["descriptors"].items() if int(fd) > 2}
    if host.column == ROOT:
        assert said["uid"] not in {0, *(Path(f"/proc/{pid}").stat().st_uid for pid in (sibling, host.process.pid))}


def test_a_missing_layer_that_is_required_refuses_components(tmp_path):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    host = support.Host(tmp_path, arguments=["--require", "seccomp"], env={"PYTHONPATH": str(shadow)})
    try:
        assert host.ask(host_api.Hello).containment["seccomp"] is False
        reply = host.start("hello", support.a_run("web", 1))
        assert (type(reply), reply.code) == (host_api.Failed, "containment")
        assert "seccomp" in reply.message
    finally:
        host.close()


def test_without_a_requirement_a_device_without_libseccomp_still_runs(tmp_path):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    host = support.Host(tmp_path, env={"PYTHONPATH": str(shadow)})
    try:
        assert isinstance(host.start("hello", support.a_run("web", 1)), host_api.Started)
        assert support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    finally:
        host.close()


def test_a_host_does_not_start_below_its_minimum(tmp_path):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    command = [sys.executable, "-m", "agent.host.cli", "run", "--runtime", str(tmp_path / "run")]
    command += ["--state", str(tmp_path / "state"), "--ingress", "none", "--minimum", "limits,privileges,seccomp"]
    env = {**os.environ, "PYTHONPATH": str(shadow)}
    done = subprocess.run(command, cwd=support.ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "isolation layers missing around components" in done.stderr
    assert not (tmp_path / "run" / "host.sock").exists()
    # The agent finds it said there, for the operator who does not read this device's journal.
    assert done.stderr == f"fleet-host: {host_api.why_not(tmp_path / 'run')}\n"
    # With what it asks for there, it starts.
    host = support.Host(tmp_path, arguments=["--minimum", "limits,privileges,seccomp"])
    try:
        assert host_api.why_not(tmp_path / "run") == ""
        assert isinstance(host.start("hello", support.a_run("web", 1)), host_api.Started)
    finally:
        host.close()


def test_check_prints_the_table_with_this_hosts_column_marked():
    done = subprocess.run(
        [sys.executable, "-m", "agent.host.cli", "check"], cwd=support.ROOT, capture_output=True, text=True, check=True
    )
    assert "engine       wasmtime" in done.stdout
    layers = sandbox.probe()
    here = sandbox.way(layers)
    for way in sandbox.WAYS:
        assert (f"[{way}]" in done.stdout) == (way == here)
    rows = {line.split()[0]: line.split()[1:4] for line in done.stdout.splitlines() if line.startswith("  ")}
    # What is printed is what an escaped guest meets, in each of the ways.
    for number, way in enumerate(sandbox.WAYS):
        if way != here:
            assert {layer for layer in layers if rows[layer][number] == "yes"} == COLUMNS[way] - LACKS
    assert {layer: rows[layer][sandbox.WAYS.index(here)] == "yes" for layer in layers} == layers
    assert "cgroup" in rows
    # What no layer is for is said too: `test_who_escapes_in_a_shared_worker...` below shows it.
    assert rows["shared"] == ["NO"] * 3
    assert "code that breaks out of one has the memory of the others" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 160
