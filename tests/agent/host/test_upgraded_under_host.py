"""Package upgraded under a running host: helpers that start afterwards are of the host's own version.

The host runs from a copy of the tree. Then another version takes the names of its files, as dpkg does it: messages
between supervisor, zygote and workers differ, and its engine is another.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import ssl
import sys
from pathlib import Path

import pytest

from fleet.demo.environment import free_ports
from tests.agent.host.host_processes import children, ended
from tests.agent.host.peers import certificate
from tests.agent.running_device import ROOT, RunningDevice
from tests.eventually import eventually

OF_HOST = ("agent", "fleet", "signing", "components/adapter")


@pytest.fixture
def tree(tmp_path):
    """Copy of the product and of its engine."""
    place = tmp_path / "tree"
    for part in OF_HOST:
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    engine = Path(importlib.util.find_spec("wasmtime").origin).parent
    shutil.copytree(engine, place / "wasmtime", copy_function=copy_or_link)
    return place


def copy_or_link(source, target):
    """Copy a module; its library of 40 MB is the same file under another name."""
    if Path(source).suffix == ".so":
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)


def upgrade(tree):
    """Give the names of the files to those of a version whose messages and engine are others."""
    for path in [*tree.glob("agent/**/*.py"), *tree.glob("wasmtime/**/*.py")]:
        text = path.read_text()
        if path.is_relative_to(tree / "wasmtime"):
            text = "raise ImportError('an engine of another version')\n"
        elif path.parent.name == "ipc":
            text = text.replace('tag="', 'tag="next-')
        elif path.name == "tls.py":
            text = "raise ImportError('TLS of another version')\n"
        after = path.with_suffix(".dpkg-new")
        after.write_text(text)
        after.replace(path)
    for cached in tree.rglob("__pycache__"):
        shutil.rmtree(cached)


@pytest.fixture
def device(tree, tmp_path):
    (tmp_path / "device").mkdir()
    with RunningDevice(tmp_path / "device", "web", python=(sys.executable, "-P")) as made:
        yield made


def direct(host):
    """The pids of the host's own children, with their command lines: zygotes, and forks such as the router."""
    everyone = children(host.pid)
    below = {pid for child in everyone for pid in children(child)}
    return {pid: line for pid, line in everyone.items() if pid not in below}


def zygotes(host):
    """The pids of the host's zygotes."""
    return {pid for pid, line in direct(host).items() if b"agent.host.worker.zygote" in line}


def kill(pid):
    """Kill a process, and wait until it has ended."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert ended([pidfd])
    os.close(pidfd)


def answers_encrypted(port, file):
    """First line of the answer to a request over TLS; none without an answer."""
    context = ssl.create_default_context(cafile=file)
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
        context.wrap_socket(sock, server_hostname="web.example") as wire,
    ):
        wire.sendall(b"GET /web/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return wire.makefile("rb").readline().rstrip()
    return None


def test_helpers_that_start_after_an_upgrade_are_of_the_hosts_version(device, tree, tmp_path):
    port, (file, _) = free_ports(1)[0], certificate(tmp_path, "web.example")
    ingress = tmp_path / "ingress.toml"
    ingress.write_text(
        f'[tls]\nlisten = "127.0.0.1:{port}"\n[[tls.certificates]]\ncertificate = "{file}"\nkey = "{file}"\n'
    )
    host = device.start_host("--ingress-config", str(ingress), env={"PYTHONPATH": str(tree)})
    assert device.agent("restore").stdout == "web: runs\n"
    assert device.answers() == 200
    session = device.ask_host().session

    upgrade(tree)
    (zygote,) = zygotes(host)
    kill(zygote)
    device.comes_to_answer()
    assert zygotes(host) != {zygote}
    for helper in direct(host).keys() - zygotes(host):
        kill(helper)
    device.comes_to_answer()
    eventually(lambda: answers_encrypted(port, file) == b"HTTP/1.1 200 OK", "web answers over TLS")
    # and so does what the agent starts from now on
    device.ask_host_to_stop("web")
    assert device.agent("restore").stdout == "web: runs\n"
    device.comes_to_answer()
    assert device.ask_host().session == session, device.said("host")
