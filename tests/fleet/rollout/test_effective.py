"""Layers: who supplies an instance, where its configuration comes from, what an undo and a withdrawal leave."""

import pytest

from fleet.protocol.codes import RolloutState
from fleet.rollout.effective import (
    Conflict,
    Fitness,
    Group,
    Key,
    NothingToUndoError,
    Overlay,
    Past,
    SettledValue,
    Standing,
    ahead,
    choose_undo,
    conflicts,
    effective,
    safe_value,
    sources,
    target_of,
)
from fleet.rollout.model import Value

V1, V2, GONE = Value("v1"), Value("v2"), Value(None)


def group(name, priority=0, **values):
    return Group(name, priority, {instance: SettledValue(value) for instance, value in values.items()})


def pin(value):
    return {"c5": SettledValue(value)}


def target(groups=(), pins=None, overlays=()):
    found = effective(groups, pins or {}, overlays).get("c5")
    return (found.value.target, found.source) if found is not None else None


def test_a_removal_withdraws_one_groups_wish_and_the_others_stands():
    both = [group("ga", c5=V1), group("gb", c5=V2)]
    assert target(both) == ("v2", "group gb")
    removing = Overlay("r2", 2, "gb", "c5", GONE)
    assert target(both, overlays=[removing]) == ("v1", "group ga")
    assert target([group("ga", c5=V1), group("gb", c5=GONE)]) == ("v1", "group ga")
    assert target([group("ga", c5=GONE), group("gb", c5=V2)]) == ("v2", "group gb")


def test_a_higher_group_that_no_longer_wants_it_does_not_hide_a_lower_one():
    assert target([group("low", 1, c5=V1), group("high", 9, c5=GONE)]) == ("v1", "group low")


def test_when_no_group_wants_it_the_absence_says_what_becomes_of_the_data():
    kept = Value(None, keep_data=True)
    assert effective([group("ga", c5=kept)], {})["c5"].value == kept
    assert target([group("ga")]) is None


def test_a_pin_decides_over_groups_and_masks_when_it_is_absent():
    assert target([group("ga", c5=V1)], pin(V2)) == ("v2", "pin")
    assert target([group("ga", c5=V1)], pin(GONE)) == (None, "pin")


def test_a_rollout_overlays_the_value_of_its_own_group_and_the_newest_wins():
    overlays = [Overlay("r4", 4, "ga", "c5", V2), Overlay("r3", 3, "ga", "c5", V1)]
    assert target([group("ga", c5=V1)], overlays=overlays) == ("v2", "rollout 4 (group ga)")
    assert target([group("ga", c5=V1), group("gb", 5, c5=V1)], overlays=overlays) == ("v1", "group gb")
    assert target([group("gb")], overlays=overlays) is None, "the device left the group"


def test_conflicts_count_wishes_only():
    assert conflicts([group("ga", c5=V1), group("gb", c5=V2)]) == (Conflict("c5", "ga", "gb"),)
    assert conflicts([group("ga", c5=V1), group("gb", c5=GONE)]) == ()
    assert conflicts([group("ga", c5=V1), group("gb", c5=V2), group("top", 9, c5=V1)]) == ()
    # the removal from the group above lets two below disagree
    assert conflicts([group("ga", c5=V1), group("gb", c5=V2), group("top", 9, c5=GONE)]) != ()


def test_a_device_has_keys_of_its_own_over_those_of_the_group_that_supplies_the_version():
    supplied = Value("v2", config=(("level", "info"), ("url", "https://group")))
    low = group("low", 0, c5=Value("v1", config=(("level", "debug"), ("extra", "1"))))
    found = effective([low, group("top", 5, c5=supplied)], {}, own={"c5": {"url": "https://device"}})["c5"]
    assert dict(found.value.config) == {"level": "info", "url": "https://device"}, "groups never merge"
    declared = {"level": "warn", "retries": "3", "url": None, "unset": None}
    for value in (supplied, found.value):
        assert sources(value, "group top", declared=declared, own={"url": "https://device"}) == {
            "level": Key("info", "group top"),
            "url": Key("https://device", "device"),
            "retries": Key("3", "manifest"),
        }


