"""The package's life on a board: upgraded under a running component, removed, purged."""

import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import rig
from conftest import enrol
from operator_side import OperatorSide, budget

from deploy.packages import build

GROUP = "packages"
DPKG_S = 900.0  # byte-compiling under emulation, on busy cores


@pytest.fixture(scope="module")
def next_version(boards_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL, for a board, of the package as of a next version."""
    place = tmp_path_factory.mktemp("next")
    os.environ["WASMFLEET_VERSION"] = "0.99.0"
    try:
        package = build.build("wasmfleet-agent", "arm64", build.own_wheel(place / "wheel"), place)
    finally:
        del os.environ["WASMFLEET_VERSION"]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{rig.HOST}:{server.server_address[1]}/{package.name}"
        server.shutdown()


@pytest.fixture(scope="module")
def board(new_board: Callable[..., rig.Board], operator: OperatorSide) -> rig.Board:
    made: rig.Board = new_board("arm64", "packages")
    enrol(made, operator, GROUP)
    operator.pushed("v1.wasm", group=GROUP)
    operator.answers(made.port, "1")
    return made


def main_pid(board: rig.Board, unit: str) -> str:
    return board.ok(f"systemctl show --property=MainPID --value {unit}")


def test_an_upgrade_touches_no_component(board: rig.Board, operator: OperatorSide, next_version: str) -> None:
    host, agent = main_pid(board, "fleet-host"), main_pid(board, "fleet-agent")
    fetch = f"import urllib.request; urllib.request.urlretrieve('{next_version}', '/var/tmp/next.deb')"
    board.ok(f'python3 -c "{fetch}"', timeout_s=120)
    with budget("upgrade on the board", 300), operator.asking(board.port) as asked:
        said = board.ok("DEBIAN_FRONTEND=noninteractive dpkg --install /var/tmp/next.deb", timeout_s=DPKG_S)
    assert asked().lost == 0, asked().losses
    assert "components keep running" in said
    assert "0.99.0" in board.ok("dpkg-query --show wasmfleet-agent")
    assert main_pid(board, "fleet-host") == host, "the host was not touched"
    assert main_pid(board, "fleet-agent") != agent, "the agent is the new one"
    # and the new one knows what runs, and can change it
    operator.pushed("v2.wasm", group=GROUP)
    operator.answers(board.port, "2")


def test_removing_stops_everything_and_keeps_state(board: rig.Board) -> None:
    board.ok("dpkg --remove wasmfleet-agent", timeout_s=DPKG_S)
    assert board.ok("ps -eo args | grep -c '[f]leet-' || true") == "0"
    assert board.ok("systemctl --failed --plain --no-legend") == ""
    board.ok("test -s /var/lib/wasmfleet-agent/identity/device.key && test -e /etc/wasmfleet/agent.toml")
    assert board.run("test -e /usr/bin/fleet-agent").status != 0


def test_purging_leaves_nothing_and_asks_nothing(board: rig.Board) -> None:
    board.ok("dpkg --purge wasmfleet-agent </dev/null", timeout_s=DPKG_S)
    # what the owner wrote stays, and so do dpkg's and the journal's own records of what was
    elsewhere = " ".join(f"-not -path '{each}/*'" for each in ("/proc", "/var/tmp", "/var/log", "/var/lib/dpkg"))
    left = board.ok(f"find / -xdev -iname '*wasmfleet*' {elsewhere}")
    assert not left, left
    assert board.run("getent passwd wasmfleet").status != 0
