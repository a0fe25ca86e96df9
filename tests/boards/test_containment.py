"""What holds around components on a board as Raspberry Pi OS comes: no memory control group, no Landlock."""

import os
import re
from collections.abc import Callable

import pytest
import rig
from conftest import IMPATIENT, Joined, enrol
from operator_side import OperatorSide
from stages import budget

from deploy.riscv64 import build as riscv64

ARCHITECTURES = ["arm64", *(["riscv64"] if os.environ.get("FULL") and riscv64.finished() else [])]
REQUIRE = """\
[Service]
ExecStart=
ExecStart=/usr/bin/fleet-host run --runtime /run/wasmfleet --state /var/lib/wasmfleet-host \\
    --ingress ${WASMFLEET_INGRESS} --agent-group wasmfleet --require %s
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scene(request: pytest.FixtureRequest, new_board: Callable[..., rig.Board], operator: OperatorSide) -> Joined:
    name = f"walls-{request.param}"
    with budget(f"boot of {name} with lsm= cgroup_disable=memory", 90):
        board = new_board(str(request.param), name, append="lsm= cgroup_disable=memory")
    board.put("/etc/wasmfleet/config.d/50-test.toml", IMPATIENT)
    with budget(f"{name} joins and gets v1", 90):
        made = Joined(board, enrol(board, operator, name), name, operator)
        operator.pushed("v1.wasm", group=name)
        made.answers("1")
    return made


def require(scene: Joined, layers: str) -> None:
    """Have the host run nothing unless these layers hold, as a board's owner says it."""
    scene.board.put("/etc/systemd/system/fleet-host.service.d/require.conf", (REQUIRE % layers).encode())
    scene.board.ok("systemctl daemon-reload && systemctl restart fleet-host", timeout_s=180)


def test_the_board_says_what_it_lacks(scene: Joined) -> None:
    said = scene.board.run("fleet-host check", timeout_s=120).text
    layers = {line.split()[0]: line.split()[1] for line in said.splitlines() if re.match(r"  \w+ +(yes|NO) ", line)}
    assert layers.pop("landlock") == "NO"
    assert set(layers.values()) == {"yes"}, said
    assert "memory" not in scene.board.ok("cat /sys/fs/cgroup/cgroup.controllers").split()


def test_a_policys_minimum_holds_and_all_of_it_does_not(scene: Joined) -> None:
    with budget("fleet-host --require", 90):
        require(scene, "baseline")
        scene.answers("1")
        require(scene, "all")
        refused = scene.board.run("fleet-agent restore", timeout_s=120)
        assert refused.status != 0
        assert "landlock" in refused.text
        assert scene.board.asks_itself("/hello/") == ""
        scene.board.ok("rm /etc/systemd/system/fleet-host.service.d/require.conf && systemctl daemon-reload")
        scene.board.ok("systemctl restart fleet-host", timeout_s=180)
        scene.answers("1")