def test_a_key_of_the_device_that_the_manifest_does_not_declare_is_named_as_waiting():
    keys = sources(Value("v2"), "group top", declared={"level": "warn"}, own={"url": "https://device"})
    assert keys == {"level": Key("warn", "manifest"), "url": Key("https://device", "device", declared=False)}
    unknown = sources(Value("v2", config=(("level", "info"),)), "pin", declared=None, own={"url": "x"})
    assert unknown == {"level": Key("info", "pin"), "url": Key("x", "device")}, "nothing is said without a manifest"


def test_keys_of_the_device_wait_for_an_instance():
    assert effective([], {}, own={"c5": {"url": "x"}}) == {}
    assert effective([group("ga", c5=GONE)], {}, own={"c5": {"url": "x"}})["c5"].value == GONE


# -- undo -------------------------------------------------------------------------------------------------------------


def past(number, state="succeeded", before=V1, undoes=""):
    return Past(f"r{number}", number, RolloutState(state), before, undoes)


def test_plain_undo_takes_the_newest_rollout_back():
    assert choose_undo([past(1), past(2)]).number == 2
    assert choose_undo([past(1), past(2, "superseded")]).number == 2
    assert choose_undo([past(1), past(2, "refused")]).number == 1


@pytest.mark.parametrize("state", ["reverted", "aborted", "revoked", "halted"])
def test_plain_undo_is_refused_after_a_rollout_that_took_itself_back_and_names_the_one_before(state):
    with pytest.raises(NothingToUndoError, match=f"rollout 3 was {state}") as refused:
        choose_undo([past(1), past(2), past(3, state)])
    assert refused.value.action.endswith("fleet undo 2")


def test_a_second_undo_is_refused_and_names_the_one_before():
    with pytest.raises(NothingToUndoError, match="rollout 3 is an undo itself") as refused:
        choose_undo([past(1), past(2), past(3, undoes="r2")])
    assert refused.value.action.endswith("fleet undo 1")


@pytest.mark.parametrize("state", ["running", "paused", "scheduled"])
def test_undo_of_an_open_rollout_says_abort(state):
    with pytest.raises(NothingToUndoError) as refused:
        choose_undo([past(1), past(2, state)])
    assert refused.value.action == "end it: fleet rollout abort 2"
    with pytest.raises(NothingToUndoError):
        target_of(past(2, state))


def test_there_may_be_nothing_to_undo():
    for history in ([], [past(1, "refused")]):
        with pytest.raises(NothingToUndoError, match="no rollout changed anything"):
            choose_undo(history)


def test_an_undo_offers_the_settled_value_before():
    assert target_of(past(2, before=V1)) == V1
    assert target_of(past(1, before=None)) == Value(None, keep_data=True)
    with pytest.raises(NothingToUndoError):
        target_of(past(1, "reverted"))


# -- withdrawn releases -----------------------------------------------------------------------------------------------


def test_devices_of_a_withdrawn_release_go_to_the_newest_fit_value():
    history = [SettledValue(Value(target), f"r-{target}") for target in ("v5", "v4", "v3", "v2", "v1")]
    published = {"v4": Fitness(0, 1), "v3": Fitness(1, 2), "v2": Fitness(1, 1), "v1": Fitness(1, 1)}
    # v5 is withdrawn, v4 below the epoch, v3 has data of another schema
    assert safe_value(Fitness(1, 1), history, published) == history[3]
    assert safe_value(Fitness(2, 1), history, published) is None
    assert safe_value(Fitness(0, 1), [SettledValue(GONE), *history], published) == history[1]


# -- ahead ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "sha256", "is_ahead"),
    [(7, "", True), (6, "foreign", True), (6, "ours", False), (6, "", False), (5, "foreign", False), (99, "x", False)],
)
def test_a_device_is_ahead_when_it_follows_what_this_server_never_signed(accepted, sha256, is_ahead):
    standing = Standing("d", accepted, sha256)
    assert ahead(standing, newest=6, known=frozenset({"ours"}), bound=50) is is_ahead
