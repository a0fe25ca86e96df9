"""The server's clock: what a wrong reading of the time must not do, and how the server comes back to the right one."""

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from fleet import ca
from fleet.protocol import codes, operator_api
from fleet.protocol.codes import Phase
from fleet.server import director
from fleet.server.clock import AHEAD_MAX, SETTLE, SETTLE_JUMP, ServerClock
from fleet.server.config import ServerConfig, ServerPaths
from fleet.server.service import Server
from fleet.store.store import Store
from signing import repository
from tests.fleet.server.conftest import Operator

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DAY = timedelta(days=1)
PROGRAM = """
import asyncio, sys
from pathlib import Path
from fleet.server.service import run
asyncio.run(run(Path(sys.argv[1]), on_ready=lambda ready: print(ready.broker, flush=True)))
"""


class Machine:
    """A machine whose clock can be set, while time passes on it."""

    def __init__(self, wall=NOW):
        self.wall, self.up = wall, 100.0

    def clock(self):
        return ServerClock(lambda: self.wall, lambda: self.up)

    def later(self, time):
        self.wall, self.up = self.wall + time, self.up + time.total_seconds()


# The clock alone


def test_time_passes_and_nothing_is_a_jump():
    machine = Machine()
    clock = machine.clock()
    machine.later(400 * DAY)
    assert (clock.now(), clock.jumped, clock.problems()) == (NOW + 400 * DAY, False, [])


@pytest.mark.parametrize("jump", [730 * DAY, AHEAD_MAX + DAY, -2 * DAY, -730 * DAY])
def test_a_jump_is_not_believed_and_is_over_when_the_clock_is_right_again(jump):
    machine = Machine()
    clock = machine.clock()
    machine.later(DAY)
    machine.wall += jump
    clock.settle()
    assert clock.jumped
    assert clock.now() == clock.expected == NOW + DAY
    (problem,) = clock.problems()
    assert f"{abs(jump).days} days {'ahead of' if jump > timedelta() else 'behind'}" in problem
    assert "fleet serve --trust-clock" in problem
    machine.wall -= jump
    clock.settle()
    assert (clock.now(), clock.problems()) == (NOW + DAY, [])


def test_a_server_that_was_off_believes_its_clock_and_deletes_nothing_by_it_at_first():
    machine = Machine()
    clock = machine.clock()
    clock.start_from(NOW - 60 * DAY)
    assert (clock.now(), clock.earliest, clock.jumped) == (NOW, NOW - 60 * DAY, False)
    clock.settle()
    machine.later(SETTLE)
    clock.settle()
    assert clock.earliest == clock.expected == NOW + SETTLE


def test_a_clock_that_stays_where_it_jumped_to_is_believed_in_the_end():
    machine = Machine()
    clock = machine.clock()
    clock.start_from(NOW - 400 * DAY)
    clock.settle()
    machine.later(SETTLE_JUMP / 2)
    clock.settle()
    assert clock.jumped
    machine.later(SETTLE_JUMP / 2)
    clock.settle()
    assert (clock.jumped, clock.earliest) == (False, NOW + SETTLE_JUMP)


def test_a_clock_that_goes_back_and_forth_is_never_believed():
    machine = Machine()
    clock = machine.clock()
    for _ in range(100):
        machine.wall += 400 * DAY
        clock.settle()
        machine.later(SETTLE_JUMP / 4)
        machine.wall -= 400 * DAY
        clock.settle()
        machine.later(SETTLE_JUMP / 4)
    assert clock.now() == NOW + 50 * SETTLE_JUMP


def test_what_a_wrong_clock_stamped_is_no_witness_for_a_fleet_of_before(tmp_path):
    store = Store.open(tmp_path / "fleet.db", fleet="test")
    assert store.witness(before=NOW.timestamp()) is None
    for days in (-3, -2, 730):
        at = (NOW + days * DAY).timestamp()
        store.access.audit(actor="a", act="b", subject="c", now=at)
    assert store.witness(before=NOW.timestamp()) == (NOW - 2 * DAY).timestamp()
    store.set_witness(7.0)
    assert store.witness(before=NOW.timestamp()) == 7.0
    store.close()


# A whole server whose clock jumps


@pytest.fixture
def machine():
    return Machine(datetime.now(UTC))


async def serve(fleet, machine, *, connected=True, **more):
    await fleet.stop()
    fleet.server = Server(fleet.home, clock=machine.clock(), **more)
    await fleet.server.start()
    if connected:
        await fleet.server._bus.wait_connected()


async def status(fleet):
    return await fleet.operator.get(operator_api.Status, "/v1/status")


