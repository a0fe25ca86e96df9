"""wasi:keyvalue in sandboxed workers of a real host: granted, denied, hostile; over swaps, rollbacks and crashes."""

import contextlib
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from agent.host.interfaces import keyvalue
from agent.host.ipc import host_api, keyvalue_api
from fleet.protocol.manifest import Grants, Limits
from tests.agent.host import support
from tests.agent.host.host_processes import forks, lanes_of
from tests.agent.host.pairs_guest import DRAFT, DRAFT2, Pairs, guest

PAIRS = Grants(interfaces=("wasi:keyvalue",))


@pytest.fixture(params=[DRAFT2, DRAFT])
def version(request):
    return request.param


def begun(host, instance, generation=1, *, port=0, version=DRAFT2, grants=PAIRS, **rest):
    port = port or support.free_port()
    run = support.a_run(instance, generation, port=port, grants=grants, **rest)
    reply = host.start(guest(version), run)
    assert isinstance(reply, host_api.Started), reply
    return Pairs(port, version)


def test_pairs_are_set_read_listed_and_deleted(host, version):
    pairs = begun(host, f"plain-{len(version)}", version=version)
    assert pairs.get(b"a") is None
    assert pairs.exists(b"a") is False
    assert pairs.set(b"a", b"one") is None
    assert pairs.set(b"b", bytes(range(256))) is None
    assert (pairs.get(b"a"), pairs.get(b"b"), pairs.exists(b"a")) == (b"one", bytes(range(256)), True)
    assert pairs.page() == ([b"a", b"b"], None)
    assert pairs.delete(b"a") is None
    assert pairs.delete(b"a") is None, "what is not there is not deleted again"
    assert (pairs.get(b"a"), pairs.keys()) == (None, [b"b"])


def test_numbers_are_added_as_text(host, version):
    pairs = begun(host, f"adding-{len(version)}", version=version)
    assert pairs.increment(b"n") == 1
    assert pairs.increment(b"n", 41) == 42
    assert pairs.get(b"n") == b"42"
    assert pairs.set(b"text", b"forty-two") is None
    assert pairs.increment(b"text") == "other: the value is no whole number as text, such as 42"
    assert pairs.set(b"most", str(2**63 - 1).encode()) is None
    assert pairs.increment(b"most") == "other: the sum would be beyond 64 bits"
    assert pairs.get(b"most") == str(2**63 - 1).encode()
    if version == DRAFT2:
        assert pairs.increment(b"n", -50) == -8
    else:
        assert pairs.increment(b"n", -1) == "other: the sum would be beyond 64 bits", "that is 2^64 - 1 there"
        assert pairs.set(b"n", b"-5") is None
        assert pairs.increment(b"n", 2).startswith("other: the sum is -3")


def test_several_pairs_in_one_call(host, version):
    pairs = begun(host, f"batch-{len(version)}", version=version)
    assert pairs.call("n", b"a", b"one")[0] is None
    found = pairs.get_many(b"a", name=b"default")
    assert found == ([(b"a", b"one"), (b"default", None)] if version == DRAFT2 else [(b"a", b"one"), None])
    assert pairs.call("v", b"a")[0] is None
    assert pairs.get(b"a") is None


def test_a_swap_fails_where_the_pair_has_changed_and_gives_the_next_handle(host):
    pairs = begun(host, "swapping")
    error, memory = pairs.call("c", b"a", b"first")
    assert (error, memory.byte(200), pairs.get(b"a")) == (None, 0, b"first")
    error, memory = pairs.call("c", b"a", b"!second")
    assert (memory.byte(200), memory.byte(204)) == (1, 1), "the pair was written in between: cas-failed"
    assert (memory.byte(212), memory.bytes(216)) == (1, b"!"), "current has what was written in between"
    assert (error, pairs.get(b"a")) == (None, b"!second"), "with the handle of the failure the swap is done"


def test_a_long_list_comes_in_pages(host, version):
    pairs = begun(host, f"pages-{len(version)}", version=version)
    keys = [b"%04d" % number for number in range(keyvalue_api.PAGE_KEYS + 10)]
    for key in reversed(keys):
        pairs.set(key, b"")
    first, cursor = pairs.page()
    assert (first, cursor is None) == (keys[: keyvalue_api.PAGE_KEYS], False)
    assert pairs.keys() == keys


def test_every_byte_of_keys_and_values_is_kept(host):
    pairs = begun(host, "bytes")
    odd = [b"", b"\0", b"a\0b", b"\r\n", "ключ".encode(), "\U0010ffff".encode(), b"'; DROP TABLE pairs; --", b"%"]
    for number, key in enumerate(odd):
        assert pairs.set(key, b"\0" * number) is None
    assert [pairs.get(key) for key in odd] == [b"\0" * number for number in range(len(odd))]
    assert pairs.keys() == sorted(odd)


