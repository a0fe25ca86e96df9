"""`fleet-agent diagnose` of a device with secrets wherever they could be: the archive has all the rest, bounded."""

import base64
import io
import json
import logging
import os
import stat
import tarfile
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import msgspec
import pytest

from agent import kept_log
from agent.config import Policy
from agent.host.ipc import framing, host_api
from agent.proxy import Proxy
from agent.report import diagnose, status
from agent.update.state import FailedItem, Transition
from agent.update.store import Store
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Manifest, SecretKey
from fleet.protocol.messages import Report
from tests.agent.read_only_places import read_only, unshare
from tests.agent.running_device import RunningDevice, committed_demo
from tests.eventually import eventually

PASSWORD = "correct-horse-battery-staple-9911"
PROXY_PASSWORD = "pr0xy-passw0rd-4711"
TOKEN = "wf1.eyJub3QiOiJhIHJlYWwgdG9rZW4sIGJ1dCBsb25nIn0"
MEMBERS = {
    *("status.txt", "status.json", "device.json", "check.json", "host.json", "configuration.json", "files.txt"),
    *("kernel.txt", "log/agent.log", "log/instances/careless.log"),
}


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RunningDevice(tmp_path_factory.mktemp("device"), "web") as made:
        text = f'[network]\nproxy = "http://user:{PROXY_PASSWORD}@127.0.0.1:1"\n'
        (made.directory / "agent.toml").write_text(text)
        made.start_host()
        assert made.agent("restore").returncode == 0
        tell_secrets(made)
        made.start_agent()
        yield made


def keys(device):
    return {name: (device.state / "identity" / name).read_bytes() for name in ("device.key", "sealing.key", "mac.key")}


def tell_secrets(device):
    """Write secrets to each place that goes into an archive: as a careless component, library or person would."""
    report = Report(
        device="crane-0a1b2c3d",
        boot_id="b",
        sequence=0,
        at=committed_demo()[0].at,
        assignment=1,
        instance="web",
        message=f"cannot reach https://me:{PROXY_PASSWORD}@example.org/ with {TOKEN}",
        code=RejectCode.UNREACHABLE,
        log=(keys(device)["device.key"].decode(), base64.b64encode(keys(device)["mac.key"]).decode()),
    )
    store = Store(device.places.database)
    failure = FailedItem(
        instance="web",
        key="k",
        attempt=0,
        target="t",
        code=RejectCode.UNREACHABLE,
        message=f"token {TOKEN}",
        at=report.at,
    )
    store.apply(Transition(report=report, failure=failure))
    store.set_problems([f"key {keys(device)['mac.key'].hex()}"])
    store.close()
    log = device.places.log
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        for name, key in keys(device).items():
            body = b"".join(line for line in key.splitlines() if not line.startswith(b"---"))
            for each in (key, body, key.hex().encode(), base64.b64encode(key), base64.urlsafe_b64encode(key)):
                file.write(b"%s: %s\n" % (name.encode(), each))
    secrets(device)


def secrets(device):
    """Run a component that logs its secret."""
    manifest = Manifest(
        name="careless",
        version="1.0.0",
        trigger=Http(),
        grants=Grants(interfaces=("wasi:logging", "wasi:config")),
        secrets={"db-password": SecretKey()},
    )
    run = host_api.Run(
        instance="careless",
        generation=1,
        target="components/main/careless/1.0.0.wasm",
        manifest=manifest,
        grants=manifest.grants,
        limits=manifest.limits,
        config={"api-key": PASSWORD},
        secrets=("db-password",),
    )
    from agent.host.engine.runtime import Engine

    text = (RunningDevice.guests / "secret.wat").read_text()
    image = Engine(fuel=False).compile(text)
    value = json.dumps({"db-password": PASSWORD}).encode()
    with host_api.new_socket() as sock:  # one connection: the host holds secrets as long as the agent is there
        sock.settimeout(60)
        sock.connect(str(device.places.host_socket))
        for request, data in (
            (host_api.PutSecrets(id=1, instance="careless", generation=1), value),
            (host_api.Start(id=2, run=run), image),
        ):
            fd = framing.constant_memfd("data", lambda fd, data=data: os.write(fd, data))
            host_api.send(sock, request, fd)
            os.close(fd)
            reply = host_api.receive_from_host(sock)
            assert not isinstance(reply, host_api.Failed), reply
    assert device.answers("careless") == 200
    kept = device.directory / "host" / "logs" / "careless.log"
    eventually(kept.exists, "the host has written the log to the disk")


