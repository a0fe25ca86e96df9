"""Tables on terminals of 60, 80 and 120 columns: as recorded, nothing cut, ids and states whole; --wide, --columns."""

import io
import json
import re
from datetime import UTC, datetime, timedelta

import click
import msgspec
import pytest
from rich.console import Console

from fleet.cli import output
from fleet.protocol import codes, operator_api, trust_api
from fleet.protocol.codes import InstanceState, Outcome, Phase
from fleet.protocol.messages import DeviceResources, Health, InstanceHealth, Report, Versions
from tests.fleet.cli.walk import COMMANDS
from tests.golden import support
from tests.signing.sealing_device import Device

NOW = datetime.now(UTC)
LONG = "components/acme-corp/temperature-reader/1.4.0-rc.1.wasm"
READER = InstanceHealth(
    instance="temperature-reader",
    target=LONG,
    generation=3,
    state=InstanceState.RUNNING,
    calls={"ok": 90, "guest-trap": 2},
    p50_us=800,
    p99_us=1500,
    latencies=(89, 2, 0, 0, 0, 0, 0, 1),
    cpu_ms=12_340,
    memory_bytes=4 << 20,
    restarts=1,
)
SICK = InstanceHealth(
    instance="blue", target="components/main/hello/1.0.0.wasm", generation=1, state=InstanceState.QUARANTINED
)
GATE = operator_api.DeviceRow(
    id="gate-3-01bfd5ae",
    name="gate-3",
    groups=("edge-eu", "canaries-of-berlin"),
    online=True,
    seen_at=NOW - timedelta(days=5),
    machine="aarch64",
    versions=Versions(agent="0.1.0", engine="50.0.1"),
    instances=(READER, SICK),
)
DARK = operator_api.DeviceRow(
    id="temperature-logger-in-the-cellar-1b1b1b1b",
    name="t",
    revoked=True,
    problem="it has not answered since it enrolled",
)
ROLLOUT = operator_api.RolloutView(
    id="r117",
    number=117,
    revision=3,
    state=codes.RolloutState.REVERTED,
    instance="temperature-reader",
    target=LONG,
    device="gate-3-01bfd5ae",
    counts={"succeeded": 12, "not-affected": 3},
    reason="wave 2 needs 1 success and has 0; it waits for gate-3-01bfd5ae (offline)",
    created_at=NOW - timedelta(days=3),
    devices=(
        operator_api.RolloutDevice(device="gate-3-01bfd5ae", wave=1, outcome=Outcome.FAILED, phase=Phase.ROLLED_BACK),
        operator_api.RolloutDevice(
            device="hut-1b1b1b1b", wave=2, outcome=Outcome.DEFERRED, message="outside its window"
        ),
    ),
)
DETAIL = operator_api.DeviceDetail(
    row=GATE,
    enrolled_at=NOW - timedelta(days=4),
    health=Health(
        device=GATE.id,
        boot_id="b",
        at=NOW,
        resources=DeviceResources(uptime_s=7200, load=0.25, cpus=4, temperature_c=41.5, memory_total_bytes=1 << 29),
        containment={"seccomp": True, "landlock": False},
        host_runs_as="root service",
    ),
    effective=(
        operator_api.Effective(
            instance="temperature-reader",
            target=LONG,
            source="rollout 117 (group canaries-of-berlin)",
            config={"level": "info", "room": "the cellar of the old house"},
            port=8081,
        ),
    ),
)
GROUP = operator_api.GroupRow(
    name="canaries-of-berlin",
    devices=1,
    online=1,
    rollout=7,
    selector={"site": "berlin"},
    priority=2,
    settled=(operator_api.Settled(instance="temperature-reader", target=LONG, since=NOW),),
)
PUBLISHED = operator_api.ComponentRow(
    target=LONG, namespace="acme-corp", name="temperature-reader", version="1.4.0-rc.1", length=70_000, sha256="ab" * 32
)
HOLDING = trust_api.Holding(device=GATE.id, version=2, at="2026-11-30T18:00:00Z", sealed="operator", by="admin")
SECRET = trust_api.SecretRow(
    instance="temperature-reader", name="database-password", version=2, devices=(HOLDING,), lacking=("hut-1b1b1b1b",)
)
ISSUER = trust_api.Issuer(serial="4f1c" * 10, name="issuing CA", ends=NOW + timedelta(days=80), current=True)

TABLES: dict[str, tuple[str, ...]] = {
    "devices": ("devices",),
    "components": ("components",),
    "device show": ("device", GATE.id),
    "groups": ("groups",),
    "rollouts": ("rollouts",),
    "rollout show": ("rollout", "117"),
    "secret list": ("secret", "list"),
    "operators list": ("operators", "list"),
    "ca status": ("ca", "status"),
    "server reconcile": ("server", "reconcile", "--adopt"),
    "keys list": ("keys", "list"),
    "sign status": ("sign", "status"),
    "audit verify": ("audit", "verify"),
    "affected": ("affected", "serde<1.0.200"),
    "rollout simulate": ("rollout", "simulate", "--group", "edge-eu", "--runs", "1"),
}
"""Every command that prints a table, and words that make it do so."""

SIGNER = Device()

WHOLE = (GATE.id, DARK.id, "acme-corp/temperature-reader@1.4.0-rc.1", "quarantined", "revoked", "reverted", "online")


