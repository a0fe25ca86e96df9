"""Something else in the place of a file: no command hangs, the database is made anew, the owner's policy not lost."""

import os
import socket
import stat

import pytest

from fleet.protocol import files
from tests.agent.running_device import RunningDevice


def bound(path):
    with socket.socket(socket.AF_UNIX) as sock:
        directory = os.open(path.parent, os.O_PATH)
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")  # however long the path is
        os.close(directory)


KINDS = {
    "a named pipe": os.mkfifo,
    "a directory": lambda path: (path.mkdir(), (path / "more").touch()),
    "a socket": bound,
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
}
# one in each run, all of them at night
SOME = [pytest.param(kind, marks=[pytest.mark.nightly] if kind != "a named pipe" else []) for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_told_and_read_by_nobody(tmp_path, kind):
    path = tmp_path / "file"
    assert files.irregular(path) == ""
    KINDS[kind](path)
    assert files.irregular(path) == kind
    (tmp_path / "link").symlink_to(path)
    assert files.irregular(tmp_path / "link") == kind
    with pytest.raises(OSError, match=r"not a file|No such"):
        files.read(path)
    aside = files.set_aside(path)
    assert aside.name == "file.damaged"
    path.write_text("content")
    assert (files.irregular(path), files.read(path)) == ("", b"content")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(path)
    assert (files.irregular(tmp_path / "link"), files.read(tmp_path / "link")) == ("", b"content")
    assert files.set_aside(path).exists(), "beside what was set aside before"


UNREADABLE = {
    "not UTF-8": "[disk]\nreserve_bytes = 1000000\n".encode("utf-16"),
    "not TOML": b"name = " + b"[" * 5000 + b"]" * 5000,
    "not TOML: Exceeds the limit": b"health_s = " + b"9" * 5000,
}


@pytest.mark.parametrize("said", UNREADABLE)
def test_a_policy_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, said):
    with RunningDevice(tmp_path, "web") as bare:
        (tmp_path / "agent.toml").write_bytes(UNREADABLE[said])
        done = bare.agent("status")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert f"agent.toml: it is {said}" in done.stderr


def test_a_policy_that_was_saved_on_windows_is_read(tmp_path):
    with RunningDevice(tmp_path, "web") as bare:
        (tmp_path / "agent.toml").write_bytes(b"\xef\xbb\xbf[disk]\r\nreserve_bytes = 1000000\r\n")
        assert bare.agent("status").returncode == 0


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RunningDevice(tmp_path_factory.mktemp("device"), "web") as made:
        made.start_host()
        assert made.agent("restore").returncode == 0
        made.comes_to_answer()
        yield made


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("store.db", "a named pipe"),
        *(pytest.param("store.db", kind, marks=pytest.mark.nightly) for kind in KINDS if kind != "a named pipe"),
        pytest.param("store.db-wal", "a named pipe", marks=pytest.mark.nightly),
        pytest.param("store.db-shm", "a directory", marks=pytest.mark.nightly),
    ],
)
def test_a_database_that_is_no_file_is_named_and_made_anew(device, name, kind):
    path = device.state / name
    for suffix in ("", "-wal", "-shm"):
        if name == f"store.db{suffix}":
            path.unlink(missing_ok=True)
    KINDS[kind](path)
    if kind != "a link to nowhere":  # without one, status tells that the database is lost
        status = device.agent("status")
        assert f"{name}: it is {kind}, not a file" in status.stderr
        assert device.agent("diagnose", "-o", str(device.directory / "archive.tar.gz")).returncode == 0
    process = device.start_agent()
    process.terminate()
    assert process.wait(60) == 0
    assert "took over 1 instances" in device.said("agent")
    assert "web: runs main/hello@1.0.0" in device.agent("status").stdout
    assert stat.S_ISREG((device.state / "store.db").lstat().st_mode)
    assert device.answers() == 200


def test_an_agent_that_cannot_keep_messages_of_components_does_all_else(device):
    path = device.state / "readings"
    if path.exists():
        path.rename(device.state / "readings.kept")
    path.touch()
    try:
        process = device.start_agent()
        process.terminate()
        assert process.wait(60) == 0
        assert "messages of components cannot be kept" in device.said("agent")
        assert device.answers() == 200
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "identity/root.json",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("identity/enrolled.json", "identity/mac.key", "runset.json", "starts.json")
        ),
    ],
)
def test_no_command_waits_for_a_named_pipe_in_the_place_of_a_file(device, name):
    path, kept = device.state / name, device.state / f"{name}.kept"
    kept.unlink(missing_ok=True)
    if path.exists():
        path.rename(kept)
    os.mkfifo(path)
    try:
        for command in ("status", "why", "restore"):
            done = device.agent(command)
            assert "Traceback" not in done.stderr, done.stderr
        assert device.answers() == 200
    finally:
        path.unlink()
        if kept.exists():
            kept.rename(path)


@pytest.mark.parametrize("kind", SOME)
def test_a_policy_that_is_no_file_is_refused_and_not_left_out(tmp_path, kind):
    with RunningDevice(tmp_path, "web") as bare:
        path = tmp_path / "agent.toml"
        path.unlink()
        KINDS[kind](path)
        for command in ("status", "run"):
            done = bare.agent(command)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"it is {kind}, not a file" in done.stderr
        files.set_aside(path)
        path.touch()
        (tmp_path / "config.d").mkdir()
        KINDS[kind](tmp_path / "config.d" / "50-policy.toml")
        assert f"it is {kind}, not a file" in bare.agent("status").stderr
        files.set_aside(tmp_path / "config.d" / "50-policy.toml")
        (tmp_path / "config.d" / "50-policy.toml").symlink_to("/dev/null")
        assert bare.agent("status").returncode == 0
