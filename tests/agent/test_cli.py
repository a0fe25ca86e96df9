"""`fleet-agent` as a process: errors of a single line, output of the commands, and no unneeded imports."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.clock import ReferenceClock
from agent.config import Paths, Settings
from agent.host.ipc import host_api
from agent.identity import identity
from agent.identity.identity import Identity
from agent.service import Enrolled, Links, build
from agent.update.state import Committed, FailedItem, Transition
from agent.update.store import Database, NotAloneError, Store, alone
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.manifest import Http, Manifest
from fleet.protocol.messages import Report
from tests.simulator.repository import Repository

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def configuration(tmp_path):
    """Return the test's agent.toml; empty unless the test has written one."""
    path = tmp_path / "agent.toml"
    path.touch()
    return path


def agent(tmp_path, *arguments, stdin=""):
    places = ("--state", tmp_path / "state", "--runtime", tmp_path / "run", "--config", configuration(tmp_path))
    command, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", command, *map(str, places), *rest],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def enrolled(tmp_path):
    directory = tmp_path / "state" / "identity"
    directory.mkdir(parents=True)
    who = Identity(
        device="crane-0a1b2c3d",
        fleet="harbour",
        group="edge",
        devices_url="https://127.0.0.1:1",
        mqtt=("mqtts://127.0.0.1:2",),
        production=False,
        floor=NOW,
    )
    (directory / "enrolled.json").write_bytes(msgspec.json.encode(who))
    (directory / "mac.key").write_bytes(b"k" * 32)
    return Store(tmp_path / "state" / "store.db")


@pytest.mark.parametrize("command", ["run", "status", "why"])
def test_commands_on_an_unenrolled_device_say_what_to_do(tmp_path, command):
    done = agent(tmp_path, command)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "fleet-agent enroll" in done.stderr


@pytest.mark.parametrize(
    ("token", "words"), [("nonsense\n", "not an enrolment token"), ("wf1.AAAA\n", "damaged"), ("", "not an enrolment")]
)
def test_a_bad_token_is_one_line(tmp_path, token, words):
    done = agent(tmp_path, "enroll", stdin=token)
    assert done.returncode == 1
    assert done.stderr.count("fleet enroll-token") == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["file", "standard input"])
def test_binary_data_is_not_a_token(tmp_path, where):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(128, 256)) * 2000)
    words = ["--token-file", str(noise)] if where == "file" else []
    places = ["--state", str(tmp_path / "state"), "--config", str(configuration(tmp_path))]
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "enroll", *places, *words],
        input=noise.read_bytes(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b"not an enrolment token" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_second_agent_on_one_state_directory_is_refused(tmp_path):
    # two agents would displace each other at the broker forever
    lock = tmp_path / "lock"
    with alone(lock), pytest.raises(NotAloneError, match="another agent runs"), alone(lock):
        pass
    with alone(lock):
        pass


def test_why_of_an_unknown_instance_lists_the_running_ones(tmp_path):
    store = enrolled(tmp_path)
    store.save(committed=committed())
    store.close()
    done = agent(tmp_path, "why", "wbe")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "'wbe'" in done.stderr
    assert "running: web" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_state_directory_is_not_reported_as_another_users(tmp_path):
    enrolled(tmp_path).close()
    (tmp_path / "state").chmod(0o500)
    done = agent(tmp_path, "status")
    (tmp_path / "state").chmod(0o700)
    assert done.returncode == 1
    assert "is not writable" in done.stderr
    assert "another user" not in done.stderr


def test_a_file_that_is_not_a_database_is_reported_with_what_to_do(tmp_path):
    enrolled(tmp_path).close()
    (tmp_path / "state" / "store.db").write_text("not a database, for long enough that it is no empty one either")
    done = agent(tmp_path, "status")
    assert done.returncode == 1
    assert "move it away" in done.stderr
    assert done.stderr.count("\n") == 1


def test_status_shows_why_the_host_did_not_start(tmp_path):
    enrolled(tmp_path).close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / host_api.WHY_NOT).write_text("seccomp is missing around components\n")
    for command in ("status", "why"):
        done = agent(tmp_path, command)
        assert "the host did not start: seccomp is missing around components" in done.stdout


