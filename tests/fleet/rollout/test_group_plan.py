"""Plan of a group as people write it: read strictly, each error naming key and line, and its stages in the draw."""

import contextlib
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol.codes import OnBreach
from fleet.protocol.operator_api import GroupPlan, PlanBudget, PlanLimits, PlanStage
from fleet.rollout import group_plan
from fleet.rollout.decide import Limits
from fleet.rollout.group_plan import BadPlanError, limits_of, parse, stages_of, write
from fleet.rollout.members import Amount, Candidate, Stage, draw, taken

WHOLE = """
soak = "10m"            # of each stage that names none

[limits]
min-success = "20%"
failures = 0
max-lost = 1
on-breach = "pause"
at-once = 20
catch-up = "10%"
timeout = 900

[budget]
by = "site"
min-available = 2

[[stages]]
select = { ring = "canary" }
size = 2
soak = "1h"
approval = true

[[stages]]
size = "25%"

[[stages]]
"""
PLAN = GroupPlan(
    soak_s=600,
    limits=PlanLimits(
        min_success="20%", failures="0", max_lost="1", on_breach=OnBreach.PAUSE, at_once=20, catch_up="10%",
        timeout_s=900,
    ),
    budget=PlanBudget(by="site", min_available=2),
    stages=(
        PlanStage(select={"ring": "canary"}, size="2", soak_s=3600, approval=True), PlanStage(size="25%"), PlanStage(),
    ),
)  # fmt: skip


def test_a_whole_plan_is_read():
    assert parse(WHOLE) == PLAN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the plan is empty"),
        ("soak = = 3", "it is not TOML: Invalid value (at line 1, column 8)"),
        ("a = " + "[" * 9000, "it is nested too deeply for a plan"),
        ("soka = 3", "line 1: soka: unknown key; did you mean soak?"),
        ("soak = 1\n[limits]\nfailure = 1", "line 3: limits.failure: unknown key; did you mean failures?"),
        ("[limits]\n\nmin_success = 1", "line 3: limits.min_success: unknown key; did you mean min-success?"),
        ("[limits]\nfailures = 1.5", "line 2: limits.failures: expected a number of devices such as 3"),
        ("[limits]\nfailures = true", "line 2: limits.failures: expected a number of devices such as 3"),
        ("[limits]\nmax-lost = '101%'", "line 2: limits.max-lost: '101%' is no number of devices"),
        ("[limits]\nfailures = -1", "line 2: limits.failures: '-1' is no number of devices"),
        ("[limits]\nat-once = '5%'", "line 2: limits.at-once: expected a whole number, not a text"),
        ("[limits]\nat-once = 99999999999999999999", "line 2: limits.at-once: 99999999999999999999 is not between"),
        ("[limits]\nat-once = 0x" + "f" * 5000, "line 2: limits.at-once: it is not between 0 and"),
        ("soak = " + "9" * 5000, "a number in it has too many digits"),
        ("[limits]\nfailures = 0x" + "f" * 5000, "line 2: limits.failures: it is not between"),
        ("[[stages]]\nsize = 0x" + "f" * 5000 + "\n[[stages]]", "line 2: stages[1].size: it is not between"),
        ("[limits]\non-breach = 'stop'", "line 2: limits.on-breach: expected 'rollback' or 'pause'"),
        ("[limits]\ntimeout = 3", "line 2: limits.timeout: 3 s is less than 10 s"),
        ("limits = 3", "line 1: limits: expected a table, not a number"),
        ("soak = '3 weeks'", "line 1: soak: expected a duration"),
        ("soak = '9999999d'", "line 1: soak: it is not between 0 and 3660d"),
        ("[budget]\nby = 'site'", "line 1: budget: min-available is missing"),
        ("[budget]\nby = 'My Site'\nmin-available = 1", "line 2: budget.by: label 'My Site' is not a name"),
        ("budget = { by = 'site', min-available = 0 }", "line 1: budget.min-available: a budget of 0 means nothing"),
        ("stages = 3", "line 1: stages: expected stages, each under [[stages]], not a number"),
        ("[[stages]]\nsize = 0\n[[stages]]", "line 2: stages[1].size: a stage of 0 means nothing"),
        ("[[stages]]\nsize = 2\n", "line 2: stages[1].size: the last stage takes everybody who is left"),
        ("[[stages]]\nsoak = 1\n[[stages]]", "line 1: stages[1]: it takes every device"),
        ("[[stages]]\nselect = 'a'\n[[stages]]", "line 2: stages[1].select: expected labels such as"),
        ("[[stages]]\nselect = { ring = 3 }\n[[stages]]", "line 2: stages[1].select.ring: expected a text, not a"),
        ("[[stages]]\n[stages.select]\nring = 'A b'\n[[stages]]", "line 3: stages[1].select.ring: value of the label"),
        ("[[stages]]\nsize = 1\n[[stages]]\nsize=1\naproval = true\n[[stages]]", "line 5: stages[2].aproval: unknown"),
        ("[[stages]]\nsize = 1\napproval = 'yes'\n[[stages]]", "line 3: stages[1].approval: expected true or false"),
        ("[[stages]]\nsize=1\n" * 20 + "[[stages]]", "line 41: stages[21]: at most 20 stages are accepted"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_meant_is_refused_by_key_and_line(text, said):
    with pytest.raises(BadPlanError) as caught:
        parse(text)
    assert str(caught.value).startswith(said)


def test_a_plan_that_comes_as_json_is_checked_too():
    plan = msgspec.structs.replace(PLAN, stages=(PlanStage(size="1"),))
    with pytest.raises(BadPlanError, match=r"^stages\[1\]\.size: the last stage takes everybody who is left"):
        group_plan.check(plan)


AMOUNTS = st.sampled_from(["1", "7", "10%", "100%"])
SECONDS = st.none() | st.integers(0, 10 * 86_400)
SIZES = st.sampled_from(["1", "7", "10%"])
LABELS = st.dictionaries(st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True), st.sampled_from(["a", "1", "-"]), max_size=2)
STAGES = st.lists(
    st.builds(PlanStage, select=LABELS, size=SIZES, soak_s=SECONDS, approval=st.booleans()),
    max_size=4,
)  # fmt: skip
LIMITS = st.builds(
    PlanLimits, min_success=AMOUNTS, failures=AMOUNTS, max_lost=AMOUNTS,
    on_breach=st.none() | st.sampled_from(OnBreach), at_once=st.none() | st.integers(0, 9), catch_up=AMOUNTS,
    timeout_s=st.none() | st.integers(10, 9000),
)  # fmt: skip


