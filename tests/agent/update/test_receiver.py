"""Receiver of assignments: real signatures, refusals reported once, freshness without a clock."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from agent.config import Policy
from agent.link.bundle import Bundle
from agent.link.https import FetchError
from agent.report import status
from agent.update import receiver as desired_module
from agent.update import restore
from agent.update.receiver import ARRIVALS_MAX, AssignmentArrived, BundleArrived, FreshnessArrived, PollAnswered
from fleet.protocol.codes import RejectCode
from tests.agent.desired_case import NOW, Case
from tests.eventually import eventually_async


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.mark.asyncio
async def test_an_assignment_is_persisted_before_it_is_acted_on(case):
    seen = []

    async def desire(assignment):
        seen.append((assignment.version, case.store.counter("accepted")))

    case.deployer.desire = desire
    await case.judge(case.server.assignment(3))
    assert seen == [(3, 3)]


@pytest.mark.asyncio
async def test_the_same_assignment_over_both_channels_is_handled_once(case):
    envelope = case.server.assignment(3)
    await case.judge(envelope, envelope)
    assert case.deployer.versions == [3]


@pytest.mark.asyncio
async def test_an_assignment_older_than_the_last_commit_is_refused_after_the_database_was_lost(case):
    await case.judge(case.server.assignment(3))
    runset, key = case.directory / "runset.json", b"k" * 32
    restore.write_runset(runset, (), case.store.facts(), key)
    case.lose_database()
    restore.take_over(case.store, runset, key)
    case.start(case.server)
    await case.judge(case.server.assignment(2))
    assert case.codes() == [RejectCode.ROLLBACK]
    await case.judge(case.server.assignment(4))
    restore.take_over(case.store, runset, key)
    assert case.store.facts().assignment.version == 4, "taken over once"
    assert case.deployer.versions == [3, 4]


REFUSED = [
    ("another device's", {"device": "lift-0a1b2c3d"}, RejectCode.WRONG_DEVICE),
    ("another fleet's", {"fleet": "pirates"}, RejectCode.WRONG_FLEET),
    ("an older one", {"version": 2}, RejectCode.ROLLBACK),
    ("the same version with other words", {"version": 5, "keep_data": ("x",)}, RejectCode.EQUIVOCATION),
    (
        "one past its date",
        {"issued": NOW - timedelta(hours=2), "expires": NOW - timedelta(hours=1)},
        RejectCode.EXPIRED,
    ),
    ("one that its publisher signed, and not the director", {"signer": "main"}, RejectCode.UNSIGNED),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("what", "change", "code"), REFUSED, ids=[row[0] for row in REFUSED])
async def test_a_refusal_is_reported_once_and_changes_nothing(case, what, change, code):
    await case.judge(case.server.assignment(5))
    bad = case.server.assignment(**({"version": 6} | change))
    await case.judge(bad, bad)
    assert case.deployer.versions == [5]
    assert case.store.counter("accepted") == 5
    assert case.codes() == [code]
    assert case.problems.text("assignment")
    # A valid assignment ends the problem.
    await case.judge(case.server.assignment(7))
    assert case.deployer.versions == [5, 7]
    assert not case.problems.text("assignment")


@pytest.mark.asyncio
async def test_deploys_of_a_time_when_the_device_was_off_are_no_alarm_in_any_order(case):
    """The broker kept each, HTTPS brings the newest first."""
    await case.desired.new_nonce()  # as at each connection
    old = [case.server.assignment(version) for version in (1, 2)]
    case.server.envelope = case.server.assignment(3)
    await case.poll()
    await case.judge(*old, case.server.envelope)
    assert case.deployer.versions == [3]
    assert case.codes() == []
    assert case.problems.texts() == []


@pytest.mark.asyncio
async def test_an_assignment_that_https_overtook_is_no_alarm(case):
    slow = case.server.assignment(4)
    case.server.envelope = case.server.assignment(5)
    await case.poll()
    await case.judge(slow)
    assert (case.codes(), case.problems.texts()) == ([], [])


@pytest.mark.asyncio
async def test_an_assignment_that_the_device_had_before_is_an_alarm_at_any_time(case):
    """Nothing honest delivers it again behind a newer one."""
    await case.desired.new_nonce()
    old = case.server.assignment(3)
    await case.judge(old, case.server.assignment(4), old)
    assert case.codes() == [RejectCode.ROLLBACK]


@pytest.mark.asyncio
async def test_an_assignment_from_before_the_one_at_the_connection_is_an_alarm(case):
    await case.judge(case.server.assignment(5))
    await case.desired.new_nonce()
    case.server.envelope = case.server.assignment(7)
    await case.poll()
    await case.judge(case.server.assignment(6), case.server.assignment(4))
    assert case.codes() == [RejectCode.ROLLBACK]


@pytest.mark.asyncio
async def test_what_the_broker_kept_while_https_brought_the_same_is_no_alarm(case, monkeypatch):
    """As when a device comes back from a network that blocks MQTT."""
    kept = [case.server.assignment(version) for version in (5, 6, 7)]
    with monkeypatch.context() as patch:
        patch.setattr(desired_module, "REORDERED_S", 0.0)  # long ago
        case.server.envelope = case.server.assignment(4)
        await case.poll()
        await case.judge(*kept)
    case.presence.connected = True
    await case.desired.new_nonce()
    await case.judge(*kept)
    assert (case.codes(), case.problems.texts()) == ([], [])
    await case.judge(kept[0])
    assert case.codes() == [RejectCode.ROLLBACK]


@pytest.mark.asyncio
async def test_an_older_assignment_long_after_a_connection_is_one(case, monkeypatch):
    monkeypatch.setattr(desired_module, "REORDERED_S", 0.0)
    await case.desired.new_nonce()
    await case.judge(case.server.assignment(3), case.server.assignment(2))
    assert case.codes() == [RejectCode.ROLLBACK]


@pytest.mark.parametrize("change", [{"device": "lift-0a1b2c3d"}, {"signer": "main"}, {"fleet": "pirates"}])
@pytest.mark.asyncio
async def test_what_is_not_the_directors_word_to_this_device_is_refused_at_any_time(case, change):
    await case.desired.new_nonce()
    await case.judge(case.server.assignment(3), case.server.assignment(2, **change))
    assert len(case.codes()) == 1


@pytest.mark.asyncio
async def test_the_servers_window_holds_for_polls(case, monkeypatch):
    """However often somebody asks for a poll: the server is busy."""
    asked = []
    monkeypatch.setattr(desired_module, "spread", lambda *seconds: asked.append(seconds) or 0.0)
    busy = FetchError(RejectCode.UNREACHABLE, "busy", status=503, retry_after_s=120.0)
    case.server.failure = busy
    task = asyncio.create_task(case.desired.run())
    case.desired.refresh()
    await eventually_async(lambda: len(asked) >= 2, "two polls were put off")
    task.cancel()
    assert asked[0] == (0.0, 120.0)


@pytest.mark.parametrize("item", [PollAnswered(b"{}", b"", "n"), BundleArrived(), AssignmentArrived(b"{}")])
@pytest.mark.asyncio
async def test_a_fault_while_an_input_is_handled_ends_nothing(case, monkeypatch, caplog, item):
    async def broken(_item):
        raise ValueError("a fault of our own")

    sound = case.desired._handle
    monkeypatch.setattr(case.desired, "_handle", broken)
    case.server.bundle = Bundle(case.directory)
    await case.work(item)
    assert "dropped" in caplog.text
    assert (case.directory / "outcome.json").exists() == isinstance(item, BundleArrived), (
        "whoever applied a bundle is told"
    )
    monkeypatch.setattr(case.desired, "_handle", sound)
    await case.judge(case.server.assignment(3))
    assert case.deployer.versions == [3]


@pytest.mark.asyncio
async def test_a_revocation_is_told_until_the_server_takes_the_device_back(case):
    body = b'{"type": "revoked", "title": "crane is revoked", "status": 403}'
    case.server.failure = FetchError(RejectCode.UNREACHABLE, "x", status=403, body=body)
    await case.poll()
    assert "the fleet has revoked this device" in case.problems.text("server")
    case.server.failure = None
    case.server.envelope = case.server.assignment(3)
    await case.poll()
    assert case.problems.texts() == []


@pytest.mark.asyncio
async def test_data_that_is_not_an_envelope(case):
    await case.judge(b"", b"{}", b"x" * 300_000)
    assert case.codes() == [RejectCode.MALFORMED, RejectCode.MALFORMED, RejectCode.TOO_LARGE]


@pytest.mark.asyncio
async def test_metadata_with_a_bad_signature_is_refused_with_its_code(case):
    await case.judge(case.server.assignment(1))
    case.server.files["timestamp.json"] = case.server.files["timestamp.json"].replace(b'"version":1', b'"version":2')
    second = case.server.assignment(2)
    await case.judge(second)
    assert case.codes() == [RejectCode.UNSIGNED]
    assert case.deployer.versions == [1]
    # The server learns which version was refused; the number is not trusted, but can be compared.
    [report] = case.store.history()
    assert (report.assignment, report.refused) == (1, 2)
    assert report.refused_sha256 == hashlib.sha256(second).hexdigest()


@pytest.mark.asyncio
async def test_an_unreachable_server_is_not_a_refusal(case):
    case.server.reachable = False
    await case.judge(case.server.assignment(1))
    assert case.codes() == []
    assert "cannot be fetched" in case.problems.text("assignment")


@pytest.mark.asyncio
async def test_a_flood_from_the_broker_is_bounded_and_https_is_polled_instead(case, monkeypatch):
    later = []
    monkeypatch.setattr(case.desired, "refresh_later", later.append)
    for _ in range(ARRIVALS_MAX + 3):
        case.desired.post(FreshnessArrived(b"{}"))
    assert case.desired.inbox.qsize() == ARRIVALS_MAX
    assert len(later) == 3


@pytest.mark.asyncio
async def test_without_a_clock_a_freshness_statement_is_needed(tmp_path):
    case = Case(tmp_path, clock_set=False)
    envelope = case.server.assignment(4)
    case.answer = lambda nonce: case.server.fresh(nonce, envelope)
    await case.judge(envelope)
    assert case.deployer.versions == [4]
    assert len(case.nonces) == 1


@pytest.mark.asyncio
async def test_a_silent_broker_that_freezes_a_device_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(desired_module, "FRESH_S", 0.05)
    case = Case(tmp_path, clock_set=False)
    await case.judge(case.server.assignment(4))
    assert case.deployer.versions == [], "it is accepted, and not acted on"
    assert case.store.counter("accepted") == 4
    assert "not proved to be current" in case.problems.text("fresh")


@pytest.mark.asyncio
async def test_a_repeated_assignment_does_not_wait_longer_for_its_statement(tmp_path, monkeypatch):
    """Otherwise a broker that replays it again and again could keep the device waiting without a report."""
    monkeypatch.setattr(desired_module, "FRESH_S", 0.2)
    case = Case(tmp_path, clock_set=False)
    envelope = case.server.assignment(4)
    await case.work(*[AssignmentArrived(envelope)] * 5)
    assert len(case.nonces) == 1
    assert "not proved to be current" in case.problems.text("fresh")


@pytest.mark.asyncio
async def test_a_development_device_acts_and_reports_the_missing_statement(tmp_path, monkeypatch):
    monkeypatch.setattr(desired_module, "FRESH_S", 0.05)
    case = Case(tmp_path, clock_set=False, strict=False)
    await case.judge(case.server.assignment(4))
    assert case.deployer.versions == [4]
    assert case.problems.text("fresh")


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["replayed", "about another"])
async def test_a_freshness_statement_is_valid_for_a_single_nonce_and_assignment(tmp_path, monkeypatch, what):
    monkeypatch.setattr(desired_module, "FRESH_S", 0.2)
    case = Case(tmp_path, clock_set=False)
    old, newer = case.server.assignment(4), case.server.assignment(5)
    case.answer = lambda nonce: (
        case.server.fresh("0" * 32, old) if what == "replayed" else case.server.fresh(nonce, newer)
    )
    await case.judge(old)
    assert case.deployer.versions == []


@pytest.mark.asyncio
async def test_the_time_floor_rises_with_accepted_documents_and_never_falls(case):
    await case.judge(case.server.assignment(1))
    assert case.clock.floor == NOW
    assert case.store.facts().floor == NOW
    assert case.trust.now() >= NOW


@pytest.mark.asyncio
async def test_the_accepted_assignment_is_resumed_after_a_restart(case, tmp_path):
    await case.judge(case.server.assignment(4))
    await case.desired.resume()
    assert case.deployer.versions == [4, 4]


@pytest.mark.asyncio
async def test_a_revocation_applies_even_with_a_refused_assignment(case):
    committed = case.server.publish(b"bytes")
    case.store.save(committed=committed)
    await case.judge(case.server.assignment(1))
    assert case.deployer.doubts == ()

    # The publisher revokes it; the server has no new assignment, and sends a forged one.
    case.server.revoke()
    await case.judge(case.server.assignment(2, signer="main"))
    [doubt] = case.deployer.doubts
    assert (doubt.instance, doubt.code) == ("web", RejectCode.REVOKED)


@pytest.mark.parametrize(
    ("policy", "denied"),
    [(Policy(interfaces=(), ports=("80",)), "wasi:clocks"), (Policy(ports=("8080",)), "port 80")],
)
@pytest.mark.asyncio
async def test_the_owners_policy_applies_without_a_network(tmp_path, policy, denied):
    case = Case(tmp_path, policy=policy)
    committed = case.server.publish(b"bytes")
    on_a_port = msgspec.structs.replace(committed, item=msgspec.structs.replace(committed.item, port=80))
    case.store.save(committed=on_a_port)
    case.server.reachable = False
    await case.desired.resume()
    [doubt] = case.deployer.doubts
    assert doubt.code is RejectCode.GRANT_DENIED
    assert doubt.message.endswith(f"policy does not allow {denied}")


@pytest.mark.asyncio
async def test_an_expired_repository_stops_updates_but_no_running_component(case, monkeypatch):
    case.store.save(committed=case.server.publish(b"bytes"))
    await case.judge(case.server.assignment(1))
    # A year later, no metadata has been renewed.
    monkeypatch.setattr(case.trust, "now", lambda: NOW + timedelta(days=800))
    await case.judge(case.server.assignment(2, expires=NOW + timedelta(days=900)))
    assert case.deployer.versions == [1]
    assert case.deployer.doubts == ()
    assert case.codes() == [RejectCode.EXPIRED]
    told = "\n".join(status.format_status(status.read_status(case.identity, case.store)))
    assert "no updates until the metadata is renewed; running components are not affected" in told
    assert "web: runs" in told


@pytest.mark.parametrize("replay", ["", "0" * 32], ids=["honest", "replayed"])
@pytest.mark.asyncio
async def test_without_mqtt_and_clock_freshness_statements_come_over_https(tmp_path, monkeypatch, replay):
    monkeypatch.setattr(desired_module, "FRESH_S", 0.05)
    case = Case(tmp_path, clock_set=False)
    case.presence.reachable = False  # the broker is unavailable
    case.server.envelope, case.server.replay = case.server.assignment(4), replay
    await case.poll()
    assert case.store.counter("accepted") == 4
    assert case.deployer.versions == ([] if replay else [4])
    assert ("not proved to be current" in case.problems.text("fresh")) == bool(replay)


@pytest.mark.asyncio
async def test_a_broker_that_withholds_assignments_is_reported(case):
    """Freeze by a silent broker: it answers pings, but delivers nothing."""

    async def asked(version, **ago):
        case.server.envelope = case.server.assignment(version, issued=datetime.now(UTC) - timedelta(**ago))
        await case.poll()

    case.presence.connected = True
    await asked(1, seconds=5)
    assert not case.problems.text("broker"), "it may be a moment late"
    await asked(2, minutes=10)
    assert "the broker withheld assignment 2" in case.problems.text("broker")
    assert case.deployer.versions == [1, 2], "and it is carried out all the same"
    await case.poll()
    assert case.problems.text("broker")
    await case.judge(case.server.assignment(3))
    assert not case.problems.text("broker")
    case.presence.connected = False
    await asked(4, minutes=10)
    assert not case.problems.text("broker"), "one that is away keeps nothing back"


@pytest.mark.asyncio
async def test_an_unreachable_server_is_polled_again_soon_and_then_less_often(case, monkeypatch):
    """Devices reconnect to a rebuilt server within seconds, not at their next regular poll."""
    waits = []

    case.server.reachable = False
    ask = case.desired.poll

    async def counted():
        waits.append(1)
        if len(waits) == 4:
            case.server.reachable = True
            case.server.envelope = case.server.assignment(1)
        return await ask()

    monkeypatch.setattr(case.desired, "poll", counted)
    monkeypatch.setattr(desired_module, "AWAY_FIRST_S", 0.001)
    task = asyncio.create_task(case.desired.run())
    await eventually_async(lambda: case.deployer.versions, "an assignment is carried out")
    task.cancel()
    assert case.deployer.versions == [1]


@pytest.mark.asyncio
async def test_a_server_made_anew_from_a_backup_is_shown_the_newer_assignment(case):
    case.server.behind = True
    await case.poll()
    assert case.server.shown == []  # there is nothing to show yet
    envelope = case.server.assignment(7)
    await case.judge(envelope)
    await case.poll()
    assert case.server.shown == [("/v1/assignment", envelope)]
    assert case.deployer.versions == [7]
    assert case.problems.texts() == []