@pytest.mark.parametrize("name", ["device.key", "device.pem"])
def test_status_names_a_damaged_file_of_the_identity(tmp_path, name):
    enrolled_to_the_full(tmp_path).close()
    assert "damaged" not in agent(tmp_path, "status").stdout
    path = tmp_path / "state" / "identity" / name
    path.write_bytes(b"")
    done = agent(tmp_path, "status")
    assert done.returncode == 0
    assert f"{path} is damaged (empty)" in done.stdout


def test_status_names_a_store_that_is_lost(tmp_path):
    enrolled(tmp_path).close()
    (tmp_path / "state" / "runset.json").write_text("{}")
    assert "lost" not in agent(tmp_path, "status").stdout
    (tmp_path / "state" / "store.db").unlink()
    done = agent(tmp_path, "status")
    assert done.returncode == 0
    assert "store.db is lost: the agent makes a new one from runset.json when it starts" in done.stdout


def test_a_token_is_never_an_argument(tmp_path):
    done = agent(tmp_path, "enroll", "wf1.abc")
    assert done.returncode == 2
    assert "unrecognized" in done.stderr


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    (tmp_path / "agent.toml").write_text("[policy]\nlog = 'all'\n")
    enrolled(tmp_path).close()
    done = agent(tmp_path, "run")
    assert done.returncode == 1
    assert "'policy.log'" in done.stderr


