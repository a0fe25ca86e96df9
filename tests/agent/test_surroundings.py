"""Commands in surroundings that are not those of a login shell: a closed pipe, no home directory, PID 1."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.host.ipc import host_api
from tests.agent.read_only_places import unshare
from tests.agent.running_device import ROOT, RunningDevice
from tests.eventually import eventually

FIRST = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000000 | 0x00020000) == 0, os.strerror(ctypes.get_errno())
pid = os.fork()
if pid == 0:
    libc.mount(b"none", b"/", None, 16384 | 1 << 18, None)
    assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
    os.execv(sys.argv[1], sys.argv[1:])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""
AS_FIRST = (sys.executable, "-c", FIRST)
"""Prefix of a command that runs as the first process of a namespace of its own."""


def states(pid):
    """State of each process below one, by pid, with its command line."""
    found, todo = {}, [pid]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                stat = Path(f"/proc/{child}/stat").read_text()
                found[child] = stat.rpartition(")")[2].split()[0], Path(f"/proc/{child}/cmdline").read_bytes()
                todo.append(child)
    return found


@pytest.mark.root
def test_a_host_that_is_the_first_process_of_a_container_leaves_no_zombie(tmp_path):
    with RunningDevice(tmp_path, "web") as device:
        host = device.start_host(prefix=AS_FIRST)
        assert device.agent("restore").returncode == 0
        # workers have the command line of their zygote, and no children
        (zygote,) = [pid for pid, (_, line) in states(host.pid).items() if b"worker.zygote" in line and states(pid)]
        workers = set(states(zygote))
        os.kill(zygote, signal.SIGKILL)  # its workers end with it, and their first process inherits them
        eventually(lambda: not workers & states(host.pid).keys(), "the orphans are gone")
        assert "Z" not in {state for state, _ in states(host.pid).values()}
        device.comes_to_answer()
        host.terminate()
        assert host.wait(60) == 0, "a stop reaches it"


@pytest.mark.root
@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_an_agent_that_is_the_first_process_ends_as_its_work_does(tmp_path, end):
    with RunningDevice(tmp_path, "web") as device:
        if end == "failed":
            (device.state / "identity" / "device.key").write_bytes(b"")
            agent = device.start_agent(prefix=AS_FIRST, ready=False)
            assert agent.wait(60) == 1
            assert "device.key is damaged" in device.said("agent")
            return
        agent = device.start_agent(prefix=AS_FIRST)
        agent.terminate()
        assert agent.wait(60) == 0


def test_a_hangup_of_the_whole_group_touches_no_instance(tmp_path):
    """As when the terminal closes in which somebody started the host, or with `systemctl kill --signal=HUP`."""
    with RunningDevice(tmp_path, "web") as device:
        host = device.start_host(prefix=["setsid"])
        assert device.agent("restore").returncode == 0
        device.comes_to_answer()
        before = device.ask_host(host_api.Status).instances[0]
        os.killpg(host.pid, signal.SIGHUP)
        eventually(lambda: "the ingress was read again" in device.said("host"), "the host has read its file again")
        after = device.ask_host(host_api.Status).instances[0]
        assert (after.since, after.restarts) == (before.since, before.restarts)
        assert "router ended" not in device.said("host")
        assert device.answers() == 200
        after = device.ask_host(host_api.Status).instances[0]
        assert (after.since, after.restarts) == (before.since, before.restarts)


COMMANDS = (
    ("agent.cli", "status"),
    ("agent.cli", "why"),
    ("agent.cli", "why", "--json"),
    ("agent.cli", "check"),
    ("agent.cli", "--help"),
    ("agent.host.cli", "check"),
    ("agent.host.cli", "--help"),
    ("fleet.cli.main", "--help"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_output_is_closed_ends_without_a_word(tmp_path, command):
    module, *words = command
    with RunningDevice(tmp_path, "web") as device:
        if module == "agent.cli" and words != ["--help"]:
            words += device._options()
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())", *words],
            cwd=ROOT,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in {0, 1, 128 + signal.SIGPIPE}


@pytest.mark.parametrize("module", ["agent.cli", "agent.host.cli"])
def test_a_command_without_any_output_works(module):
    """As a supervisor starts it that closes descriptors: `fleet-agent check >&-`."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("command", [each for each in COMMANDS if "--help" not in each], ids=" ".join)
def test_a_command_whose_output_cannot_be_written_says_so(tmp_path, command):
    """As where the output goes to a file on a full disk."""
    module, *words = command
    with RunningDevice(tmp_path, "web") as device, Path("/dev/full").open("w") as full:
        if module == "agent.cli" and words != ["--help"]:
            words += device._options()
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())", *words],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "No space left on device" in done.stderr
    assert done.returncode == 1


def test_a_token_is_not_read_from_an_input_that_is_closed(tmp_path):
    done = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$@" <&-',
            "sh",
            sys.executable,
            "-m",
            "agent.cli",
            "enroll",
            "--state",
            str(tmp_path / "s"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "standard input is closed" in done.stderr


HOMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")


@pytest.mark.skipif(not unshare(), reason="no namespaces for this user")
@pytest.mark.parametrize(
    "command",
    [
        ("agent.cli", "status", "--state", "/nonexistent"),
        ("agent.cli", "check", "--state", "/nonexistent"),
        ("agent.host.cli", "check"),
        ("fleet.cli.main", "status"),
        ("fleet.cli.main", "devices"),
        ("fleet.cli.main", "--help"),
        ("fleet.cli.main", "--home", "~/fleet", "status"),
        ("fleet.cli.main", "--home", "~nobody-here/fleet", "status"),
    ],
    ids=" ".join,
)
def test_a_user_without_a_home_directory_gets_sentences(command):
    """As in a container with a user of which it knows only the number."""
    module, *words = command
    done = subprocess.run(
        [*HOMELESS, sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())", *words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "bug in wasmfleet" not in done.stderr
    assert done.stdout or done.stderr.count("\n") <= 2
