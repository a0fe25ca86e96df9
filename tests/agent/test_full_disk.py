"""Device whose disk is completely full: what runs goes on, diagnosis works, and nothing is recorded meanwhile."""

import contextlib
import json
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from agent.update.store import NEW_BYTES
from tests.agent.read_only_places import unshare
from tests.agent.running_device import RunningDevice
from tests.eventually import eventually

pytestmark = pytest.mark.skipif(not unshare(), reason="no mount namespaces for this user")

MOUNTED = """
set -e
cp -a "$1/." "$2"
mount -t tmpfs -o size=4m,mode=700 tmpfs "$1"
cp -a "$2/." "$1"
echo mounted
exec cat
"""


class SmallDisk:
    """File system of 4 MiB for a directory, in a mount namespace that processes enter by `prefix`."""

    def __init__(self, directory, kept):
        kept.mkdir()
        self._directory = directory
        self._holder = subprocess.Popen(
            [*unshare(), "sh", "-c", MOUNTED, "sh", str(directory), str(kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout.readline() == b"mounted\n"
        pid = self._holder.pid
        user = ("--user", "--preserve-credentials") if "--user" in unshare() else ()
        self.prefix = ["nsenter", "--target", str(pid), *user, "--mount", "--"]
        self.place = Path(f"/proc/{pid}/root{directory}")

    def fill(self):
        """Leave no free byte."""
        with contextlib.suppress(OSError), (self.place / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert os.statvfs(self.place).f_bfree == 0

    def free(self, room):
        """Leave this many bytes."""
        filler = self.place / "filler"
        os.truncate(filler, filler.stat().st_size - room)

    def remount(self, mode):
        """Make it read-only (`ro`), as a kernel does after errors, or writable again (`rw`)."""
        # With its source, no other option is given again: in a namespace of a user's, its own uid would be refused.
        command = [*self.prefix, "mount", "-o", f"remount,{mode}", "tmpfs", str(self._directory)]
        # busy for as long as the host writes a line of its log
        eventually(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0, f"it is {mode}")

    def close(self):
        self._holder.communicate(timeout=60)


@pytest.fixture
def device(tmp_path):
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(RunningDevice(tmp_path, "web"))
        made.disk = disk = SmallDisk(made.state, tmp_path / "kept")
        stack.callback(disk.close)
        made.prefix = disk.prefix
        yield made


def tells(device):
    """What `status` and `why` say."""
    status, why = device.agent("status"), device.agent("why", "--json")
    assert (status.returncode, why.returncode) == (0, 0), status.stderr + why.stderr
    assert "web: runs main/hello@1.0.0" in status.stdout
    assert "is on a full file system" in status.stdout
    return json.loads(why.stdout)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_status_and_why_of_a_device_whose_agent_has_ended(device, end):
    process = device.start_agent()
    (process.terminate if end == "stopped" else process.kill)()
    process.wait(60)
    device.disk.fill()
    assert tells(device)["running"][0]["instance"] == "web"
    refused = device.agent("enroll", "--same-device")
    path = device.places.identity / "enrolled.json"
    assert refused.stderr == f"fleet-agent enroll: {path}: No space left on device\n"


def stopped(process):
    """Stop the agent in order."""
    process.terminate()
    assert process.wait(60) == 0


def rows(device):
    """Reports in the database, read from the file as it is."""
    with contextlib.closing(
        sqlite3.connect(f"{(device.disk.place / 'store.db').as_uri()}?immutable=1", uri=True)
    ) as db:
        return db.execute("SELECT count(*) FROM outbox").fetchone()[0]


def test_the_agent_starts_and_records_nothing(device):
    device.start_host()
    assert device.agent("restore").returncode == 0
    stopped(device.start_agent())
    before = rows(device)
    device.disk.fill()
    process = device.start_agent()
    assert "the disk is full: nothing is recorded until there is space" in device.said("agent")
    told = tells(device)
    assert (told["failed"], told["unsent_reports"]) == ([], before)
    assert device.answers() == 200
    assert rows(device) == before
    stopped(process)
    assert "Traceback" not in device.said("agent")
    assert not (device.disk.place / "store.db.damaged").exists()


HARM = {
    "its first page": lambda path: path.write_bytes(bytes(100) + path.read_bytes()[100:]),
    "a page inside": lambda path: path.write_bytes(path.read_bytes()[:4096] + os.urandom(8 * 4096)),
    "lost": os.unlink,
}


def says_what_is_wrong(device, *texts):
    """What runs is told, and what is wrong, by status, why and check."""
    status, why = device.agent("status"), device.agent("why", "--json")
    assert (status.returncode, why.returncode) == (0, 0), status.stderr + why.stderr
    assert "web: runs main/hello@1.0.0" in status.stdout
    assert json.loads(why.stdout)["running"][0]["instance"] == "web"
    results = {each["name"]: each for each in json.loads(device.agent("check", "--json").stdout)}
    assert not results["disk"]["ok"]
    for text in texts:
        assert text in status.stdout
        assert text in results["disk"]["text"]


def started(device):
    """Start the agent with a pipe on which its log is read."""
    said = len(device.said("agent"))
    process = device.start_agent()
    return process, lambda: device.said("agent")[said:]


@pytest.mark.parametrize(
    "harm", [pytest.param(each, marks=[pytest.mark.nightly] if each != "a page inside" else []) for each in HARM]
)
def test_an_agent_whose_store_is_damaged_on_a_full_disk_serves_and_rebuilds_it(device, harm):
    device.start_host()
    assert device.agent("restore").returncode == 0
    stopped(device.start_agent())
    database = device.disk.place / "store.db"
    for suffix in ("-wal", "-shm"):
        database.with_name(f"store.db{suffix}").unlink(missing_ok=True)
    HARM[harm](database)
    damaged = database.read_bytes() if database.exists() else None
    device.disk.fill()
    device.ask_host_to_stop("web")
    process, said = started(device)
    too_full = "its disk is too full for a new one: free 256 KiB"
    device.comes_to_answer()  # started by the agent, from the run set
    if damaged is not None:
        assert too_full in said()
        says_what_is_wrong(device, too_full)
        assert database.read_bytes() == damaged
    assert not (device.disk.place / "store.db.damaged").exists()
    device.disk.free(NEW_BYTES)
    eventually(lambda: "there is space again" in said(), "the store is rebuilt")
    eventually(lambda: "is on a full" not in device.agent("status").stdout, "status says so")
    status = device.agent("status")
    assert "web: runs main/hello@1.0.0" in status.stdout
    assert process.poll() is None
    assert device.answers() == 200
    stopped(process)
    assert "Traceback" not in said()
    stopped(device.start_agent())
    assert "web: runs main/hello@1.0.0" in device.agent("status").stdout


@pytest.mark.parametrize("harm", [None, *(pytest.param(each, marks=pytest.mark.nightly) for each in HARM)])
def test_an_agent_on_a_read_only_disk_serves_and_goes_on_once_it_is_writable(device, harm):
    device.start_host()
    assert device.agent("restore").returncode == 0
    stopped(device.start_agent())
    database = device.disk.place / "store.db"
    if harm is not None:
        for suffix in ("-wal", "-shm"):
            database.with_name(f"store.db{suffix}").unlink(missing_ok=True)
        HARM[harm](database)
    device.disk.remount("ro")
    device.ask_host_to_stop("web")
    process, said = started(device)
    device.comes_to_answer()
    assert "read-only" in said()
    if harm != "lost":  # of which status says that, and nothing else
        says_what_is_wrong(device, "is on a read-only file system")
    refused = device.agent("run")
    assert "another agent runs" in refused.stderr
    device.disk.remount("rw")
    eventually(lambda: "there is space again" in said(), "the store is used again")
    assert process.poll() is None
    assert device.answers() == 200
    stopped(process)
    assert "Traceback" not in said()
    assert "web: runs main/hello@1.0.0" in device.agent("status").stdout


GOES_ON = """
import sys
from contextlib import closing
from pathlib import Path

from agent.update.store import Store, StoreError

path, filler = map(Path, sys.argv[1:])
with closing(Store.renewed(path)) as store:
    kept = store.committed()
    try:
        store.set_counter("accepted", 7)
        sys.exit("it was written")
    except StoreError as error:
        print(error)
    assert store.counter("accepted") == 0 and kept
    filler.unlink()
    store.set_counter("accepted", 7)
    assert store.committed() == kept
with closing(Store(path)) as store:
    assert store.counter("accepted") == 7
"""


def test_a_store_that_was_opened_on_a_full_disk_writes_once_there_is_space(device):
    stopped(device.start_agent())
    device.disk.fill()
    line = [*device.prefix, *device.python, "-c", GOES_ON, str(device.places.database), str(device.state / "filler")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "its disk is full; free space on this device" in done.stdout