COMMANDS = [
    ("run",),
    ("restore",),
    ("status",),
    ("why",),
    ("check",),
    ("enroll", "--token-file", "/dev/null"),
    ("apply", "/dev/null"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_named_configuration_that_is_missing_is_refused(tmp_path, command):
    """The agent must not run without the policy that its owner named."""
    enrolled(tmp_path).close()
    nowhere = tmp_path / "nope.toml"
    done = agent(tmp_path, *command, "--config", str(nowhere))
    assert done.returncode == 1
    assert f"cannot read {nowhere}: no such file" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_mistake_in_the_configuration_is_an_error_of_every_command(tmp_path, command):
    (tmp_path / "agent.toml").write_text("health_s = 60\n\n[policy]\nlog = 'all'\n")
    enrolled(tmp_path).close()
    done = agent(tmp_path, *command)
    assert done.returncode == 1
    assert f"{tmp_path / 'agent.toml'}: unknown key 'policy.log' (line 4)" in done.stderr


def test_a_state_directory_of_a_newer_agent_is_refused_in_one_line(tmp_path):
    store = enrolled(tmp_path)
    store._db.execute("PRAGMA user_version=99")
    store.close()
    done = agent(tmp_path, "status")
    assert done.returncode == 1
    assert "newer agent" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_to_restore_is_not_an_error(tmp_path):
    assert agent(tmp_path, "restore").returncode == 0


def test_restore_without_a_host_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.cli.HOST_WAIT_S", 0.1)
    store = enrolled(tmp_path)
    store.save(committed=committed())
    store.close()
    from agent.cli import main

    assert main(["restore", "--state", str(tmp_path / "state"), "--runtime", str(tmp_path)]) == 1


def committed():
    item = Item(instance="web", target="components/a/web/1.0.0.wasm", length=1, sha256="0" * 64, manifest_sha256="")
    manifest = Manifest(name="web", version="1.0.0", trigger=Http())
    return Committed(item=item, manifest=manifest, generation=3, assignment=4, at=NOW)


def test_status_and_why_tell_the_story(tmp_path):
    store = enrolled(tmp_path)
    step = Transition(
        committed=committed(),
        failure=FailedItem(
            instance="web",
            key="k",
            attempt=0,
            target="components/a/web/2.0.0.wasm",
            code=RejectCode.HASH_MISMATCH,
            message="other bytes",
            at=NOW,
        ),
        report=Report(
            device="crane-0a1b2c3d",
            boot_id="b",
            sequence=0,
            at=NOW,
            assignment=5,
            instance="web",
            target="components/a/web/2.0.0.wasm",
            phase=Phase.FAILED,
            code=RejectCode.HASH_MISMATCH,
            message="other bytes",
            log=("last words",),
        ),
    )
    store.apply(step)
    store.close()
    status = agent(tmp_path, "status")
    assert status.returncode == 0
    assert "runs a/web@1.0.0 since 2026-05-01 12:00:00Z" in status.stdout
    why = agent(tmp_path, "why", "web").stdout
    assert "[hash-mismatch] other bytes" in why
    assert "| last words" in why
    assert "  2026-05-01 12:00:00Z web failed" in why
    assert "a/web@2.0.0 failed" in status.stdout
    assert "components/" not in status.stdout + why
    assert "no automatic retry" in why
    assert "what to do" in why
    facts = json.loads(agent(tmp_path, "why", "--json").stdout)
    assert facts["failed"][0]["code"] == "hash-mismatch"
    assert facts["unsent_reports"] == 1


def test_status_does_not_say_that_an_instance_runs_that_could_not_be_started(tmp_path):
    store = enrolled(tmp_path)
    store.apply(Transition(committed=committed()))
    store.set_problems(["web could not be started: cannot read the artifact"])
    store.close()
    lines = agent(tmp_path, "status").stdout.splitlines()
    assert "  web could not be started: cannot read the artifact" in lines
    assert "  web: does not run; a/web@1.0.0 is committed since 2026-05-01 12:00:00Z" in lines
    assert not [line for line in lines if "web: runs" in line]


def test_a_failure_of_several_attempts_is_one_line_with_a_count(tmp_path):
    store = enrolled(tmp_path)
    for attempt in range(4):
        failure = FailedItem(
            instance="web" if attempt else "api",
            key="k",
            attempt=attempt,
            target="components/a/web/2.0.0.wasm",
            code=RejectCode.NO_SPACE,
            message=f"{7 - attempt} bytes are missing",
            at=NOW + timedelta(hours=attempt),
            retry_at=None if attempt < 3 else NOW.timestamp() + 86_400,
        )
        store.apply(Transition(failure=failure))
    store.close()
    lines = agent(tmp_path, "status").stdout.splitlines()
    failed = [line for line in lines if " failed " in line]
    assert failed == [
        "  api: a/web@2.0.0 failed (no-space): 7 bytes are missing",
        "  web: a/web@2.0.0 failed 3 times, last at 2026-05-01 15:00:00Z (no-space): 4 bytes are missing",
    ]
    assert [line for line in lines if "retry:" in line] == ["      next retry: 2026-05-02 12:00:00Z or later"]
    assert len([line for line in lines if "no automatic retry" in line]) == 1, "of the other instance"
    assert len(json.loads(agent(tmp_path, "status", "--json").stdout)["failed"]) == 4


def test_check_names_the_first_thing_that_fails(tmp_path):
    done = agent(tmp_path, "check", "--json")
    results = json.loads(done.stdout)
    assert done.returncode == 1
    assert [each["ok"] for each in results][:-1] == [True] * (len(results) - 1)
    assert results[-1]["name"] == "identity"
    assert "fleet-agent enroll" in results[-1]["text"]


def enrolled_to_the_full(tmp_path):
    """Enrol a device with keys, certificate and root, whose server and broker do not answer; return its store."""
    store = enrolled(tmp_path)
    directory = tmp_path / "state" / "identity"
    device = ec.generate_private_key(ec.SECP256R1())
    for file, key in (("device.key", device), ("sealing.key", X25519PrivateKey.generate())):
        (directory / file).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "crane-0a1b2c3d")]), datetime.now(UTC)
    certificate = x509.CertificateBuilder(name, name, device.public_key(), 1, now, now + timedelta(days=365))
    for file in ("device.pem", "ca.pem"):
        (directory / file).write_bytes(certificate.sign(device, hashes.SHA256()).public_bytes(Encoding.PEM))
    (directory / "root.json").write_bytes(Repository().files["1.root.json"])
    return store