@pytest.fixture
def filled(desk):
    """Answers with long names, as a fleet of a year has."""
    ahead = operator_api.AheadDevice(
        device=GATE.id,
        accepted=9,
        assigned=7,
        has={"temperature-reader": LONG},
        wants={},
        obstacle="not published here",
    )
    desk.routes |= {
        ("GET", "/v1/devices"): operator_api.Devices(devices=(GATE, DARK)),
        ("GET", f"/v1/devices/{GATE.id}"): DETAIL,
        ("GET", "/v1/groups"): operator_api.Groups(groups=(GROUP,)),
        ("GET", "/v1/rollouts"): operator_api.Rollouts(rollouts=(ROLLOUT,)),
        ("GET", "/v1/rollouts/117"): ROLLOUT,
        ("GET", "/v1/secrets"): trust_api.Secrets(secrets=(SECRET,)),
        ("GET", "/v1/operators"): trust_api.Operators(
            operators=(trust_api.OperatorRow(name="board-room", role=trust_api.Role.VIEWER, created_at=NOW),)
        ),
        ("GET", "/v1/ca"): trust_api.CaView(root_sha256="", request="", issuers=(ISSUER,), root_on_server=False),
        ("POST", "/v1/reconcile"): operator_api.Reconciliation(devices=(ahead,), done=False),
        ("GET", "/v1/components"): operator_api.Components(components=(PUBLISHED,)),
    }
    report = {**msgspec.to_builtins(support.full(Report)), "sequence": 1, "phase": "committed", "progress": None}
    signed = SIGNER.signer.sign(
        json.dumps(report | {"target": LONG, "running": LONG, "device": SIGNER.id}, default=str).encode()
    )
    desk.routes["GET", f"/v1/devices/{SIGNER.id}/reports"] = operator_api.History(
        device=SIGNER.id, certificate_pem=SIGNER.certificate.decode(), reports=(msgspec.Raw(signed),)
    )
    return desk


@pytest.fixture
def look(fleet, filled):
    """Run a command of the table of commands."""

    def run(name: str, *more: str):
        rows = (GATE, DARK)
        if name == "audit verify":  # of whose reports the signatures are judged
            rows = (operator_api.DeviceRow(id=SIGNER.id, name="crane"),)
        filled.routes["GET", "/v1/devices"] = operator_api.Devices(devices=rows)
        return fleet(*TABLES[name], *more)

    return run


@pytest.fixture
def screen(monkeypatch):
    """A terminal of some columns and 40 lines; returns what it shows."""

    def make(width: int) -> io.StringIO:
        text = io.StringIO()
        made = Console(file=text, force_terminal=True, width=width, height=40, highlight=False, color_system=None)
        monkeypatch.setattr(output, "console", lambda: made)
        return text

    return make


def settled(text: str) -> str:
    """Leave out what differs between runs: keys, times."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "0123456789ab", text)
    text = text.replace(SIGNER.id, "crane-00000000")
    text = re.sub(r"\b20\d\d-\d\d-\d\d", "2030-01-02", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_was_recorded(golden, look, screen, name):
    """On terminals of three widths; with --wide each row is one line, as on a terminal of any width."""
    for width in (60, 80, 120):
        shown = screen(width)
        done = look(name)
        text = settled(shown.getvalue())
        assert text, done.output
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        golden.check(f"screens/{name.replace(' ', '-')}-{width}.txt", text)
    assert has(COMMANDS[name], "--wide")
    unbounded = screen(2000)
    look(name)
    wide = screen(60)
    look(name, "--wide")
    assert settled(wide.getvalue()) == settled(unbounded.getvalue()) or name in {"device show", "rollout show"}


def test_ids_and_states_are_whole_and_every_column_is_there(look, screen):
    for name in ("devices", "rollouts", "groups"):
        unbounded = screen(2000)
        look(name)
        for width in (60, 80, 120):
            shown = screen(width)
            look(name)
            assert not [word for word in unbounded.getvalue().split() if word not in shown.getvalue().split()], name
            for word in WHOLE:
                assert (word in unbounded.getvalue()) == (word in shown.getvalue()), word


def has(command: click.Command, option: str) -> bool:
    return any(option in each.opts for each in command.params)


@pytest.mark.parametrize("name", [name for name in TABLES if has(COMMANDS[name], "--columns")])
def test_columns_are_chosen_by_name_and_in_order(look, name):
    whole = look(name).stdout.splitlines()
    header = re.split(r"  +", next(line for line in whole if line.isupper()))
    last, first = (each.partition(" (")[0].lower().replace(" ", "-") for each in (header[-1], header[0]))
    chosen = look(name, "--columns", f"{last},{first}").stdout.splitlines()
    assert re.split(r"  +", next(line for line in chosen if line.isupper())) == [header[-1], header[0]]
    refused = look(name, "--columns", "colour")
    assert refused.exit_code == 2
    assert f"there is no column 'colour'; the columns are {first}, " in refused.stderr


def test_a_table_of_more_than_a_screen_ends_with_its_count(fleet, desk, screen):
    rows = tuple(operator_api.DeviceRow(id=f"gate-{number:08x}", name="gate") for number in range(45))
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=rows)
    assert len(fleet("devices").stdout.splitlines()) == 46, "no count where no person reads"
    shown = screen(80)
    fleet("devices")
    assert shown.getvalue().splitlines()[-1].strip() == "45 devices"
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=rows[:30])
    shown = screen(80)
    fleet("devices")
    assert "30 devices" not in shown.getvalue()
