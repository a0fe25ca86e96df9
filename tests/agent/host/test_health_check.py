"""Health checks of a new version: run during probation and once more before the commit."""

import hashlib

import pytest
import support
from wasmtime import wat2wasm

from agent.config import Paths
from agent.host.ipc import host_api
from agent.host.supervisor import timers
from agent.update.images import ImageStore
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Health, Http, Manifest

ALWAYS, NEVER = "(i32.const 1)", "(i32.const 0)"
ALWAYS_BUT_FIRST = "(i32.ge_u (global.get $asked) (i32.const 2))"
THE_SECOND_ONLY = "(i32.eq (global.get $asked) (i32.const 2))"


def unwell(when):
    """The guest that says "the sensor does not answer", each time that `when` holds of how often it was asked."""
    text = support.wasm("unhealthy").decode().partition("\n")[2]
    answers = '(func (export "check") (result i32) (i32.const 96))'
    assert answers in text
    # 32 bytes from 112 on are the answer that all is well: zeros.
    asked = f"""(global $asked (mut i32) (i32.const 0))
      (func (export "check") (result i32)
        (global.set $asked (i32.add (global.get $asked) (i32.const 1)))
        (if (result i32) {when} (then (i32.const 96)) (else (i32.const 112))))"""
    return text.replace(answers, asked)


def publish(kit, instance, version, when, health):
    """Have a repository and a server know this version of a component; the item that asks for it."""
    target = f"components/acme/{instance}/{version}.0.0.wasm"
    data = bytes(wat2wasm(unwell(when)))
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = Manifest(name=instance, version=f"{version}.0.0", trigger=Http(), health=health)
    kit.server.artifacts[sha256] = data
    kit.manifests[target] = manifest
    return Item(instance=instance, target=target, length=len(data), sha256=sha256, manifest_sha256=manifest.digest())


@pytest.mark.asyncio
async def test_a_version_that_is_not_well_on_probation_is_rolled_back_at_default_settings(kit, tmp_path):
    """The agent's side and a real host, with nothing set but that there is a health check: 30 seconds of probation."""
    (tmp_path / "host").mkdir()
    host = support.Host(tmp_path / "host")
    kit.places = Paths(kit.places.state, host.runtime)
    kit.images_kind, kit.compile_s = ImageStore, 120
    stories = {"always": ALWAYS, "second": ALWAYS_BUT_FIRST, "once": THE_SECOND_ONLY}

    def ends():
        last = {report.instance: report for report in kit.reports()}
        return {name: (each.phase.value, each.code, each.running[-10:-5]) for name, each in last.items()}

    await kit.boot(host=False)
    try:
        short = Health(check=True, probation_ms=100, min_calls=0)
        items = [publish(kit, name, 1, NEVER, short) for name in stories]
        await kit.run(kit.assignment(1, *items), seconds=300)
        assert ends() == dict.fromkeys(stories, ("committed", None, "1.0.0"))
        items = [publish(kit, name, 2, when, Health(check=True)) for name, when in stories.items()]
        await kit.run(kit.assignment(2, *items), seconds=300)
        assert ends() == {
            "always": ("rolled-back", RejectCode.HEALTH_FAILED, "1.0.0"),
            "second": ("rolled-back", RejectCode.HEALTH_FAILED, "1.0.0"),
            "once": ("committed", None, "2.0.0"),
        }
        (why,) = [each.message for each in kit.reports() if (each.instance, each.phase) == ("second", "rolled-back")]
        assert why == "its health check failed 2 times: it is not well: the sensor does not answer"
    finally:
        await kit.pull_plug()
    versions = {each.instance: each.target[-10:-5] for each in host.ask(host_api.Hello).running}
    assert versions == {"always": "1.0.0", "second": "1.0.0", "once": "2.0.0"}
    checks = host.health("once").checks
    assert (checks.missed, checks.well) == (1, True)
    assert checks.asked >= timers.QUESTIONS
    host.close()


SELDOM = Health(check=True, interval_ms=3_600_000, probation_ms=3_600_000)


