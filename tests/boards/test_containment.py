"""What holds around components on a board as Raspberry Pi OS comes: no memory control group, no Landlock."""

import importlib.util
import re
import tarfile
from pathlib import Path

import pytest
import rig
from conftest import Boards, Joined, Served
from stages import budget

SOURCE = Path(__file__).parents[2]
PARTS = ("tests/conftest.py", "tests/rotation.py", "tests/agent/host", "components/guests", "components/adapter")
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
UNIT = SOURCE / "deploy/systemd/fleet-host.service"
SHIPPED = re.search(r"^ExecStart=(.*[^\\])$", UNIT.read_text().replace("\\\n", ""), re.MULTILINE)
DROP_IN = "/etc/systemd/system/fleet-host.service.d/walls.conf"


@pytest.fixture
def scene(boards: Boards, architecture: str) -> Joined:
    return boards.running(architecture, append="lsm= cgroup_disable=memory")


def restart(scene: Joined, *options: str) -> rig.Answer:
    """Start the host anew with these options beside the packaged unit's own, as a board's owner adds them."""
    assert SHIPPED
    command = " ".join([SHIPPED[1], *options])
    scene.board.put(DROP_IN, f"[Service]\nExecStart=\nExecStart={command}\n".encode())
    return scene.board.run("systemctl daemon-reload && systemctl restart fleet-host", timeout_s=180)


def as_shipped(scene: Joined) -> None:
    """Start the host as the package does."""
    scene.board.ok(f"rm {DROP_IN} && systemctl daemon-reload && systemctl restart fleet-host", timeout_s=180)


def test_the_board_says_what_it_lacks(scene: Joined) -> None:
    said = scene.board.run("fleet-host check", timeout_s=120).text
    layers = {line.split()[0]: line.split()[1] for line in said.splitlines() if re.match(r"  \w+ +(yes|NO) ", line)}
    assert layers.pop("landlock") == "NO"
    assert layers.pop("shared") == "NO", "between those who share a lane there is no wall on any board"
    assert set(layers.values()) == {"yes"}, said
    assert "memory" not in scene.board.ok("cat /sys/fs/cgroup/cgroup.controllers").split()


def test_the_packaged_minimum_holds_beside_what_an_owner_requires(scene: Joined) -> None:
    before = scene.answering()
    with budget("fleet-host --minimum baseline --require", 90):
        assert restart(scene, "--require", "baseline").status == 0
        arguments = scene.board.ok(f"tr '\\0' ' ' </proc/{scene.pid('fleet-host')}/cmdline")
        assert "--minimum baseline --require baseline" in arguments
        scene.answers(before)
        assert restart(scene, "--require", "all").status == 0, "it starts, and runs nothing"
        refused = scene.board.run("fleet-agent restore", timeout_s=120)
        assert refused.status != 0
        assert "landlock" in refused.text
        assert scene.board.asks_itself("/hello/") == ""
        as_shipped(scene)
        scene.answers(before)


def test_a_minimum_that_does_not_hold_is_a_refusal_to_start_and_is_said_once(scene: Joined) -> None:
    before = scene.answering()
    with budget("fleet-host --minimum all", 60):
        assert restart(scene, "--minimum", "all").status != 0
        shown = scene.board.ok("systemctl show fleet-host --property=ActiveState,ExecMainStatus,NRestarts")
        assert dict(line.split("=") for line in shown.splitlines()) == {
            "ActiveState": "failed",
            "ExecMainStatus": "78",
            "NRestarts": "0",
        }
        said = scene.board.ok("journalctl --no-pager --output=cat --lines=20 --unit=fleet-host")
        assert re.search(
            r"fleet-host: cannot start: isolation layers missing around components, as a .*: cgroup, landlock;", said
        ), said
        as_shipped(scene)
        scene.answers(before)


def test_no_bus_and_no_pin_may_be_opened_where_components_run(scene: Joined) -> None:
    board = scene.board
    # the pins that the machine has; a bus it has not, so a file of that kind, behind which nothing is
    board.ok("modprobe i2c-dev && mknod /dev/i2c-9 c 89 9")
    group = board.ok(f"cut -d: -f3 /proc/{scene.pid('fleet-host')}/cgroup")
    for device in ("/dev/i2c-9", *board.ok("ls /dev/gpiochip* 2>/dev/null; true").split()):
        assert "not permitted" not in board.run(f"exec 3<>{device}").text, "root may open it elsewhere"
        refused = board.run(f"sh -c 'echo $$ > /sys/fs/cgroup{group}/cgroup.procs && exec 3<>{device}'")
        assert refused.status != 0
        assert "Operation not permitted" in refused.text
    board.ok("rm /dev/i2c-9")


def test_an_escaped_guest_is_held_by_the_other_layers(scene: Joined, served: Served, tmp_path: Path) -> None:
    # the tests that run on the machine that builds this, on the board, against the package that is installed there
    scene.board.fetch(served.url(archive_of_tests(tmp_path / "containment.tar")), "/var/tmp/containment.tar")
    scene.board.ok("cd /var/tmp && tar xf containment.tar && rm containment.tar", timeout_s=120)
    # one that hangs says where, and ends before the console's patience does
    command = (
        "cd /var/tmp/containment && PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 WASMFLEET_TEST_LACKS=landlock "
        "timeout 600 /usr/lib/wasmfleet/agent/bin/python3 -m pytest --no-header -q -p no:cacheprovider -W ignore "
        "--import-mode=importlib -o faulthandler_timeout=180 --durations=5 "
        "tests/agent/host/test_escape.py -k 'refused_everything or table'"
    )
    with budget("the containment tests, on the board", 240):
        said = scene.board.run(command, timeout_s=660)
    assert said.status == 0, said.text[-8000:]
    print(said.text)
    assert re.search(r"\b4 passed", said.text), said.text[-2000:]


def archive_of_tests(place: Path) -> Path:
    """The tests of what is around a lane, and pytest to run them with, which the board's packages do not have."""
    with tarfile.open(place, "w") as tar:
        for part in PARTS:
            tar.add(SOURCE / part, f"containment/{part}", filter=_without_caches)
        for name in PYTEST:
            found = importlib.util.find_spec(name)
            assert found is not None
            assert found.origin is not None
            origin = Path(found.origin)
            source = origin.parent if found.submodule_search_locations else origin
            tar.add(source, f"containment/{source.name}", filter=_without_caches)
    return place


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry
