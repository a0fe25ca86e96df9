"""Life of the host: processes end with it, workers that die are replaced, crash loops end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import support
from host_processes import children, ended, forks, lanes_of

from agent.host.ipc import host_api


def kill_lanes(host):
    """Kill every worker there is just now."""
    for lane in lanes_of(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(lane, signal.SIGKILL)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_host_that_ends_leaves_no_process(tmp_path, end):
    host = support.Host(tmp_path)
    longest = 25_000 if end == signal.SIGKILL else 1500
    host.start("spin", support.a_run("bad", 1, limits=support.Limits(call_ms=longest)))
    host.start("hello", support.a_run("web", 1))
    host.start("hello", support.a_run("other", 1, namespace="strangers"))
    # One worker is deep in a call when it happens.
    client = socket.create_connection(("127.0.0.1", host.port))
    client.sendall(b"GET /bad/ HTTP/1.1\r\nhost: x\r\n\r\n")
    all_of_them = children(host.process.pid)
    assert len(all_of_them) == 6, "a router, two zygotes, three lanes"
    pidfds = [os.pidfd_open(pid) for pid in all_of_them]
    host.process.send_signal(end)
    host.process.wait(30)
    assert ended(pidfds)
    client.close()
    host.close()


def test_a_host_has_a_zygote_before_the_first_component(tmp_path):
    host = support.Host(tmp_path)
    try:
        host.ask(host_api.Hello)  # it listens before it answers
        before = zygotes_of(host)
        assert len(before) == 1
        host.start("hello", support.a_run("web", 1))
        assert zygotes_of(host) == before
        host.start("hello", support.a_run("other", 1, namespace="strangers"))
        assert len(zygotes_of(host)) == 2
    finally:
        host.close()


def zygotes_of(host):
    """The pids of zygotes: of the host's children, and not of a zygote's, which has workers and a self-test."""
    found = (pid for pid, command in children(host.process.pid).items() if b"agent.host.worker.zygote" in command)
    return {pid for pid in found if parent(pid) == host.process.pid}


def parent(pid):
    """The pid of a process's parent; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def test_a_zygote_has_one_thread_after_all_it_does(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    host.start("trap-in-start", support.a_run("bad", 1))
    host.start("hello", support.a_run("web", 2, port=port))
    support.http(port)
    host.ask(host_api.Restart, instance="web")
    host.ask(host_api.Stop, instance="web")
    zygotes = [pid for pid, command in children(host.process.pid).items() if b"agent.host.worker.zygote" in command]
    threads = [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in zygotes]
    assert 1 in threads
    assert set(threads) <= {1, 2}, "a lane has its ticker beside it"
    top = [pid for pid in zygotes if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(host.process.pid)]
    assert [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in top] == [1] * len(top)


def test_a_worker_that_dies_is_replaced_and_the_client_that_waits_is_answered(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    (lane,) = lanes_of(host)
    os.kill(lane, signal.SIGKILL)
    # The listener is the supervisor's: a client that comes meanwhile waits in its queue.
    assert support.http(port)[0] == 200
    event = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert (event.code, "SIGKILL" in event.message) == ("restarted", True)
    health = host.health("web")
    assert (health.restarts, health.workers, health.state) == (1, 1, "running")


def test_a_loop_of_deaths_ends_in_quarantine_and_a_new_generation_ends_that(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1))
    host.start("hello", support.a_run("alone", 1, port=port))
    quarantined = None
    while quarantined is None or host.health("alone").state != "quarantined":
        kill_lanes(host)
        host.ask(host_api.Status)
        gone = [e for e in host.events if getattr(e, "state", "") == "quarantined"]
        quarantined = next((e for e in gone if e.instance == "web"), None)
    assert "crashes in a row" in quarantined.message
    assert host.health("web").state == "quarantined"
    status, _, body = support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 503, body
    with pytest.raises(ConnectionRefusedError):
        support.http(port)
    host.ask(host_api.Restart, instance="alone")
    assert support.http(port)[0] == 200
    assert isinstance(host.start("hello", support.a_run("web", 2)), host_api.Started)
    assert support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200


def test_the_router_is_replaced_too_and_the_log_says_how_many_connections_were_lost_with_it(tmp_path):
    host = support.Host(tmp_path)
    host.start("hello", support.a_run("web", 1))
    (router,) = forks(host)
    get = "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n"
    with contextlib.ExitStack() as open_connections:
        for _ in range(3):
            sock = open_connections.enter_context(socket.create_connection(("127.0.0.1", host.port), timeout=30))
            assert support.http(host.port, get, sock)[0] == 200
        os.kill(router, signal.SIGKILL)
        assert support.http(host.port, get)[0] == 200
    log = (tmp_path / "host.log").read_text().splitlines()
    assert "host: the router ended (-9; client connections lost with it: 3), starting another" in log
    host.close()


def test_a_second_host_in_the_same_place_and_a_taken_port_are_refused_in_one_line(host, tmp_path):
    def refused(runtime, port):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "agent.host.cli", "run", "--runtime", str(runtime)),
                *("--state", str(tmp_path / "s"), "--ingress", f"127.0.0.1:{port}"),
            ],
            cwd=support.ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "another host already runs here" in refused(host.runtime, support.free_port())
    assert host_api.why_not(host.runtime) == "", "one host does run here"
    assert f"127.0.0.1:{host.port}" in refused(tmp_path / "elsewhere", host.port)
    assert f"127.0.0.1:{host.port}" in host_api.why_not(tmp_path / "elsewhere")
    # the path of a socket has 108 bytes, by law
    assert "shorter --runtime" in refused(tmp_path / ("l" * 120), support.free_port())


