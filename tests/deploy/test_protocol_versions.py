"""Agent of this tree on a host of an earlier one, which goes on running when a package is upgraded."""

import os
import subprocess
import sys

import pytest

from agent.host.ipc import host_api
from tests.agent.running_device import RunningDevice
from tests.deploy import before_the_move

EARLIER = {
    "before limits of tables and core instances": "75a2602800e35f56f07ca875983ca58a8d07e066^",
    "before modules moved": None,
}


@pytest.fixture(params=EARLIER)
def tree(request, tmp_path):
    revision = EARLIER[request.param]
    if revision is None:
        return before_the_move.tree_before(tmp_path)
    archive = tmp_path / "earlier.tar"
    archive.write_bytes(before_the_move.git("archive", revision, "agent", "fleet", "signing", "components"))
    (tmp_path / "earlier").mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(tmp_path / "earlier")], check=True)
    return tmp_path / "earlier"


def test_an_agent_deploys_to_a_host_of_an_earlier_version(tree, tmp_path):
    (tmp_path / "device").mkdir()
    with RunningDevice(tmp_path / "device", "web") as device, (tmp_path / "host.log").open("w") as log:
        places = ["--runtime", str(device.runtime), "--state", str(tmp_path / "host")]
        host = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent.host.cli", "run", *places, "--ingress", f"127.0.0.1:{device.port}"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stderr=log,
        )
        try:
            restored = device.agent("restore")
            assert (restored.returncode, restored.stdout) == (0, "web: runs\n"), restored.stderr
            assert device.answers() == 200
            agent = device.start_agent()
            agent.terminate()
            assert agent.wait(60) == 0
            assert device.ask_host(host_api.Status).instances[0].restarts == 0
        finally:
            host.terminate()
            assert host.wait(60) == 0