def test_buckets_that_are_not_granted_are_denied_counted_and_named_once(host):
    pairs = begun(host, "denied")
    assert pairs.get(b"a", name=b"default") is None
    for name in (b"other", b"other", b"../denied", b"\0"):
        assert pairs.get(b"a", name=name) == "access-denied"
    assert pairs.get(b"a", name=b"x" * 64) == "no-such-store"
    assert host.health("denied").denials == 4
    assert [line for line in host.lines_of("denied") if "open of 'other' is denied" in line]
    assert sum("is denied" in line for line in host.lines_of("denied")) == 1


def test_without_the_grant_it_does_not_start(host):
    run = support.a_run("ungranted", 1, port=support.free_port(), grants=Grants())
    reply = host.start(guest(), run)
    assert (reply.code, "wasi:keyvalue/store@0.2.0-draft2" in reply.message) == ("grant-denied", True)


def test_an_import_of_another_type_is_refused(host):
    run = support.a_run("mistyped", 1, port=support.free_port(), grants=PAIRS)
    reply = host.start(guest(number="u64"), run)
    assert (reply.code, "another type of increment" in reply.message) == ("start-failed", True)


def test_instances_do_not_see_each_other(host):
    one, other = begun(host, "mine"), begun(host, "yours")
    one.set(b"a", b"mine")
    assert other.get(b"a") is None
    other.set(b"a", b"yours")
    assert one.get(b"a") == b"mine"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (b"k" * keyvalue_api.KEY_MAX_BYTES, b"v" * keyvalue_api.VALUE_MAX_BYTES, None),
        (b"k" * (keyvalue_api.KEY_MAX_BYTES + 1), b"", "other: the key has 1025 bytes, 1024 are allowed"),
        (b"k" * 65536, b"", "other: the key has 65536 bytes, 1024 are allowed"),
        (b"k", b"v" * (keyvalue_api.VALUE_MAX_BYTES + 1), "other: the value has 65537 bytes, 65536 are allowed"),
    ],
)
def test_keys_and_values_have_limits(host, key, value, said):
    pairs = begun(host, "limits", limits=Limits(request_bytes=1 << 20))
    assert pairs.set(key, value) == said
    assert pairs.get(key[: keyvalue_api.KEY_MAX_BYTES]) == (value if said is None else None)
    host.ask(host_api.Stop, instance="limits")
    for each in (Path(host.state) / "keyvalue" / "limits").iterdir():
        each.unlink()


def test_names_of_64_kib_are_no_store(host):
    pairs = begun(host, "names")
    assert pairs.get(b"a", name=b"n" * 65536) == "no-such-store"


def test_a_storm_of_handles_ends_at_the_limit_and_the_next_request_is_served(host):
    pairs = begun(host, "storm")
    for _ in range(2):
        _, memory = pairs.send("o")
        assert memory.error(132) == f"other: {keyvalue.HANDLES_MAX} handles are open: drop some"
    host.ask(host_api.Restart, instance="storm")
    assert pairs.set(b"a", b"") is None


def test_the_storage_limit_holds_and_room_comes_back(host):
    pairs = begun(host, "full", limits=Limits(storage_bytes=100_000))
    assert pairs.set(b"a", b"x" * 60_000) is None
    said = pairs.set(b"b", b"x" * 60_000)
    assert said == "other: its pairs would take 120130 bytes, 100000 are allowed (limits.storage)"
    assert pairs.set(b"a", b"") is None
    assert pairs.set(b"b", b"x" * 60_000) is None


def test_the_days_write_quota_holds(host):
    pairs = begun(host, "quota", limits=Limits(daily_written_bytes=50_000))
    assert pairs.set(b"a", b"x" * 45_000) is None
    assert "no more until 00:00 UTC" in pairs.set(b"a", b"y")
    assert pairs.get(b"a") == b"x" * 45_000
    assert host.health("quota").written_bytes >= 50_000


def test_uses_are_counted(host):
    pairs = begun(host, "counted")
    pairs.set(b"key", b"value")
    pairs.get(b"key")
    pairs.increment(b"n")
    health = host.health("counted")
    assert (health.keyvalue_reads, health.keyvalue_writes, health.keyvalue_bytes) == (1, 2, 8 + 8 + 1)


def test_pairs_outlive_swaps_rollbacks_and_killed_workers(host):
    pairs = begun(host, "lasting")
    assert pairs.increment(b"n") == 1
    begun(host, "lasting", 2, port=pairs.port)
    assert pairs.increment(b"n") == 2, "the new generation goes on"
    host.ask(host_api.Revert, instance="lasting", generation=2)
    assert pairs.increment(b"n") == 3, "and so does the one before, after the rollback"
    for pid in lanes_of(host):
        os.kill(pid, signal.SIGKILL)
    host.event(lambda event: isinstance(event, host_api.Trapped))
    assert pairs.increment(b"n") == 4
    host.ask(host_api.Stop, instance="lasting")
    assert begun(host, "lasting", 3).increment(b"n") == 5, "and from a stop, with which the process ends"


