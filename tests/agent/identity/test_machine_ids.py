"""Device whose machine id is not what it was when it enrolled: the agent goes on, asks, and destroys nothing."""

import shlex

import pytest

from tests.agent.read_only_places import unshare
from tests.agent.running_device import RunningDevice

pytestmark = [pytest.mark.root, pytest.mark.skipif(not unshare(), reason="no mount namespaces for this user")]
BEFORE = "0123456789abcdef0123456789abcdef"
QUESTION = "this may be another machine than the one that enrolled as crane-0a1b2c3d"


def with_machine_id(path):
    """Prefix of a command that finds this file as /etc/machine-id."""
    return [*unshare(), "sh", "-c", f'mount --bind {shlex.quote(str(path))} /etc/machine-id && exec "$@"', "sh"]


@pytest.fixture
def device(tmp_path):
    with RunningDevice(tmp_path, "web") as made:
        made.enrolled_on(f"id:{BEFORE}", id=BEFORE)
        yield made


def has_machine_id(device, text):
    path = device.directory / "machine-id"
    path.write_text(text)
    device.prefix = with_machine_id(path)


@pytest.mark.parametrize("here", ["fedcba9876543210fedcba9876543210\n", "uninitialized\n", ""])
def test_the_agent_goes_on(device, here):
    has_machine_id(device, here)
    agent = device.start_agent()
    agent.terminate()
    assert agent.wait(60) == 0
    status = device.agent("status").stdout
    assert (QUESTION in status) == here.startswith("fedc")
    before = (device.state / "identity" / "device.key").read_bytes()
    first_boot = device.agent("enroll", "--first-boot")
    assert first_boot.returncode == 0
    assert (device.state / "identity" / "device.key").read_bytes() == before
    assert "web: runs" in device.agent("status").stdout


def test_an_id_in_memory_only_is_of_this_boot_and_raises_no_question(device):
    """As systemd makes it up where /etc/machine-id cannot be written."""
    path, memory = device.directory / "machine-id", device.directory / "memory"
    path.write_text("fedcba9876543210fedcba9876543210\n")
    memory.mkdir()
    own = 'mount -t tmpfs none "$2" && cp "$1" "$2"/id && mount --bind "$2"/id /etc/machine-id'
    script = f'{own} && shift 2 && exec "$@"'
    device.prefix = [*unshare(), "sh", "-c", script, "sh", str(path), str(memory)]
    said = device.agent("enroll", "--first-boot")
    assert (said.returncode, said.stdout) == (0, "crane-0a1b2c3d is already enrolled\n")


def test_the_owner_answers(device):
    has_machine_id(device, "fedcba9876543210fedcba9876543210\n")
    assert QUESTION in device.agent("enroll", "--first-boot").stdout
    answered = device.agent("enroll", "--same-device")
    assert (answered.returncode, answered.stdout) == (0, "this machine is crane-0a1b2c3d\n")
    assert "already enrolled" in device.agent("enroll", "--first-boot").stdout
    agent = device.start_agent()
    agent.terminate()
    agent.wait(60)
    assert QUESTION not in device.agent("status").stdout