def unpacked(path):
    with tarfile.open(path) as archive:
        return {each.name.removeprefix("diagnose/"): archive.extractfile(each).read() for each in archive.getmembers()}


def made(device, name, **more):
    path = device.directory / name
    done = device.agent("diagnose", "-o", str(path), "--host-state", str(device.directory / "host"), **more)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return unpacked(path)


def no_secret_in(device, members):
    """No secret is there, in any of the forms in which it could have been written."""
    wanted = {PASSWORD.encode(), PROXY_PASSWORD.encode(), TOKEN.encode(), b"PRIVATE KEY"}
    for key in keys(device).values():
        body = b"".join(line for line in key.splitlines() if not line.startswith(b"---"))
        for each in (key, body):
            forms = {each, each.hex().encode(), base64.b64encode(each), base64.urlsafe_b64encode(each).rstrip(b"=")}
            wanted |= forms | {each[:24], each[-24:]}
    found = {(name, secret) for name, data in members.items() for secret in wanted if secret in data}
    assert found == set()


def test_the_archive_has_everything_but_secrets(device):
    members = made(device, "device.tar.gz")
    assert members.keys() >= MEMBERS
    no_secret_in(device, members)
    assert b"web: runs main/hello@1.0.0" in members["status.txt"]
    assert b"cannot reach https://[secret]@example.org" in members["status.txt"]
    assert b"agent of crane-0a1b2c3d" in members["log/agent.log"]
    assert json.loads(members["configuration.json"])["network"]["proxy"] == "http://127.0.0.1:1"
    assert "web" in {each["instance"] for each in json.loads(members["host.json"])[0]["running"]}
    assert {each["name"] for each in json.loads(members["check.json"])} >= {"machine", "identity", "disk"}
    assert b"identity/device.key" in members["files.txt"], "its name, size and mode"
    assert sum(map(len, members.values())) <= diagnose.ALL_MAX_BYTES


@pytest.mark.skipif(not unshare(), reason="no mount namespaces for this user")
def test_an_archive_of_a_device_with_a_read_only_disk(device, tmp_path):
    prefix, device.prefix = device.prefix, read_only(device.state)
    try:
        members = made(device, "read-only.tar.gz")
    finally:
        device.prefix = prefix
    assert b"read-only file system" in members["status.txt"]
    no_secret_in(device, members)


def test_an_archive_of_a_device_without_host_and_history(tmp_path):
    with RunningDevice(tmp_path) as bare:
        members = made(bare, "bare.tar.gz")
        assert b"cannot be read" in members["host.json"]
        no_secret_in(bare, members)


@pytest.mark.parametrize(
    "address", ["user:{}@127.0.0.1:1", "http://user:{}'@127.0.0.1:1", "http://user:{}%40@127.0.0.1:1", "http://{}@h:1"]
)
def test_a_proxys_password_is_in_no_member_however_it_was_written(tmp_path, address):
    proxy = address.format(PROXY_PASSWORD)
    with RunningDevice(tmp_path, "web") as bare:
        (tmp_path / "agent.toml").write_text(f'[network]\nproxy = "{proxy}"\n')
        bare.places.log.parent.mkdir()
        password = Proxy.parse(proxy)
        bare.places.log.write_text(f"a library said: {proxy}, {password.credentials}, and no harm in it")
        members = made(bare, "device.tar.gz")
        no_secret_in(bare, members)
        assert json.loads(members["configuration.json"])["network"]["proxy"].startswith("http://")
        assert password.credentials.encode() not in members["log/agent.log"]
        assert b"and no harm in it" in members["log/agent.log"]