@pytest.fixture
def systemd(tmp_path):
    """Socket on which programs notify systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(60)
        yield sock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_agent_ends_whatever_it_was_doing(tmp_path, systemd, number):
    """No host, server or broker answers, so the agent is waiting for each of them."""
    enrolled_to_the_full(tmp_path).close()
    places = ("--state", tmp_path / "state", "--runtime", tmp_path / "run", "--config", configuration(tmp_path))
    left = [tmp_path / "state" / place / ".new-00000000-x" for place in ("", "identity", "images")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("what a power cut left half")
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.cli", "run", *map(str, places)],
        env={**os.environ, "NOTIFY_SOCKET": systemd.getsockname()},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert b"READY=1" in systemd.recv(4096)
        assert not any(path.exists() for path in left)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    with alone(tmp_path / "state" / "lock"):
        pass


@pytest.mark.asyncio
async def test_no_task_of_the_agent_runs_once_its_store_is_closed(tmp_path, systemd, monkeypatch):
    """In this process, as at exit Python would cancel the remaining tasks, but after their store is closed."""
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    store = enrolled_to_the_full(tmp_path)
    places = Paths(tmp_path / "state", tmp_path / "run")
    close, test, at_work = store.close, asyncio.current_task(), []

    def closing():
        at_work.append(asyncio.all_tasks() - {asyncio.current_task(), test})
        close()

    monkeypatch.setattr(store, "close", closing)

    enrolled = Enrolled(
        identity=identity.load(places.identity),
        root=(places.identity / "root.json").read_bytes(),
        mac_key=b"k" * 32,
        places=places,
        settings=Settings(),
    )
    reference = ReferenceClock(enrolled.identity.floor)
    daemon = build(enrolled, Database(store), reference, Links.of(enrolled, reference))
    running = asyncio.ensure_future(daemon.run())
    systemd.setblocking(False)
    async with asyncio.timeout(60):
        assert b"READY=1" in await asyncio.get_running_loop().sock_recv(systemd, 4096)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0
    assert at_work == [set()]


def test_every_command_has_help_with_examples():
    for command in ("enroll", "apply", "run", "restore", "status", "why", "check"):
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", command, "--help"], capture_output=True, text=True, check=True
        )
        assert "--state" in done.stdout
        assert f"\n  fleet-agent {command}" in done.stdout or f"sudo fleet-agent {command}" in done.stdout


@pytest.mark.parametrize(
    ("module", "word", "guess"),
    [
        ("agent.cli", "stauts", "did you mean 'status'?"),
        ("agent.cli", "xyz", "there are enroll, "),
        ("agent.host.cli", "chekc", "did you mean 'check'?"),
    ],
)
def test_a_mistyped_command_is_one_line_with_a_guess(module, word, guess):
    done = subprocess.run([sys.executable, "-m", module, word], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"no such command {word!r}; {guess}" in done.stderr


LOADED = "import sys; import {module}; print('\\n'.join(sorted(sys.modules)))"


@pytest.mark.parametrize("module", ["agent.cli", "agent.service"])
def test_the_agent_loads_neither_wasmtime_nor_what_is_heavy(module):
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()}
    assert "agent" in loaded
    assert not loaded & {"wasmtime", "httpx", "rich", "click", "urllib3", "requests", "starlette", "sqlite_utils"}
    # Of the host's package, the agent imports only the protocol and the writer of packets.
    host = {name for name in done.stdout.splitlines() if name.startswith("agent.host.")}
    ipc = {"agent.host.ipc", "agent.host.ipc.framing", "agent.host.ipc.host_api", "agent.host.ipc.packet_writer"}
    assert host == ipc


def test_showing_what_runs_loads_neither_mqtt_nor_tuf():
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module="agent.cli")], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()}
    assert not loaded & {"paho", "tuf", "securesystemslib"}


@pytest.mark.root
def test_commands_run_by_root_leave_no_files_owned_by_root(tmp_path):
    """The agent could not read files that root writes into the state directory."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    enrolled(tmp_path).close()
    for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
        os.chown(path, 23456, 23456)
    done = agent(tmp_path, "status")
    assert done.returncode == 0, done.stderr
    assert {path.stat().st_uid for path in (tmp_path / "state").rglob("*")} == {23456}
