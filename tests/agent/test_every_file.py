"""Every file that agent and host open, with something else in its place: named, never waited for, read within bounds.

Which files there are is not written from memory: an audit hook in the real processes tells what they open, and a file
without a row fails. `tests/house/test_reads.py` finds reads that would wait.
"""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from fleet.protocol import files
from tests.agent.running_device import RunningDevice

HOOK = """
import os, sys

if {below!r} and "-m" in sys.orig_argv:
    told = os.open({told!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hook(event, arguments):
        if event in ("open", "sqlite3.connect") and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if path.startswith({below!r}):
                os.write(told, path.encode() + b"\\n")

    sys.addaudithook(hook)
"""


def bound(path):
    with socket.socket(socket.AF_UNIX) as sock:
        directory = os.open(path.parent, os.O_PATH)
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")  # however long the path is
        os.close(directory)


def huge(path):
    with path.open("wb") as file:
        file.truncate(1 << 30)


KINDS = {
    "a named pipe": os.mkfifo,
    "a directory": lambda path: (path.mkdir(), (path / "more").touch()),
    "a socket": bound,
    "a device": lambda path: path.symlink_to("/dev/zero"),  # endless, too
    "empty": Path.touch,
    "1 GiB": huge,
    "unreadable": lambda path: (path.touch(), path.chmod(0)),
}
SOME = [pytest.param(kind, marks=[pytest.mark.nightly] if kind != "a named pipe" else []) for kind in KINDS]

# Where the agent goes on, and says what is wrong; `*` stands for a digest.
GOES_ON = {
    "state/identity/ca.pem": "ca.pem",
    "state/identity/device.pem": "device.pem",
    "state/identity/root.json": "root.json",
    "state/identity/sealing.key": "sealing.key",
    "state/identity/mac.key": "",  # made anew
    "state/runset.json": "",  # written anew
    "state/starts.json": "",
    "state/images/*.cwasm": "",  # made anew
    "state/images/*.json": "",
    "state/log/agent.log": "",  # the journal has it all
    "state/wake": "",  # made anew
}
# Where there is another copy of what they hold: in a test of its own.
MENDED = ("state/store.db", "state/artifacts/*.wasm", "state/readings/*")
# Without which the agent does not start: it says so in a sentence.
NEEDED = ("state/identity/enrolled.json", "state/identity/device.key", "state/lock", "agent.toml")
OF_HOST = (
    "host/uids.json",
    "host/crashes.json",
    "host/deaths.json",
    "host/written.json",
    "host/logs/web.log",
    "host/logs/web.log.1",
)
WRITTEN_ANEW = ("state/*/.new-*", "state/.new-*", "host/.new-*")


def pattern(path):
    path = re.sub(r"^file://", "", path.partition("?")[0])
    return re.sub(r"[0-9a-f]{40,}[^/.]*", "*", path)


def row_of(path):
    rows = (*GOES_ON, *MENDED, *NEEDED, *OF_HOST, *WRITTEN_ANEW)
    return next((row for row in rows if Path(path).match(row)), None)


def put(path, kind):
    """Put something else in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        subprocess.run(["rm", "-r", str(path)], check=True)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path)


@pytest.fixture
def device(tmp_path):
    with RunningDevice(tmp_path, "web") as made:
        yield made


def places(device, row):
    return list(device.directory.glob(row)) or ([] if "*" in row else [device.directory / row])


def test_every_file_that_is_opened_has_a_row(device, tmp_path):
    hook = tmp_path / "hook"
    hook.mkdir()
    told = tmp_path / "opened"
    (hook / "sitecustomize.py").write_text(HOOK.format(below=str(tmp_path), told=str(told)))
    env = {"PYTHONPATH": str(hook)}
    device.start_host(env=env)
    assert device.agent("restore", env={**os.environ, **env}).returncode == 0
    process = device.start_agent(env=env)
    for command in ("status", "why", "check", "routes"):
        device.agent(command, env={**os.environ, **env})
    process.terminate()
    assert process.wait(60) == 0
    opened = {pattern(line) for line in told.read_text().splitlines()}
    inside = {str(Path(path).relative_to(tmp_path)) for path in opened if Path(path).is_relative_to(tmp_path)}
    inside = {path for path in inside if path.split("/")[0] in {"state", "host", "agent.toml", "config.d"}}
    assert len(inside) > 12
    assert sorted(path for path in inside if row_of(path) is None and not (tmp_path / path).is_dir()) == []


@pytest.mark.parametrize("kind", SOME)
def test_the_agent_goes_on_without_them_and_names_them(device, kind):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    device.start_host()
    assert device.agent("restore").returncode == 0
    process = device.start_agent()
    process.terminate()
    assert process.wait(60) == 0
    said = len(device.said("agent"))
    for row in GOES_ON:
        for path in places(device, row):
            put(path, kind)
    process = device.start_agent()
    device.comes_to_answer()
    status, check = device.agent("status"), device.agent("check")
    assert "web: runs main/hello@1.0.0" in status.stdout, status.stderr
    for row, name in GOES_ON.items():
        if name:
            assert f"{name} is damaged" in status.stdout, row
    assert "FAIL" in check.stdout
    assert device.agent("why").returncode == 0
    assert device.agent("diagnose", "-o", str(device.directory / "archive.tar.gz")).returncode == 0
    device.ask_host_to_stop("web")
    restored = device.agent("restore")
    assert "Traceback" not in restored.stderr
    process.terminate()
    assert process.wait(60) == 0
    new = device.said("agent")[said:]
    assert "Traceback" not in new
    for texts in (status.stderr, check.stderr):
        assert "Traceback" not in texts


@pytest.mark.parametrize("kind", SOME)
def test_without_these_the_agent_says_so_and_ends(device, kind):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    for row in NEEDED:
        if kind in {"empty", "1 GiB"} and row in {"state/lock", "agent.toml"}:
            continue  # nothing is read from the lock, and an empty policy is one
        path = device.directory / row
        kept = path.with_name(f"{path.name}.kept")
        if path.exists():
            path.rename(kept)
        put(path, kind)
        run = device.agent("run")
        assert run.returncode == 1, (row, run.stderr)
        assert path.name in run.stderr
        assert "Traceback" not in run.stderr
        files.set_aside(path)
        if kept.exists():
            kept.rename(path)


@pytest.mark.parametrize("kind", SOME)
def test_the_host_goes_on_without_its_files(device, kind):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    for row in OF_HOST:
        put(device.directory / row, kind)
    device.start_host()
    restored = device.agent("restore")
    assert restored.returncode == 0, restored.stderr
    device.comes_to_answer()
    assert "Traceback" not in device.said("host")


@pytest.mark.parametrize("kind", SOME)
def test_a_policy_of_the_shared_port_that_is_no_file_is_refused(device, kind):
    if kind in {"empty", "unreadable"}:
        pytest.skip("an empty one is one, and root reads everything")
    path = device.directory / "ingress.toml"
    put(path, kind)
    host = device.start_host("--ingress-config", str(path), ready=False)
    assert host.wait(60) == 1
    assert "ingress.toml" in device.said("host")
    assert "Traceback" not in device.said("host")