def test_an_archive_over_an_older_file_is_for_its_owner_only(tmp_path):
    with RunningDevice(tmp_path) as bare:
        (tmp_path / "device.tar.gz").touch(mode=0o644)
        assert made(bare, "device.tar.gz")


def test_an_archive_goes_into_a_file_and_changes_no_device(tmp_path):
    _, terminal = os.openpty()
    with RunningDevice(tmp_path) as bare:
        mode = os.fstat(terminal).st_mode
        for name, why in ((os.ttyname(terminal), "not a regular file"), ("-", "a file's name")):
            done = bare.agent("diagnose", "-o", name)
            assert (done.returncode, done.stdout, why in done.stderr) == (1, "", True), done
        assert os.fstat(terminal).st_mode == mode
        assert not Path("-").exists()


def test_a_log_that_is_rotated_away_meanwhile_does_not_end_the_archive(tmp_path):
    with RunningDevice(tmp_path) as bare:
        logs = tmp_path / "host" / "logs"
        logs.mkdir(parents=True)
        (logs / "web.log").write_text("a line")
        (logs / "gone.log").symlink_to(tmp_path / "nowhere")
        members = made(bare, "device.tar.gz")
        assert members["log/instances/web.log"] == b"a line"
        assert b"cannot be read" in members["log/instances/gone.log"]


def test_an_archive_is_bounded(tmp_path, monkeypatch):
    sources = [diagnose.Source(f"{name}.txt", 600, lambda: b"x" * 5000 + b"end") for name in "abc"]
    monkeypatch.setattr(diagnose, "_sources", lambda _: iter(sources))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        subject = SimpleNamespace(as_owner=nullcontext, extent=diagnose.Extent(all_bytes=1000))
        said = list(diagnose._members(subject, archive, []))
    assert said[0] == "a.txt: 600 bytes"
    assert said[-1].endswith("b.txt, c.txt")


def test_a_private_key_is_masked_where_the_bound_cuts_it(tmp_path, monkeypatch):
    pem = b"-----BEGIN PRIVATE KEY-----\n" + b"MIGHAgEA" * 40 + b"\n-----END PRIVATE KEY-----\nend"
    monkeypatch.setattr(diagnose, "_sources", lambda _: iter([diagnose.Source("a.txt", 200, lambda: pem)]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        list(diagnose._members(SimpleNamespace(as_owner=nullcontext, extent=diagnose.Extent()), archive, []))
    assert b"MIGHAgEA" not in buffer.getvalue()
    assert b"[secret]\nend" in buffer.getvalue()


def test_a_secret_is_masked_in_each_form_in_which_a_text_may_have_it():
    secret = b'tr0ub4dor "&3/'
    texts = [secret, secret.hex().encode(), quote(secret).encode(), quote(secret, safe="").encode()]
    texts += [quote_plus(secret).encode(), json.dumps(secret.decode()).encode()]
    texts += [
        encode(b"x" * shift + secret) for shift in range(3) for encode in (base64.b64encode, base64.urlsafe_b64encode)
    ]
    for text in texts:
        assert b"[secret]" in diagnose.masked(b"before " + text + b" after", list(diagnose._forms(secret))), text
    assert diagnose.masked(b"tr0ub4dor", list(diagnose._forms(secret))) == b"tr0ub4dor"


@pytest.mark.parametrize("shift", range(3))
def test_a_token_is_masked_in_base64_and_hex_although_the_device_knows_it_no_more(shift):
    for text in (base64.b64encode(b"x" * shift + TOKEN.encode()), TOKEN.encode().hex().encode()):
        assert text[8:-8] not in diagnose.masked(b"before " + text, [])


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(), "no line of an instance"),
        (Policy(diagnose="all"), "errors and the last lines of instances alone"),
        (Policy(diagnose="all", logs="off"), "no line of an instance"),
        (Policy(diagnose="all", logs="all"), ""),
    ],
)
def test_an_operator_has_what_the_owners_policy_allows(policy, said):
    extent = diagnose.Extent.allowed(policy)
    assert said in extent.reason
    assert bool(extent.reason) == bool(said)
    assert extent.more == (policy.diagnose == "all")
    assert (extent.all_bytes, diagnose.Extent().all_bytes) == (4 << 20, 24 << 20)
    report = Report(device="d", boot_id="b", sequence=1, at=committed_demo()[0].at, assignment=1, log=("error one",))
    told = diagnose._told(msgspec.structs.replace(status.unknown("x"), timeline=(report,)), extent)
    assert told.timeline[0].log == (("error one",) if extent.more and policy.logs != "off" else ())