async def shown(url):
    """The certificate that a listener shows."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der)


@pytest.mark.asyncio
async def test_an_upkeep_with_the_clock_two_years_ahead_deletes_nothing_and_dates_nothing_wrong(new_fleet, machine):
    async with new_fleet() as fleet:
        await serve(fleet, machine)
        device = await fleet.device("a")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        reports = fleet.server._store.delivery.reports(device.id, 10)
        assert reports
        before = await status(fleet)
        certificate = await shown(fleet.made.url)

        machine.wall += 730 * DAY
        fleet.server.keep_up()
        assert fleet.server._store.delivery.reports(device.id, 10) == reports
        jumped = await status(fleet)
        assert jumped.roles == before.roles
        assert "730 days ahead" in jumped.problems[0]
        during = await shown(fleet.made.url)
        assert during.not_valid_before_utc <= datetime.now(UTC), "operators whose clock is right are let in"
        assert during.not_valid_after_utc > machine.wall, "and so is a server whose clock was right"
        # whoever enrols meanwhile gets a certificate that is valid today
        other = await fleet.enrol("b")
        made = x509.load_pem_x509_certificate(other.enrolled.certificate_pem.encode())
        assert made.not_valid_before_utc <= datetime.now(UTC) < made.not_valid_after_utc

        machine.wall -= 730 * DAY
        fleet.server.keep_up()
        after = await shown(fleet.made.url)
        assert after.not_valid_after_utc - after.not_valid_before_utc <= ca.SERVER_LIFE + ca.BACKDATED
        assert after.serial_number != certificate.serial_number
        assert (await status(fleet)).problems == ()


@pytest.mark.asyncio
async def test_what_a_wrong_clock_dated_is_made_anew(new_fleet, machine):
    """A fleet of an earlier version, whose server ran with a wrong clock for a moment: everything is dated 2028."""
    async with new_fleet() as fleet:
        await serve(fleet, machine)
        device = await fleet.device("a")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        machine.wall += 1100 * DAY
        # its broker, whose clock is right, refuses a server with a certificate of 2028
        await serve(fleet, machine, connected=False, trust_clock=True)
        fleet.server._director.reconcile(device.id, renew=True)
        fleet.server.keep_up()
        assert {role.expires > machine.wall for role in fleet.server._repository.roles()[-2:]} == {True}

        machine.wall -= 1100 * DAY
        await serve(fleet, machine, trust_clock=True)
        fleet.server.keep_up()
        online = {role.role: role.expires - machine.wall for role in (await status(fleet)).roles}
        assert online["timestamp"] <= repository.LIFE["timestamp"]
        assert online["snapshot"] <= repository.LIFE["snapshot"]
        certificate = await shown(fleet.made.url)
        assert certificate.not_valid_before_utc <= datetime.now(UTC)
        row = fleet.server._store.delivery.assignment(device.id)
        assert row.expires <= (machine.wall + director.LIFE).timestamp()


@pytest.mark.asyncio
@pytest.mark.parametrize("jump", [365 * DAY, -365 * DAY], ids=["ahead", "behind"])
async def test_a_rollout_under_way_does_not_see_a_jump_of_the_clock(new_fleet, machine, jump):
    async with new_fleet() as fleet:
        await serve(fleet, machine)
        slow, quick = await fleet.device("slow"), await fleet.device("quick", group="other")
        slow.behaviour = lambda item: [slow.report(item, Phase.FETCHING)]
        begun = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await fleet.operator.follow(begun, lambda view: view.devices[0].phase == Phase.FETCHING)
        machine.wall += jump
        # the controller decides on every rollout while it carries another one out
        other = await fleet.operator.deploy(await fleet.operator.publish("2.0.0"), group="other", instance="else")
        assert (await fleet.operator.decided(other)).state is codes.RolloutState.SUCCEEDED
        machine.wall -= jump
        assert quick.items["else"].target.endswith("2.0.0.wasm")
        after = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{begun.id}")
        assert after.state is codes.RolloutState.RUNNING, after.reason


# `fleet serve` itself, with faketime


def faketime(offset):
    """The environment in which a process has another time; skips where faketime is not installed."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    said = subprocess.run(["faketime", "-f", offset, "env"], capture_output=True, text=True, check=True).stdout
    pairs = (line.partition("=")[::2] for line in said.splitlines())
    return {name: value for name, value in pairs if name in {"LD_PRELOAD", "FAKETIME"}}


async def serve_process(home, **environment):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fleet.cli.main", "--home", str(home), "serve"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    said = await asyncio.wait_for(process.stdout.readline(), 60)
    assert b"is up" in said, (await process.stderr.read()).decode()
    return process


async def ended(process):
    process.terminate()
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    return errors.decode()


@pytest.mark.asyncio
async def test_a_server_that_ran_with_its_clock_three_years_ahead_serves_as_before(new_home, broker):
    home = new_home(broker)
    config = ServerConfig.load(ServerPaths(home).config)
    errors = await ended(await serve_process(home, **faketime("+1100d")))
    assert "1100 days ahead of the time that the server knows of" in errors
    assert "--trust-clock" in errors
    process = await serve_process(home)
    operator = Operator(home, config.operators_url)
    found = await operator.get(operator_api.Status, "/v1/status")
    expires = {role.role: role.expires - datetime.now(UTC) for role in found.roles}
    assert expires["timestamp"] <= repository.LIFE["timestamp"]
    assert not [problem for problem in found.problems if "clock" in problem]
    await operator.http.aclose()
    assert "clock" not in await ended(process)
