"""Two `fleet` commands at once in one home: each writes its files under a name of its own, and none is lost."""

import subprocess
import sys

import pytest

from fleet.cli.trust_store import load_devices
from tests import packed

PROBE = packed.guest_file("probe")

# Each process stops before its file gets its name, until all are there: the order in which they would collide.
WAIT = """
import sys
from pathlib import Path

plain = Path.replace


def replace(self, target):
    print("written", flush=True)
    sys.stdin.readline()
    return plain(self, target)


Path.replace = replace
"""
COMPOSE = """
from fleet.cli.main import main
sys.argv = ["fleet", "component", "compose", *sys.argv[1:]]
main()
"""
STATE = """
from signing.updater import FileState
from signing.trusted_metadata import VerifierState
FileState(Path(sys.argv[1]), lock=Path(sys.argv[1] + ".lock")).save(VerifierState())
"""
BUNDLE = """
from fleet.cli import bundle
bundle._write(Path(sys.argv[1]), {"a": b"content"})  # the command around it needs a server
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(COMPOSE, (PROBE, "-o")), (STATE, ()), (BUNDLE, ())],
    ids=["a file that a person named", "what a verifier remembers", "a bundle"],
)
def test_two_processes_that_write_one_file_both_succeed(tmp_path, code, arguments):
    target = tmp_path / "file"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", WAIT + code, *map(str, arguments), str(target)]
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for each in both:
        assert each.stdout.readline() == "written\n"
    for each in both:
        _, errors = each.communicate("\n", timeout=60)
        assert (each.returncode, errors) == (0, "")
    assert target.read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith("new") or path.name.startswith(".")]


# Each `fleet audit verify DEVICE` looks at its device once it is told to; the server's answers stand here.
AUDIT = """
import sys
from fleet.cli import audit
from fleet.cli.main import main
from fleet.client import Client
from fleet.protocol.operator_api import DeviceRow, Devices
from signing.device_statements import Seen, Verdict

def examine(_client, device, _seen):
    print("looks", flush=True)
    sys.stdin.readline()
    return Verdict(seen=Seen(key=device * 8), findings=(), notes=(), reports=())

audit._examine = examine
Client.devices = lambda _self: Devices(devices=tuple(DeviceRow(id=each, name=each) for each in "ab"))
sys.argv = ["fleet", *sys.argv[1:]]
main()
"""


def test_two_audits_at_once_both_remember_the_key_that_they_saw(home):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    audits = []
    for device in "ab":
        command = [sys.executable, "-c", AUDIT, "--home", str(home), "audit", "verify", device]
        audits.append(subprocess.Popen(command, text=True, **pipes))
        assert audits[-1].stdout.readline(), "it looks, or waits for the other"
    for each in audits:
        told, _ = each.communicate("\n", timeout=60)
        assert each.returncode == 0, told
    memory = load_devices(home / "operator/trust")
    assert {device: seen.key for device, seen in memory.devices.items()} == {"a": "a" * 8, "b": "b" * 8}
