"""Secrets in the host: given only to the instance's workers, and masked in logs and reports."""

import base64
import json
import os
import urllib.parse
from pathlib import Path

import pytest
import support
from host_processes import lanes_of
from support import Grants

from agent.host.ipc import host_api, worker_api
from agent.host.supervisor.resources import FIRST
from agent.host.worker.worker import Redactor

PASSWORD = "correct horse battery staple"
GRANTS = Grants(interfaces=("wasi:config/store", "wasi:logging/logging"))


def fnv1a(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def entrust(host, instance, generation, secrets):
    """What the agent does before it starts an instance."""
    fd = support.sealed(json.dumps(secrets).encode())
    try:
        return host.ask(host_api.PutSecrets, fd, instance=instance, generation=generation)
    finally:
        os.close(fd)


def started(host, instance="web", generation=1, value=PASSWORD, *, guest="secret", **more):
    port = support.free_port()
    entrust(host, instance, generation, {"db-password": value})
    run = support.a_run(instance, generation, port=port, grants=GRANTS, secrets=("db-password",), **more)
    reply = host.start(guest, run)
    assert isinstance(reply, host_api.Started), reply
    return port


def test_a_guest_reads_its_secret_like_configuration(host):
    port = started(host)
    assert support.http(port)[2].decode() == fnv1a(PASSWORD)


def test_logs_and_traps_do_not_contain_the_value(host):
    port = started(host)
    support.http(port)
    support.http(port, "GET /trap HTTP/1.1\r\nhost: x\r\n\r\n")
    trapped = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert trapped.log[0] == "error db-password: redacted"
    said = host.ask(host_api.Logs, instance="web").lines
    assert PASSWORD not in str((trapped, said))
    assert sum("redacted" in line for line in said) == 2


def test_a_rotated_secret_comes_with_a_new_generation_and_a_way_back_has_the_former(host):
    port = started(host)
    assert support.http(port)[2].decode() == fnv1a(PASSWORD)
    entrust(host, "web", 2, {"db-password": "a newer password"})
    run = support.a_run("web", 2, port=port, grants=GRANTS, secrets=("db-password",))
    assert isinstance(host.start("secret", run), host_api.Started)
    assert support.http(port)[2].decode() == fnv1a("a newer password")
    host.ask(host_api.Revert, instance="web", generation=2)
    assert support.http(port)[2].decode() == fnv1a(PASSWORD)


def test_a_worker_that_dies_is_replaced_by_one_with_the_secret(host):
    port = started(host)
    host.ask(host_api.Restart, instance="web")
    assert support.http(port)[2].decode() == fnv1a(PASSWORD)


def test_an_instance_is_not_started_without_its_secrets(host):
    run = support.a_run("web", 1, port=support.free_port(), grants=GRANTS, secrets=("db-password",))
    reply = host.start("secret", run)
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed")
    assert "its secrets were not sent" in reply.message
    # nor with those of another generation, or of another instance
    entrust(host, "web", 7, {"db-password": PASSWORD})
    assert isinstance(host.start("secret", run), host_api.Failed)
    entrust(host, "sibling", 1, {"db-password": PASSWORD})
    assert isinstance(host.start("secret", run), host_api.Failed)


@pytest.fixture
def own_host(tmp_path):
    """A host of this test's own, with uids that no other host on this machine gives: their limits count together."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "uids.json").write_text(json.dumps({"nobody": FIRST + 1000 + os.getpid() % 60_000}))
    made = support.Host(tmp_path)
    yield made
    made.close()


def memfds(host):
    """How many memfds the supervisor holds, but for the figures of its workers."""
    found = Path(f"/proc/{host.process.pid}/fd").iterdir()
    return sum("memfd:image" in str(fd.readlink()) for fd in found if fd.is_symlink())


def test_an_instance_with_secrets_shares_no_worker(host):
    host.start("hello", support.a_run("neighbour", 1, share_worker=True))
    before = set(lanes_of(host))
    port = started(host, share_worker=True)
    assert len(set(lanes_of(host)) - before) == 1, "a lane of its own"
    host.start("hello", support.a_run("another", 1, share_worker=True))
    assert len(lanes_of(host)) == 2
    assert support.http(port)[2].decode() == fnv1a(PASSWORD)


def test_secrets_without_a_start_are_dropped(own_host):
    host = own_host
    for generation in range(1, 20):
        entrust(host, "web", generation, {"db-password": PASSWORD})
    assert memfds(host) == 1, "the newest of an instance alone is held"
    host.start("hello", support.a_run("web", 20))
    host.ask(host_api.Stop, instance="web")
    assert memfds(host) == 0
    for number in range(64):
        assert isinstance(entrust(host, f"i{number}", 1, {}), host_api.Done)
    refused = entrust(host, "one-more", 1, {})
    assert (type(refused), refused.code) == (host_api.Failed, "too-large")
    host.sock.close()
    host.sock = host.connect()
    host.ask(host_api.Hello)
    assert memfds(host) == 0, "whoever entrusted them is gone"


@pytest.mark.root
def test_no_process_of_the_host_but_its_own_worker_has_the_value(own_host):
    host = own_host
    # A sibling before it and one after it, so that whatever a fork would inherit would be inherited here.
    host.start("hello", support.a_run("before", 1))
    strangers = set(lanes_of(host))
    port = started(host)
    (lane,) = set(lanes_of(host)) - strangers
    host.start("hello", support.a_run("after", 1))
    support.http(port)
    everyone = descendants(host.process.pid)
    assert {lane, *strangers} < set(everyone)
    for pid in [host.process.pid, *everyone]:
        for name in ("environ", "cmdline"):
            assert PASSWORD.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        if pid != lane:
            assert not support.remembers(pid, PASSWORD.encode()), f"process {pid} has the value"
    assert support.remembers(lane, PASSWORD.encode()), "this way of looking would have found it"
    assert PASSWORD not in Path(host.stderr.name).read_text()
    for file in (path for path in host.state.rglob("*") if path.is_file()):
        assert PASSWORD.encode() not in file.read_bytes(), file


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for word in (task / "children").read_text().split():
            found += [int(word), *descendants(int(word))]
    return found


# -- redaction


@pytest.mark.parametrize(
    "said",
    [
        PASSWORD,
        f"cannot log in with {PASSWORD}!",
        json.dumps({"password": PASSWORD}),
        f"GET /?key={urllib.parse.quote(PASSWORD)}",
        f"GET /?key={urllib.parse.quote_plus(PASSWORD)}",
        f"header {base64.b64encode(PASSWORD.encode()).decode()}",
        PASSWORD.encode().hex(),
        PASSWORD.encode().hex().upper(),
    ],
)
def test_a_value_is_known_in_the_forms_in_which_programs_print_it(said):
    text = Redactor([PASSWORD]).text(said)
    assert "redacted" in text
    for form in (PASSWORD, urllib.parse.quote(PASSWORD), PASSWORD.encode().hex()):
        assert form not in text


def test_a_key_of_several_lines_is_known_by_each_line():
    lines = ["-----BEGIN KEY-----", "MC4CAQAwBQYDK2VwBCIEIG", "5bXlwcml2YXRla2V5", "-----END KEY-----"]
    redact = Redactor(["\n".join(lines) + "\n"])
    for line in lines:
        assert redact.text(f"read {line}") == "read redacted"
    assert redact.text("\n".join(lines)) == "redacted"


def test_a_value_within_another_leaves_nothing_of_the_longer():
    redact = Redactor(["pass", "password-of-the-day"])
    assert redact.text("password-of-the-day") == "redacted"


def test_characters_with_a_meaning_in_patterns_have_none_here():
    assert Redactor(["a.c*(d"]).text("abcd a.c*(d") == "abcd redacted"


def test_every_text_from_a_worker_is_redacted():
    redactor = Redactor([PASSWORD])
    told = [
        worker_api.Line(text=PASSWORD),
        worker_api.Fault(message=PASSWORD),
        worker_api.Refused(code="start-failed", message=PASSWORD),
        worker_api.Checked(id=1, problem=PASSWORD),
        worker_api.Ran(id=1, problem=PASSWORD),
        worker_api.StateSaved(problem=PASSWORD),
        worker_api.StateLoaded(problem=PASSWORD),
    ]
    for message in told:
        assert PASSWORD not in str(redactor.message(message)), message
    quiet = [worker_api.Checked(id=1), worker_api.Ran(id=1), worker_api.Probed(id=1), worker_api.Busy()]
    assert [redactor.message(message) for message in quiet] == quiet
    assert Redactor([]).message(told[0]) == told[0]