def start(host, generation, when, health=SELDOM, *, instance="web", probation=True):
    run = support.a_run(instance, generation, health=health)
    return host.start(unwell(when), run, probation=probation)


def test_whoever_asks_for_figures_may_have_the_health_check_asked_first(host):
    assert isinstance(start(host, 1, THE_SECOND_ONLY), host_api.Started)

    def checks(**asked):
        (one,) = host.ask(host_api.Status, **asked).instances
        return one.checks.asked, one.checks.missed, one.checks.well

    assert checks() == checks(check="nobody") == (0, 0, True)
    assert checks(check="web") == (1, 1, False)
    assert host.event(lambda event: isinstance(event, host_api.Trapped)).code == RejectCode.HEALTH_FAILED
    assert checks(check="web") == (2, 1, True)
    # A version without a health check has no answers, and asking for one is asking for its figures.
    host.start("hello", support.a_run("web", 2))
    (one,) = host.ask(host_api.Status, check="web").instances
    assert one.checks is None


def test_answers_are_counted_for_each_generation_by_itself(host):
    start(host, 1, NEVER)
    host.ask(host_api.Status, check="web")
    start(host, 2, THE_SECOND_ONLY)
    host.ask(host_api.Status, check="web")
    assert (host.health("web").checks.asked, host.health("web").checks.missed) == (1, 1)
    host.ask(host_api.Revert, instance="web", generation=2)
    checks = host.health("web").checks
    assert (checks.asked, checks.missed, checks.well) == (1, 0, True)


def test_three_bad_answers_in_a_row_end_the_worker_and_it_is_not_well_until_it_says_so(host):
    start(host, 1, ALWAYS_BUT_FIRST)
    for _ in range(3):
        host.ask(host_api.Status, check="web")
    event = host.event(lambda event: isinstance(event, host_api.Trapped) and event.code == RejectCode.RESTARTED)
    assert "3 times in a row" in event.message
    host.event(lambda event: isinstance(event, host_api.Changed) and event.state == "running")
    assert not host.health("web").checks.well
    (one,) = host.ask(host_api.Status, check="web").instances
    assert (one.checks.asked, one.checks.missed, one.checks.well) == (4, 3, True)


def test_on_probation_the_health_check_is_asked_more_often_and_otherwise_not(host):
    """Whoever is on probation tells the time: the others would be asked as often as it is, if they still were."""
    often = Health(check=True, interval_ms=3_600_000, probation_ms=500)

    def is_unwell(event):
        return isinstance(event, host_api.Trapped) and event.code == RejectCode.HEALTH_FAILED

    start(host, 1, ALWAYS_BUT_FIRST, often, instance="plain", probation=False)
    start(host, 1, ALWAYS_BUT_FIRST, often, instance="committed")
    assert host.event(is_unwell).instance == "committed"
    assert isinstance(host.ask(host_api.Commit, instance="committed", generation=1), host_api.Done)
    asked = host.health("committed").checks.asked
    start(host, 1, ALWAYS_BUT_FIRST, often, instance="tried")
    while host.health("tried").checks.asked < 4:
        host.event(lambda event: event.instance == "tried" and is_unwell(event))
    assert host.health("plain").checks.asked == 0
    # The pause that had begun before the commit comes to its end.
    assert host.health("committed").checks.asked <= asked + 1


@pytest.mark.parametrize(
    ("health", "on_probation_s", "else_s"),
    [
        (Health(check=True), 6, 30),
        (Health(check=True, interval_ms=2_000), 2, 2),
        (Health(check=True, interval_ms=0), 6, None),
        (Health(check=True, probation_ms=0), 30, 30),
        (Health(check=True, probation_ms=10), 0.1, 30),  # no more than ten times a second
        (Health(check=True, interval_ms=0, probation_ms=0), None, None),
        (Health(), None, None),
    ],
)
def test_how_often_a_health_check_is_asked(health, on_probation_s, else_s):
    assert timers.pace_s(health, probation=True) == on_probation_s
    assert timers.pace_s(health, probation=False) == else_s