def test_another_schema_begins_with_a_copy_and_a_rollback_finds_the_earlier_pairs(host):
    pairs = begun(host, "schemas")
    pairs.set(b"a", b"one")
    begun(host, "schemas", 2, port=pairs.port, schema=1)
    assert pairs.get(b"a") == b"one"
    pairs.set(b"a", b"two")
    host.ask(host_api.Revert, instance="schemas", generation=2)
    assert pairs.get(b"a") == b"one"
    pairs.set(b"a", b"three")
    begun(host, "schemas", 3, port=pairs.port, schema=1)
    assert pairs.get(b"a") == b"three", "not what the aborted attempt has left"
    pairs.set(b"a", b"four")
    host.ask(host_api.Restart, instance="schemas")
    assert pairs.get(b"a") == b"four", "only the first worker of a generation begins with a copy"


def test_the_store_is_started_anew_when_it_dies(host):
    before = forks(host)
    pairs = begun(host, "anew")
    pairs.set(b"a", b"one")
    host.ask(host_api.Stop, instance="anew")
    pairs = begun(host, "anew", 2)
    assert pairs.get(b"a") == b"one"
    (store,) = forks(host) - before
    os.kill(store, signal.SIGKILL)
    assert pairs.get(b"a") == b"one", "what was committed is there, and the request is sent again"
    os.kill((forks(host) - before).pop(), signal.SIGSTOP)
    os.kill((forks(host) - before).pop(), signal.SIGKILL)
    assert pairs.set(b"b", b"two") is None


def test_workers_of_the_store_do_not_share_a_process_with_others(host):
    begun(host, "alone", share_worker=True)
    assert host.health("alone").shared_worker == ""


def test_damaged_pairs_are_named_in_the_instances_log_and_it_goes_on_with_new_ones(host):
    pairs = begun(host, "hurt")
    assert pairs.set(b"a", b"one") is None
    host.ask(host_api.Stop, instance="hurt")
    path = host.state / "keyvalue" / "hurt" / "0.db"
    begun(host, "other")  # by then the store has closed the database
    assert begun(host, "more").get(b"a") is None
    path.write_bytes(b"\xff" * 8192)
    pairs = begun(host, "hurt", 2)
    assert pairs.get(b"a") is None
    assert pairs.set(b"a", b"anew") is None
    assert pairs.get(b"a") == b"anew"
    (line,) = [line for line in host.lines_of("hurt") if "were damaged" in line]
    assert "begin anew; hurt/0.damaged has the old ones" in line


def test_instances_of_one_namespace_share_a_bucket_that_both_declare(host):
    shared = Grants(interfaces=("wasi:keyvalue",), buckets={"plant": ("shared", "durable")})
    one = begun(host, "one", grants=shared)
    two = begun(host, "two", grants=shared)
    stranger = begun(host, "stranger", grants=shared, namespace="others")
    silent = begun(host, "silent")
    assert one.set(b"a", b"both", name=b"plant") is None
    assert two.get(b"a", name=b"plant") == b"both"
    assert two.get(b"a") is None
    assert stranger.get(b"a", name=b"plant") is None
    assert silent.get(b"a", name=b"plant") == "access-denied"
    assert any("not granted (grants.buckets)" in line for line in host.lines_of("silent"))
    again = begun(host, "one", 2, grants=shared)
    assert again.get(b"a", name=b"plant") == b"both", "a swap keeps it"
    host.ask(host_api.Revert, instance="one", generation=2)
    assert two.get(b"a", name=b"plant") == b"both"


def test_a_durable_write_outlives_the_store_and_the_bucket_goes_with_the_last_of_its_namespace(host):
    grants, before = Grants(interfaces=("wasi:keyvalue",), buckets={"ledger": ("durable", "shared")}), forks(host)
    pairs = begun(host, "books", grants=grants, namespace="bank", limits=Limits(daily_written_bytes=100_000))
    assert pairs.set(b"a", b"booked", name=b"ledger") is None
    place = host.state / "keyvalue" / "+bank"
    with contextlib.closing(sqlite3.connect(place / "ledger.db")) as db, pytest.raises(sqlite3.OperationalError):
        db.execute("SELECT value FROM pairs")  # the store alone has it open
    (store,) = forks(host) - before
    os.kill(store, signal.SIGKILL)
    assert pairs.get(b"a", name=b"ledger") == b"booked"
    assert isinstance(host.ask(host_api.KeepData, instances=(), namespaces=()), host_api.Done)
    assert place.exists(), "an instance that runs shares it"
    host.ask(host_api.Stop, instance="books")
    assert isinstance(host.ask(host_api.KeepData, instances=(), namespaces=None), host_api.Done)
    assert place.exists(), "nobody said of which namespaces"
    assert isinstance(host.ask(host_api.KeepData, instances=(), namespaces=("main",)), host_api.Done)
    assert not place.exists()