@given(SECONDS, LIMITS, st.none() | st.builds(PlanBudget, by=st.just("site"), min_available=st.integers(1, 9)), STAGES)
def test_a_plan_that_is_written_is_read_as_the_same(soak_s, limits, budget, stages):
    plan = GroupPlan(soak_s=soak_s, limits=limits, budget=budget, stages=(*stages, PlanStage()) if stages else ())
    assert parse(write(plan)) == plan


@given(st.text() | st.text("[]={}\"'.#\n =abstagesize0123456789", max_size=60))
def test_any_text_is_a_plan_or_refused(text):
    with contextlib.suppress(BadPlanError):
        group_plan.check(parse(text))


def test_what_a_plan_leaves_open_is_the_default():
    assert limits_of(PlanLimits()) == Limits()
    assert stages_of(GroupPlan(soak_s=3)) == ()
    limits = limits_of(PLAN.limits, min_available=2)
    assert (limits.failures, limits.lost, limits.min_available) == (Amount(0), Amount(1), 2)
    assert (limits.on_breach, limits.at_once, limits.timeout_s) == (OnBreach.PAUSE, 20, 900)


def fleet(**rings):
    return [
        Candidate(f"{ring}{number}", online=True, labels={"ring": ring})
        for ring, count in rings.items()
        for number in range(count)
    ]


def test_stages_take_from_those_that_their_labels_select_and_the_last_takes_the_rest():
    drawn = draw(fleet(canary=3, plain=9), stages_of(PLAN), seed=1)
    assert [len(wave) for wave in drawn.waves] == [2, 3, 7]
    assert all(device.startswith("canary") for device in drawn.waves[0])
    assert [str(stage) for stage in drawn.stages] == ["ring=canary: 2", "25%", "100%"]
    assert [stage.soak_s for stage in drawn.stages] == [3600, None, None]


def test_whom_each_stage_takes_is_counted_with_the_stages_that_take_nobody():
    labels = [each.labels for each in fleet(plain=8)]
    assert taken(labels, stages_of(PLAN)) == (0, 2, 6)
    assert taken([], stages_of(PLAN)) == (0, 0, 0)


ALL, ONE = Amount(100, percent=True), Amount(1)
LAB = Stage(ALL, from_first=False, selector=(("ring", "lab"),), approval=True)
FIRST, REST = Stage(ONE, from_first=False), Stage(ALL, from_first=False)


def test_the_approval_of_a_stage_without_devices_goes_to_the_stage_before_it():
    drawn = draw(fleet(plain=4), (FIRST, LAB, REST), seed=1)
    assert ([len(wave) for wave in drawn.waves], [each.approval for each in drawn.stages]) == ([1, 3], [True, False])
    assert drawn.unguarded is None


def test_an_approval_that_no_stage_can_ask_for_is_named():
    assert draw(fleet(plain=4), (LAB, FIRST, REST), seed=1).unguarded is LAB
    assert draw(fleet(lab=1, plain=4), (LAB, FIRST, REST), seed=1).unguarded is None
    assert draw([], (LAB, REST), seed=1).unguarded is LAB, "who joins later would get it without the approval"


def test_an_approval_is_asked_for_where_no_device_is_left_after_it():
    drawn = draw(fleet(lab=1), (replace(LAB, approval=False), replace(FIRST, approval=True), REST), seed=1)
    assert [(stage.selector, stage.approval) for stage in drawn.stages] == [(LAB.selector, True)]


def test_the_first_stage_that_has_devices_takes_online_ones():
    away = [Candidate(f"p{number}", online=number == 0, labels={}) for number in range(4)]
    lab = Stage(ALL, from_first=False, selector=(("ring", "lab"),))
    drawn = draw(away, (lab, Stage(Amount(2), from_first=False), REST), seed=1)
    assert ([len(wave) for wave in drawn.waves], drawn.vacancies) == ([1, 3], 1)
