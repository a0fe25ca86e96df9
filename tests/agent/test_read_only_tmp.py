"""Device without room for temporary files, as after a reboot with a full or broken disk.

/tmp, /var/tmp and the current directory are read-only.
"""

import subprocess
import sys

import pytest

from tests.agent.read_only_places import TEMPORARY, read_only, unshare
from tests.agent.running_device import ROOT, RunningDevice

pytestmark = pytest.mark.skipif(not unshare(), reason="no mount namespaces for this user")


def test_temporary_files_cannot_be_made_there(tmp_path):
    words = "import tempfile; tempfile.TemporaryFile(); print('made')"
    prefix = read_only(*TEMPORARY, ROOT, writable=[tmp_path])
    done = subprocess.run([*prefix, sys.executable, "-c", words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "No usable temporary directory" in done.stderr


def test_host_agent_and_component_start(tmp_path):
    prefix = read_only(*TEMPORARY, ROOT, writable=[tmp_path])
    with RunningDevice(tmp_path, "web", prefix=prefix) as device:
        device.start_host()
        restored = device.agent("restore")  # compiles, as there is no image
        assert (restored.returncode, restored.stdout) == (0, "web: runs\n"), restored.stderr
        assert device.answers() == 200
        assert device.ask_host().containment["seccomp"]
        device.start_agent()
        assert "device" not in device.agent("status").stderr