def test_where_there_is_no_engine_the_host_says_so_and_refuses_components(tmp_path):
    # A wasmtime that cannot be imported, as on a device for which there is no library.
    shadow = tmp_path / "shadow" / "wasmtime"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise RuntimeError('unsupported architecture for wasmtime: riscv64')\n")
    host = support.Host(tmp_path, env={"PYTHONPATH": str(shadow.parent)})
    try:
        assert host.ask(host_api.Hello).engine == ""
        reply = host.start("hello", support.a_run("web", 1))
        assert (type(reply), reply.code) == (host_api.Failed, "no-engine")
    finally:
        host.close()


def test_a_crash_loop_is_remembered_over_a_restart_of_the_host(tmp_path):
    host = support.Host(tmp_path)
    host.start("hello", support.a_run("web", 1))
    for _ in range(2):
        kill_lanes(host)
        host.event(lambda event: isinstance(event, host_api.Trapped) and event.code == "restarted")
        host.event(lambda event: getattr(event, "state", "") == "running")
    host.close()
    again = support.Host(tmp_path)
    try:
        again.start("hello", support.a_run("web", 1))
        quarantined = None
        deaths = 0
        while quarantined is None:
            kill_lanes(again)
            again.ask(host_api.Status)
            deaths = sum(isinstance(e, host_api.Trapped) for e in again.events)
            quarantined = next((e for e in again.events if getattr(e, "state", "") == "quarantined"), None)
        assert "5 crashes in a row" in quarantined.message
        assert deaths <= 3, "two of the five were before the restart"
    finally:
        again.close()


def test_what_was_asked_by_a_stranger_is_not_heard(host):
    # The socket is for the host's own user (and root): nobody else can even connect.
    mode = (host.runtime / "host.sock").stat().st_mode & 0o777
    assert mode == 0o600
    assert host.runtime.stat().st_mode & 0o077 == 0


@pytest.mark.root
def test_the_agents_group_may_command_where_it_is_named(tmp_path):
    tmp = Path(tempfile.mkdtemp(prefix="wasmfleet-group-"))
    tmp.chmod(0o711)
    group, other = 61234, 61235
    host = support.Host(tmp, arguments=["--agent-group", str(group)])
    os.chown(host.runtime, -1, group)
    host.runtime.chmod(0o750)
    code = (
        "import sys; from agent.host.ipc import host_api as ipc; s = ipc.new_socket(); s.connect(sys.argv[1]);"
        "ipc.send(s, ipc.Hello(id=1)); print(ipc.receive_from_host(s).id)"
    )

    def hello(gid):
        return subprocess.run(
            ["/usr/bin/python3", "-c", code, str(host.runtime / "host.sock")],
            env={"PYTHONPATH": f"{support.ROOT}:{sysconfig.get_path('purelib')}"},
            user=61234,
            group=gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        assert hello(group).stdout == "1\n", hello(group).stderr
        assert hello(other).returncode != 0
    finally:
        host.close()
        shutil.rmtree(tmp)


def descriptors(pid):
    """How many a process has open; 0 where it may not be looked at (a zygote is not dumpable, and we are not root)."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except PermissionError:
        return 0


def test_a_start_that_waits_behind_a_stop_runs_and_can_be_stopped(host):
    host.start("hello", support.a_run("web", 1))
    host._id += 2
    stop, start = host._id - 1, host._id
    image = support.sealed(support.compiled("hello"))
    # In one go: the host reads the second while it is at the first.
    host_api.send(host.sock, host_api.Stop(id=stop, instance="web"))
    host_api.send(host.sock, host_api.Start(id=start, run=support.a_run("web", 2)), image)
    os.close(image)
    replies = [host_api.receive_from_host(host.sock) for _ in (stop, start)]
    assert [(type(reply), reply.id) for reply in replies] == [(host_api.Done, stop), (host_api.Started, start)]
    assert host.health("web").generation == 2
    assert support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    host.ask(host_api.Stop, instance="web")
    assert host.ask(host_api.Status).instances == ()


def test_a_first_start_that_fails_is_answered_with_the_log(host):
    grants = support.Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("https://example.org",))
    failed = host.start("trap-in-start", support.a_run("web", 1, share_worker=True, grants=grants))
    assert isinstance(failed, host_api.Failed)
    assert any("it has a worker of its own" in line for line in failed.log), failed.log
    assert host.lines_of("web") == ()


def test_nothing_is_left_behind_by_instances_that_came_and_went(host):
    def held():
        pids = [host.process.pid, *children(host.process.pid)]
        return len(pids), sum(descriptors(pid) for pid in pids)

    def come_and_go():
        for generation in range(1, 4):
            host.start("hello", support.a_run("web", generation))
            host.start("trap-in-start", support.a_run("bad", generation))
        support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")
        host.ask(host_api.Stop, instance="web")

    come_and_go()
    while lanes_of(host):
        host.ask(host_api.Status)
    before = held()
    for _ in range(5):
        come_and_go()
    while lanes_of(host):
        host.ask(host_api.Status)
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
