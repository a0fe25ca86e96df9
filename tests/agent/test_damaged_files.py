"""A device's state after a power cut: every file in turn is empty, full of zeros or cut off, and the agent is started.

Right is an agent that runs, and whose journal names what it cannot make anew; without its key, one line that names it.
"""

import os
import selectors
import shutil
import socket
import subprocess
import sys

import pytest

from tests.agent.enrolled_device import enrolled

DAMAGES = {
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
    "cut off": lambda data: data[: len(data) // 2],
}
ANEW = {"store.db", "identity/mac.key", "log/agent.log"}
NO_START = {"identity/device.key", "identity/enrolled.json"}


def start(directory):
    """Start the agent until it is ready or has ended; whether it was ready, and what it said."""
    address = str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(address)
        ready.settimeout(60)
        (directory / "agent.toml").touch()
        places = ("--state", directory / "state", "--runtime", directory / "run", "--config", directory / "agent.toml")
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "run", *map(str, places)],
            env=os.environ | {"NOTIFY_SOCKET": address},
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            pidfd = os.pidfd_open(process.pid)
            came_up = comes_up(ready, pidfd)
            os.close(pidfd)
            process.terminate()
            _, errors = process.communicate(timeout=60)
    (directory / "notify").unlink()
    return came_up, errors


def comes_up(ready, pidfd):
    with selectors.DefaultSelector() as selector:
        for each in (ready, pidfd):
            selector.register(each, selectors.EVENT_READ)
        while found := selector.select(60):
            if ready in [key.fileobj for key, _ in found]:
                if b"READY=1" in ready.recv(4096):
                    return True
            else:
                return False
    raise AssertionError("the agent neither came up nor ended")


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_device_in_turn(tmp_path, damage):
    device, store = enrolled(tmp_path / "whole")
    store.close()
    state = device.places.state
    assert start(tmp_path / "whole")[0]
    device.places.wake.unlink()
    found = {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file() and path.stat().st_size}
    assert found >= ANEW | NO_START
    wrong = []
    for name in sorted(found):
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "try")
        path = tmp_path / "try" / "state" / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        came_up, said = start(tmp_path / "try")
        named = name in ANEW or f"{path} is damaged" in said
        if came_up == (name in NO_START) or not named or "Traceback" in said:
            wrong.append((name, came_up, said))
    assert wrong == []
