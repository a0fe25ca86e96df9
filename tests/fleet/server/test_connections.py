"""Which connection ends for which, and which is refused: the table alone."""

import pytest

from fleet.server.connections import HANDSHAKE_S, Connection, Connections, Limits, peer_of


class Fake(Connection):
    def __init__(self):
        self.ended = False

    def end(self):
        self.ended = True


def table(connections=4, per_address=2, per_device=1):
    return Connections(Limits(connections=connections, per_address=per_address, per_device=per_device))


def enter(connections, *addresses):
    found = [Fake() for _ in addresses]
    assert [connections.enter(each, address) for each, address in zip(found, addresses, strict=True)] == [True] * len(
        found
    )
    return found


def test_the_one_that_has_waited_longest_at_an_address_ends_for_the_next():
    connections = table()
    first, second, third = enter(connections, "a", "a", "a")
    assert [first.ended, second.ended, third.ended] == [True, False, False]
    assert len(connections) == 2


def test_whoever_was_answered_last_has_waited_shortest():
    connections = table()
    first, second = enter(connections, "a", "a")
    connections.busy(first)
    connections.waits(first)
    enter(connections, "a")
    assert [first.ended, second.ended] == [False, True]


def test_a_client_that_goes_on_sending_has_waited_shortest():
    connections = table()
    upload, idle = enter(connections, "a", "a")
    connections.went_on(upload)
    enter(connections, "a")
    assert [upload.ended, idle.ended] == [False, True]


def test_a_connection_that_is_being_answered_never_ends_for_another():
    connections = table()
    answered = enter(connections, "a", "a")
    for each in answered:
        connections.busy(each)
    assert not connections.enter(Fake(), "a")
    assert not any(each.ended for each in answered)
    enter(connections, "b")  # other addresses have room


def test_at_the_limit_of_all_the_address_with_most_makes_room():
    connections = table(connections=3)
    crowd = enter(connections, "a", "a", "b")
    enter(connections, "c")
    assert [each.ended for each in crowd] == [True, False, False]


def test_where_everyone_is_being_answered_the_new_one_is_refused():
    connections = table(connections=2)
    for each in enter(connections, "a", "b"):
        connections.busy(each)
    assert not connections.enter(Fake(), "c")
    assert not connections.relieve()


def test_a_verified_device_counts_no_more_at_its_address():
    connections = table()
    first, second = enter(connections, "a", "a")
    assert connections.verified(first, "gate")
    assert connections.verified(second, "door")
    (third,) = enter(connections, "a")
    assert not first.ended
    assert connections.verified(third, "gate")  # of one device the older ends
    assert first.ended
    assert not second.ended


def test_no_handshake_ends_for_the_next_of_its_address_before_its_time_is_over():
    now = [0.0]
    connections = Connections(Limits(connections=100, per_address=8, per_device=1), lambda: now[0])
    first = enter(connections, "a", "a", "a", "a")
    assert all(connections.spoke(each) for each in first)
    for _ in range(50):  # a storm: each is taken, since it may say nothing, and refused when it speaks
        (storm,) = enter(connections, "a")
        assert not connections.spoke(storm)
        connections.leave(storm)
    assert not any(each.ended for each in first)
    connections.waits(first[0])  # done, and its place is free for one more
    (late,) = enter(connections, "a")
    assert connections.spoke(late)
    now[0] = HANDSHAKE_S + 1
    (next_one,) = enter(connections, "a")
    assert connections.spoke(next_one)
    assert [each.ended for each in (*first, late)] == [False, True, False, False, False]


def test_those_that_say_nothing_end_before_handshakes():
    connections = table(per_address=4, connections=10)
    speaking = enter(connections, "a", "a")
    assert all(connections.spoke(each) for each in speaking)
    silent = enter(connections, "a", "a", "a", "a")
    assert not any(each.ended for each in speaking)
    assert [each.ended for each in silent] == [True, True, False, False]


def test_handshakes_that_are_in_time_leave_no_place_at_their_address_when_the_rest_is_answered():
    now = [0.0]
    connections = Connections(Limits(connections=10, per_address=2, per_device=1), lambda: now[0])
    answered, speaking = enter(connections, "a", "a")
    connections.busy(answered)
    assert connections.spoke(speaking)
    assert not connections.enter(Fake(), "a")
    now[0] = HANDSHAKE_S + 1
    enter(connections, "a")
    assert [answered.ended, speaking.ended] == [False, True]


def test_at_the_limit_of_all_a_crowd_of_handshakes_makes_room_for_others():
    connections = table(connections=4, per_address=4)
    crowd = enter(connections, "a", "a")
    assert all(connections.spoke(each) for each in crowd)
    enter(connections, "b", "c")
    enter(connections, "d")
    assert [each.ended for each in crowd] == [True, False]


def test_a_connection_leaves_once():
    connections = table()
    (only,) = enter(connections, "a")
    connections.leave(only)
    connections.leave(only)
    connections.busy(only)
    connections.waits(only)
    assert len(connections) == 0
    assert connections.all() == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_addresses_that_one_host_has_count_as_one(one, other, same):
    assert (peer_of(one) == peer_of(other)) is same


def test_limits_stay_below_the_files_that_a_process_may_open():
    limits = Limits(connections=512, per_address=256, per_device=8)
    assert limits.within(10_000) == limits
    assert limits.within(100) == Limits(connections=100, per_address=50, per_device=8)


def test_an_address_may_have_as_many_connections_as_there_may_be_when_files_suffice():
    limits = Limits(connections=400, per_address=256, per_device=8)
    assert limits.within(400) == limits
    assert limits.within(399) == Limits(connections=399, per_address=199, per_device=8)
