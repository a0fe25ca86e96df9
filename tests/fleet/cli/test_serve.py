"""`fleet init` and `fleet serve` as processes: up, asked, told to stop; a port in use and a second server are named."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.demo.environment import free_ports

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "fleet.cli.main", *arguments]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "WASMFLEET_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(home), capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A home as `fleet init` makes it."""
    operators, devices, mqtt = map(str, free_ports(3))
    home = tmp_path_factory.mktemp("made") / "home"
    done = run(
        home,
        *("init", "--dev", "--broker", "embedded"),
        *("--operators-port", operators, "--devices-port", devices, "--mqtt-port", mqtt),
    )
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "home", symlinks=True))


@contextlib.contextmanager
def serving(home: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command("serve"), env=environment(home), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            while "broker" not in server.stdout.readline():
                assert server.poll() is None
            yield server
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0


def test_a_server_answers_and_ctrl_c_ends_it(home):
    with serving(home):
        assert run(home, "status").stdout.startswith("fleet")
        # nobody gets in with another token
        (home / "operator/token").write_text("guessed")
        refused = run(home, "devices")
        assert refused.returncode == 4
        assert "error: " in refused.stderr
    # and the same command tells that it is gone
    assert run(home, "status").returncode == 3


def test_a_second_server_on_the_same_home_is_refused(home):
    with serving(home):
        second = run(home, "serve")
    assert second.returncode == 1
    assert "another server runs on" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_port_in_use_is_named(home):
    text = (home / "server/server.toml").read_text()
    port = int(text.partition('operators = "127.0.0.1:')[2].partition('"')[0])
    with socket.create_server(("127.0.0.1", port)):
        done = run(home, "serve")
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_fleet_to_serve(tmp_path):
    done = run(tmp_path / "nowhere", "serve")
    assert done.returncode == 2
    assert "fleet init --dev" in done.stderr


@pytest.mark.parametrize("broker", ["foo", "mqtts://foo", "mqtts://:1"])
def test_an_unknown_broker_is_wrong_usage_and_the_known_ones_are_named(broker, made, tmp_path):
    for done in (run(made, "serve", "--broker", broker), run(tmp_path / "new", "init", "--dev", "--broker", broker)):
        assert done.returncode == 2
        assert f"broker {broker!r} is unknown: write auto, mosquitto, embedded, or mqtts://HOST:PORT" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_one_port_for_two_listeners_is_refused_before_a_fleet_is_made(tmp_path):
    done = run(tmp_path / "home", "init", "--dev", "--operators-port", "9000", "--devices-port", "9000")
    assert done.returncode == 2
    assert "must differ" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_home_under_which_nothing_can_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path / "file" / "home", "init", "--dev")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "choose another --home" in done.stderr


def test_a_server_without_its_director_key_says_so_at_once(home):
    (home / "server/keys/director.pem").unlink()
    done = run(home, "serve")
    assert done.returncode == 1
    assert "director.pem" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("server.toml", "fleet = ", "server.toml"),
        ("server.toml", 'colour = "red"\n', "colour"),
        ("fleet.db", "no database at all, and long enough to be none", "restore it from a backup"),
        ("repository/timestamp.json", "{}", "timestamp"),
    ],
)
def test_a_damaged_home_is_one_line(file, content, words, home):
    path = home / "server" / file
    before = path.read_text() if file.endswith(".toml") and "colour" in content else ""
    path.write_text(before + content)
    done = run(home, "serve")
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
