"""The package's life on a board: upgraded under a running component, removed, purged, installed as a page says."""

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rig
from conftest import Boards, Joined, Served
from operator_side import OperatorSide
from stages import budget

from deploy.packages import build

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/first-device.md").read_text()
DPKG_S = 900.0  # byte-compiling under emulation, on busy cores


@pytest.fixture(scope="module")
def next_version(served: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL, for a board, of the package as of a next version."""
    place = tmp_path_factory.mktemp("next")
    os.environ["WASMFLEET_VERSION"] = "0.99.0"
    try:
        return served.url(build.build("wasmfleet-agent", "arm64", build.own_wheel(place / "wheel"), place))
    finally:
        del os.environ["WASMFLEET_VERSION"]


@pytest.fixture(scope="session", params=["arm64"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_upgrade_touches_no_component(running: Joined, next_version: str) -> None:
    board, operator = running.board, running.operator
    host, agent = running.pid("fleet-host"), running.pid("fleet-agent")
    board.fetch(next_version, "/var/tmp/next.deb")
    with budget("upgrade on the board", 150), operator.asking(board.port) as asked:
        said = board.ok("DEBIAN_FRONTEND=noninteractive dpkg --install /var/tmp/next.deb", timeout_s=DPKG_S)
    assert asked().lost == 0, asked().losses
    assert "components keep running" in said
    assert "0.99.0" in board.ok("dpkg-query --show wasmfleet-agent")
    assert running.pid("fleet-host") == host, "the host was not touched"
    assert running.pid("fleet-agent") != agent, "the agent is the new one"
    # a zygote that dies is replaced by one of the host's own version, which starts workers as before
    board.ok("pkill -KILL -f agent.host.worker.zygote")
    # and the new agent knows what runs, and can change it
    running.updated()
    assert running.pid("fleet-host") == host, "nor restarted afterwards"


def test_removing_keeps_state_and_purging_leaves_nothing(running: Joined, boards: Boards) -> None:
    board = running.board
    boards.spend()
    with budget("removal", 60):
        board.ok("dpkg --remove wasmfleet-agent", timeout_s=DPKG_S)
    assert board.ok("ps -eo args | grep -c '[f]leet-' || true") == "0"
    assert board.ok("systemctl --failed --plain --no-legend") == ""
    board.ok("test -s /var/lib/wasmfleet-agent/identity/device.key && test -e /etc/wasmfleet/agent.toml")
    assert board.run("test -e /usr/bin/fleet-agent").status != 0
    with budget("purge", 60):
        board.ok("dpkg --purge wasmfleet-agent </dev/null", timeout_s=DPKG_S)
    # what the owner wrote stays, and so do dpkg's and the journal's own records of what was
    elsewhere = " ".join(f"-not -path '{each}/*'" for each in ("/proc", "/var/tmp", "/var/log", "/var/lib/dpkg"))
    left = board.ok(f"find / -xdev -iname '*wasmfleet*' {elsewhere}")
    assert not left, left
    assert board.run("getent passwd wasmfleet").status != 0


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorSide]:
    """A machine without a fleet yet."""
    side = OperatorSide(tmp_path_factory.mktemp("laptop"), made=False)
    yield side
    side.close()


def test_the_page_of_the_first_board_is_true(
    boards: Boards, architecture: str, laptop: OperatorSide, package: Callable[[str], Path], served: Served
) -> None:
    # a Debian that has never heard of us, but for the owner's open port: the page opens it
    board = boards.any(architecture)
    board.ok("dpkg --purge wasmfleet-agent </dev/null", timeout_s=DPKG_S)
    board.ok("rm -rf /etc/systemd/system/fleet-host.service.d && systemctl daemon-reload")
    board.ok("hostname gate; echo gate > /etc/hostname")
    deb = package(architecture)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"./wasmfleet-agent_{version}_arm64.deb" in PAGE
    board.fetch(served.url(deb), f"/root/{deb.name}")
    said = []
    with budget("docs/first-device.md, as it stands", 240):
        for kind, line in lines_of(PAGE):
            match kind:
                case "server":
                    assert line == "fleet serve"
                    laptop.serve()
                case "device":
                    said.append(board.ok(f'sudo() {{ "$@"; }}; cd /root; {line}', timeout_s=DPKG_S))
                case "laptop":
                    said.append(typed(laptop, board, line))
                case other:
                    raise AssertionError(f"{line}: nobody types on a {other}")
    made = "\n".join(said)
    assert "| ssh DEVICE sudo fleet-agent enroll" in said[0], "fleet init says the one line for the device"
    assert re.search(r"gate-[0-9a-f]{8} has joined the fleet", made)
    assert re.search(r"gate-[0-9a-f]{8} +online", made)
    assert "hello from v1" in said, "curl from the laptop"
    assert "FAIL" not in made


def lines_of(page: str) -> Iterator[tuple[str, str]]:
    """The page's command lines in order, continued lines as one: where they are typed, and what."""
    for kind, block in re.findall(r"^```sh (\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"(\||\\)\n\s+", r"\1 ", block).splitlines():
            yield kind, line


def typed(laptop: OperatorSide, board: rig.Board, line: str) -> str:
    """A line typed on the laptop; what goes through ssh runs on the board, as root."""
    line = line.replace("--url https://LAPTOP:8743", " ".join(laptop.init_options()))
    line = line.replace("http://DEVICE:8080", f"--silent http://127.0.0.1:{board.port}")
    here, _, there = line.partition(" | ssh DEVICE sudo ")
    printed = laptop.shell(here)
    if not there:
        return printed.strip()
    board.put("/run/typed", printed.encode())
    printed = board.ok(f"{there} </run/typed", timeout_s=180)
    laptop.online(printed.split()[0])  # or what follows would come too early for a board that has just joined
    return printed