@pytest.mark.root
def test_files_of_the_agents_user_are_read_as_that_user():
    """A link in the place of its log leads to no file of root's."""
    # every user may search it, which is not so in pytest's own
    with tempfile.TemporaryDirectory(prefix="wf-") as place, RunningDevice(Path(place), "web") as device:
        Path(place).chmod(0o711)
        hidden = Path(place) / "shadow"
        hidden.write_text("only for root")
        hidden.chmod(0o600)
        device.places.log.parent.mkdir()
        device.places.log.symlink_to(hidden)
        for path in (device.state, *device.state.rglob("*")):
            os.lchown(path, 54321, 54321)
        members = made(device, "device.tar.gz")
        assert b"only for root" not in b"".join(members.values())
        assert b"cannot be read: PermissionError" in members["log/agent.log"]
        owners = {path.lstat().st_uid for path in device.state.rglob("*")}
        assert owners == {54321}, "nothing of root's is left where the agent has to write"


def test_the_agents_log_is_kept_within_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_log, "KEPT_BYTES", 4096)
    handler = kept_log.KeptLog(tmp_path / "log" / "agent.log")
    for number in range(200):
        handler.handle(logging.LogRecord("agent", logging.INFO, "", 0, f"record {number}\x1b[2J", (), None))
    handler.close()
    files = sorted((tmp_path / "log").iterdir())
    assert [path.name for path in files] == ["agent.log", "agent.log.1"]
    assert sum(path.stat().st_size for path in files) <= 4096
    text = files[0].read_text()
    assert "record 199\\x1b[2J" in text
    assert all(line[10] == "T" and line[19] == "Z" for line in text.splitlines())
    (tmp_path / "file").write_text("")
    broken = kept_log.KeptLog(tmp_path / "file" / "agent.log")
    broken.handle(logging.LogRecord("agent", logging.INFO, "", 0, "lost", (), None))


@pytest.mark.parametrize("state", ["before enrolment", "no directory", "damaged store"])
def test_an_archive_of_a_device_without_a_status(tmp_path, state):
    with RunningDevice(tmp_path, "web") as device:
        if state == "damaged store":
            (device.state / "store.db").write_bytes(b"no database" * 1000)
        else:
            (device.state / "identity" / "enrolled.json").unlink()
        if state == "no directory":
            device.state.rename(tmp_path / "elsewhere")
        done = device.agent("diagnose", "-o", str(tmp_path / "device.tar.gz"))
        assert done.returncode == 0, done.stderr
        said = "store.db" if state == "damaged store" else "this device is not enrolled"
        assert said in done.stdout
        with tarfile.open(tmp_path / "device.tar.gz") as archive:
            found = {each.name.removeprefix("diagnose/"): archive.extractfile(each).read() for each in archive}
        assert said in found["status.txt"].decode()
        assert found.keys() >= {"status.json", "device.json", "check.json", "configuration.json"}
        assert json.loads(found["device.json"])["meminfo"]
