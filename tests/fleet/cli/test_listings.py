"""What listings print, for people and for programs, and what acts on devices and rollouts send."""

import io
import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from fleet.cli import output
from fleet.cli.main import main
from fleet.protocol import codes, operator_api
from fleet.protocol.codes import InstanceState, Phase, RejectCode
from fleet.protocol.messages import DeviceResources, Health, InstanceHealth, Versions
from fleet.protocol.metrics import Metric

NOW = datetime.now(UTC)
HELLO = InstanceHealth(
    instance="hello",
    target="components/main/hello/1.0.0.wasm",
    generation=3,
    state=InstanceState.RUNNING,
    calls={"ok": 90, "guest-trap": 2},
    p50_us=800,
    p99_us=1500,
    latencies=(89, 2, 0, 0, 0, 0, 0, 1),
    cpu_ms=12_340,
    errors=3,
    written_bytes=6 << 10,
    dropped_lines=7,
    memory_bytes=4 << 20,
    restarts=1,
)
ROW = operator_api.DeviceRow(
    id="gate-0a0a0a0a",
    name="gate",
    groups=("edge-eu",),
    online=True,
    seen_at=NOW - timedelta(days=5),
    machine="aarch64",
    versions=Versions(agent="0.1.0", engine="50.0.1"),
    instances=(HELLO, msgspec.structs.replace(HELLO, instance="blue", state=InstanceState.BACKOFF)),
)
SHARING = tuple(
    msgspec.structs.replace(HELLO, instance=name, target=f"components/main/{name}/1.0.0.wasm", shared_worker="main-3")
    for name in ("red", "green")
)
DARK = operator_api.DeviceRow(
    id="hut-1b1b1b1b", name="hut", seen_at=None, problem="it has not answered since it enrolled"
)
DETAIL = operator_api.DeviceDetail(
    row=ROW,
    enrolled_at=NOW - timedelta(days=4),
    health=Health(
        device=ROW.id,
        boot_id="b",
        at=NOW,
        resources=DeviceResources(uptime_s=7200, load=0.25, cpus=4, temperature_c=41.5, memory_total_bytes=1 << 29),
        containment={"seccomp": True, "landlock": False},
        host_runs_as="root service",
    ),
    effective=(
        operator_api.Effective(
            instance="hello",
            target=HELLO.target,
            source="rollout 7 (group edge-eu)",
            config={"level": "info"},
            port=8081,
            attempt=2,
        ),
    ),
    failed=(
        operator_api.TimelineEntry(
            at=NOW, kind="report", text="blue was refused: grant-denied", action="raise this device's policy"
        ),
    ),
)
ROLLOUT = operator_api.RolloutView(
    id="r7",
    number=7,
    revision=3,
    state=codes.RolloutState.REVERTED,
    instance="hello",
    target=HELLO.target,
    group="edge-eu",
    counts={"failed": 1, "reverted": 1, "pending": 0},
    reason="1 of 1 devices failed",
    created_at=NOW - timedelta(minutes=3),
)


def words(text: str) -> list[list[str]]:
    """The cells of each line: columns are two spaces or more apart."""
    import re

    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


@pytest.fixture
def fleet_of_two(desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=(ROW, DARK))
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = DETAIL
    desk.routes["GET", "/v1/rollouts"] = operator_api.Rollouts(rollouts=(ROLLOUT,))
    desk.routes["GET", "/v1/groups"] = operator_api.Groups(
        groups=(
            operator_api.GroupRow(
                name="edge-eu",
                devices=1,
                online=1,
                rollout=7,
                settled=(operator_api.Settled(instance="hello", target=HELLO.target, since=NOW),),
            ),
            operator_api.GroupRow(name="spares", selector={"site": "berlin"}, priority=2, planned=True),
        )
    )
    return desk


def test_devices(fleet, fleet_of_two):
    result = fleet("devices")
    assert result.exit_code == 0
    assert words(result.stdout) == [
        ["DEVICE", "STATE", "GROUPS", "RUNS", "MACHINE", "SEEN", "PROBLEM"],
        [
            "gate-0a0a0a0a",
            "online",
            "edge-eu",
            "hello@1.0.0, blue=hello@1.0.0 (backoff)",
            "aarch64",
            "5 d ago",
        ],
        ["hut-1b1b1b1b", "offline", "-", "-", "-", "never", "it has not answered since it enrolled"],
    ]
    assert not any(line.endswith(" ") for line in result.stdout.splitlines())


def test_a_device_shows_its_security_events_and_what_was_dropped(fleet, desk):
    alert = operator_api.Alert(
        kind=codes.AlertKind.SUSPENDED, since=NOW, until=NOW + timedelta(minutes=15), text="it went on sending"
    )
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(DETAIL, alerts=(alert,), dropped=2300)
    lines = words(fleet("device", ROW.id).stdout)
    assert ["security", "suspended: it went on sending"] in lines
    assert ["dropped", "2300 messages since the server started"] in lines


def test_the_effective_state_names_each_value_with_its_source(fleet, desk):
    (hello,) = DETAIL.effective
    keys = {
        "level": operator_api.EffectiveKey(value="info", source=hello.source),
        "retries": operator_api.EffectiveKey(value="3", source="manifest"),
        "room": operator_api.EffectiveKey(value="cellar", source="device", declared=False),
    }
    masked = operator_api.Effective(instance="meter", target="", source="pin")
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(
        DETAIL, effective=(msgspec.structs.replace(hello, keys=keys), masked)
    )
    lines = words(fleet("device", ROW.id, "--effective").stdout)
    assert lines == [
        ["INSTANCE", "SHOULD RUN", "BECAUSE OF", "PORT", "CONFIGURATION"],
        ["hello", "main/hello@1.0.0", "rollout 7 (group edge-eu)", "8081", "level=info"],
        ["meter", "-", "pin", "-"],
        [""],
        ["INSTANCE", "KEY", "VALUE", "SOURCE"],
        ["hello", "level", "info", "rollout 7 (group edge-eu)"],
        ["hello", "retries", "3", "manifest"],
        ["hello", "room", "cellar", "device, not in this version's manifest"],
        ["problem: blue was refused: grant-denied"],
        ["raise this device's policy"],
    ]
    shown = json.loads(fleet("device", ROW.id, "--effective", "--json").stdout)
    assert set(shown) == {"effective"}
    assert shown["effective"][0]["keys"]["retries"] == {"value": "3", "source": "manifest", "declared": True}
    assert [each["target"] for each in shown["effective"]] == ["main/hello@1.0.0", ""]


def test_devices_of_a_group_as_json(fleet, fleet_of_two):
    result = fleet("devices", "--group", "edge-eu", "--json")
    assert [row["id"] for row in json.loads(result.stdout)["devices"]] == ["gate-0a0a0a0a"]


@pytest.mark.parametrize("options", [(), ("--json",), ("--where", "site=berlin")])
def test_devices_of_a_group_that_is_not_there_are_refused(fleet, fleet_of_two, options):
    unknown = operator_api.Problem(type="unknown-group", title="there is no group 'edge-ue'", status=404)
    fleet_of_two.routes["GET", "/v1/groups/edge-ue/policy"] = unknown
    result = fleet("devices", "--group", "edge-ue", *options)
    assert (result.exit_code, result.stdout) == (4, "")
    if "--json" in options:
        assert json.loads(result.stderr)["error"]["problem"] == "unknown-group"
    else:
        assert result.stderr.startswith("error: there is no group 'edge-ue'")


def test_a_plan_over_a_group_that_is_not_there_is_refused(fleet, fleet_of_two):
    unknown = operator_api.Problem(type="unknown-group", title="there is no group 'edge-ue'", status=404)
    fleet_of_two.routes["GET", "/v1/groups/edge-ue/policy"] = unknown
    result = fleet("rollout", "simulate", "--group", "edge-ue")
    assert (result.exit_code, result.stderr.startswith("error: there is no group 'edge-ue'")) == (4, True)


def test_a_group_without_devices_is_an_empty_list(fleet, fleet_of_two):
    fleet_of_two.routes["GET", "/v1/groups/spares/policy"] = operator_api.GroupPolicy(group="spares")
    assert fleet("devices", "--group", "spares").stdout == "No such device: 'fleet devices' lists every one.\n"
    assert json.loads(fleet("devices", "--group", "spares", "--json").stdout) == {"devices": []}


def test_the_options_may_stand_before_the_command_too(fleet, fleet_of_two):
    assert json.loads(fleet("--json", "devices").stdout) == json.loads(fleet("devices", "--json").stdout)


def test_no_devices_yet(fleet, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
    assert fleet("devices").stdout == "No device yet: 'fleet enroll-token --group G' creates a token for one.\n"
    assert json.loads(fleet("devices", "--json").stdout) == {"devices": []}


def test_groups(fleet, fleet_of_two):
    assert words(fleet("groups").stdout) == [
        ["GROUP", "DEVICES", "ONLINE", "RUNS", "ROLLOUT", "MEMBERS"],
        ["edge-eu", "1", "1", "hello@1.0.0", "7", "listed"],
        ["spares", "0", "0", "-", "-", "by label site=berlin, has a plan, priority 2"],
    ]


def test_rollouts(fleet, fleet_of_two):
    row = words(fleet("rollouts").stdout)[1]
    assert row[-2].endswith(" min ago")
    assert [*row[:-2], row[-1]] == [
        "7",
        "reverted",
        "hello",
        "main/hello@1.0.0",
        "edge-eu",
        "1 failed 1 reverted",
        "1 of 1 devices failed",
    ]


def test_one_device_in_full(fleet, fleet_of_two, desk):
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(
        DETAIL, row=msgspec.structs.replace(ROW, instances=(*ROW.instances, *SHARING))
    )
    text = fleet("device", ROW.id).stdout
    for line in (
        ["hardware", "up 2 h, load 0.25 on 4 CPUs, 42 °C"],
        ["isolation", "root service: seccomp, NO landlock"],
        ["hello", "hello@1.0.0", "running", "92", "2", "1.5 ms", "4.0 MiB", "1", "own"],
        ["red", "red@1.0.0", "running", "92", "2", "1.5 ms", "4.0 MiB", "1", "main-3, with 1 more"],
        ["hello", "12.3 s", "0.8 ms", "1 ms:89, 3 ms:2, more:1", "3", "6.0 KiB", "7"],
        ["hello", "main/hello@1.0.0", "rollout 7 (group edge-eu)", "8081", "level=info"],
        ["problem: blue was refused: grant-denied"],
        ["raise this device's policy"],
    ):
        assert line in words(text)


def test_a_device_names_the_command_that_shows_the_log_before_a_failure(fleet, fleet_of_two, desk):
    last_line = f"fleet why {ROW.id} --log shows the log before it"
    assert last_line not in fleet("device", ROW.id).stdout
    failed = tuple(msgspec.structs.replace(each, log=("unreachable",)) for each in DETAIL.failed)
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(DETAIL, failed=failed)
    assert fleet("device", ROW.id).stdout.splitlines()[-1].strip() == last_line


def test_requests_that_instances_sent_and_were_denied_are_shown_where_there_are_any(fleet, fleet_of_two, desk):
    assert "DENIED" not in fleet("device", ROW.id).stdout
    reaching = msgspec.structs.replace(HELLO, instance="meter", outgoing=512, denials=3)
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(
        DETAIL, row=msgspec.structs.replace(ROW, instances=(HELLO, reaching))
    )
    header, hello, meter = words(fleet("device", ROW.id).stdout.partition("INSTANCE")[2])[:3]
    assert (header[-2:], hello[-2:], meter[-2:]) == (["SENT", "DENIED"], ["0", "0"], ["512", "3"])


def test_uses_of_the_key_value_store_are_shown_where_there_are_any(fleet, fleet_of_two, desk):
    assert "KEY-VALUE" not in fleet("device", ROW.id).stdout
    keeping = msgspec.structs.replace(HELLO, instance="meter", keyvalue_reads=7, keyvalue_writes=3, keyvalue_bytes=90)
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(
        DETAIL, row=msgspec.structs.replace(ROW, instances=(HELLO, keeping))
    )
    header, meter = words("INSTANCE  KEY-VALUE" + fleet("device", ROW.id).stdout.partition("KEY-VALUE")[2])[:2]
    assert header == ["INSTANCE", "KEY-VALUE READS", "WRITES", "BYTES"]
    assert meter[:3] == ["meter", "7", "3"]


def test_figures_of_a_component_are_shown_where_there_are_any(fleet, fleet_of_two, desk):
    assert "METRIC" not in fleet("device", ROW.id).stdout
    figures = (
        Metric(name="read_errors", kind="counter", labels={"bus": "rs485"}, value=4.0, count=4),
        Metric(name="tank_litres", kind="gauge", value=812.5, count=2),
        Metric(name="none of\nours", kind="gauge"),
    )
    counting = msgspec.structs.replace(HELLO, instance="meter", metrics=figures)
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = msgspec.structs.replace(
        DETAIL, row=msgspec.structs.replace(ROW, instances=(HELLO, counting))
    )
    header, errors, litres = words("INSTANCE  METRIC" + fleet("device", ROW.id).stdout.partition("METRIC")[2])[:3]
    assert header == ["INSTANCE", "METRIC", "KIND", "VALUE", "COUNT"]
    assert errors == ["meter", "read_errors {bus=rs485}", "counter", "4", "4"]
    assert litres == ["meter", "tank_litres", "gauge", "812.5", "2"]


def test_why_says_what_to_do(fleet, desk):
    entries = (
        operator_api.TimelineEntry(
            at=NOW,
            kind="report",
            text="rolled-back components/main/hello/3.0.0.wasm: trapped",
            phase=Phase.ROLLED_BACK,
            code=RejectCode.TRAPPED,
            action="mend it and push again",
            log=("unreachable",),
        ),
        operator_api.TimelineEntry(at=NOW, kind="report", text="fetching was interrupted", retryable=True),
    )
    desk.routes["GET", f"/v1/devices/{ROW.id}/timeline"] = operator_api.Timeline(device=ROW.id, entries=entries)
    text = fleet("why", ROW.id, "--log").stdout
    assert "rolled-back main/hello@3.0.0: trapped" in text
    assert "do: mend it and push again" in text
    assert "| unreachable" in text
    assert "the device retries this by itself" in text
    assert json.loads(fleet("why", ROW.id, "--json").stdout)["device"] == ROW.id


def test_status_names_what_is_wrong(fleet, desk):
    desk.routes["GET", "/v1/status"] = operator_api.Status(
        fleet="acme",
        size="dev",
        production=False,
        version="0.1.0",
        now=NOW,
        started_at=NOW - timedelta(hours=3),
        operators_url="https://127.0.0.1:8743",
        devices_url="https://127.0.0.1:8744",
        mqtt=("mqtts://127.0.0.1:8883",),
        broker="embedded",
        broker_connected=False,
        devices=2,
        online=1,
        roles=(operator_api.Published(role="timestamp", version=3, expires=NOW + timedelta(days=2)),),
        problems=("the broker is away",),
    )
    text = fleet("status").stdout
    assert "acme (dev, for development only)" in text
    assert "embedded, NOT connected" in text
    assert ["timestamp", "3", "in 2 d"] in words(text)
    assert "problem: the broker is away" in text


def test_a_token_is_alone_on_standard_output_so_that_it_can_be_piped(fleet, desk):
    desk.routes["POST", "/v1/enroll-tokens"] = operator_api.EnrollTokenReply(
        token="wf1.abc", group="edge-eu", expires=NOW
    )
    result = fleet("enroll-token", "--group", "edge-eu", "--valid", "30m")
    assert result.stdout == "wf1.abc\n"
    assert "For one device into group edge-eu" in result.stderr
    assert desk.sent("/v1/enroll-tokens") == {"group": "edge-eu", "valid_s": 1800}
    quiet = fleet("enroll-token", "--group", "edge-eu", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("wf1.abc\n", "")


@pytest.mark.parametrize(
    ("arguments", "method", "path", "body"),
    [
        (["unpin", ROW.id, "hello"], "POST", f"/v1/devices/{ROW.id}/unpin", {"instance": "hello"}),
        (["retry", ROW.id, "hello"], "POST", f"/v1/devices/{ROW.id}/retry", {"instance": "hello"}),
        (["label", ROW.id, "a=b", "c-"], "PUT", f"/v1/devices/{ROW.id}/labels", {"labels": {"a": "b", "c": None}}),
        (
            ["device", "set", ROW.id, "hello", "room=cellar", "url=a=b"],
            "PUT",
            f"/v1/devices/{ROW.id}/keys",
            {"instance": "hello", "keys": {"room": "cellar", "url": "a=b"}},
        ),
        (
            ["device", "unset", ROW.id, "hello", "room"],
            "PUT",
            f"/v1/devices/{ROW.id}/keys",
            {"instance": "hello", "keys": {"room": None}},
        ),
        (["revoke", ROW.id, "--yes"], "POST", f"/v1/devices/{ROW.id}/revoke", None),
    ],
)
def test_acts_on_a_device(arguments, method, path, body, fleet, desk):
    desk.routes[method, path] = DETAIL
    result = fleet(*arguments)
    assert result.exit_code == 0
    assert ROW.id in result.stdout
    if body is not None:
        assert desk.sent(path) == body
    assert msgspec.json.decode(fleet(*arguments, "--json").stdout, type=operator_api.DeviceDetail).row.id == ROW.id


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["room"], "error: 'room' is not a setting; it has no '='; write KEY=VALUE\n"),
        (["=x"], "error: '=x' is not a setting; it has no key; write KEY=VALUE\n"),
        (["room=a", "room=b"], "error: room is given twice; one value can apply; give it once\n"),
    ],
)
def test_a_key_that_is_not_written_as_one_is_never_sent(pairs, said, fleet, desk):
    result = fleet("device", "set", ROW.id, "hello", *pairs)
    assert (result.exit_code, result.stderr, desk.seen) == (2, said, [])


def test_keys_for_an_instance_that_is_not_there_yet_are_said_to_wait(fleet, desk):
    desk.routes["PUT", f"/v1/devices/{ROW.id}/keys"] = DETAIL
    assert "should run nothing as meter yet: its keys wait" in fleet("device", "set", ROW.id, "meter", "a=b").stdout


def test_the_options_of_a_device_may_stand_before_its_id(fleet, desk):
    desk.routes["GET", f"/v1/devices/{ROW.id}"] = DETAIL
    assert json.loads(fleet("device", "--json", ROW.id).stdout)["row"]["id"] == ROW.id
    assert fleet("device", "--effective", ROW.id).stdout == fleet("device", ROW.id, "--effective").stdout


def test_a_device_is_not_revoked_without_a_yes(fleet, desk):
    result = fleet("revoke", ROW.id, stdin="n\n")
    assert (result.exit_code, desk.seen) == (130, [])


AHEAD = (
    operator_api.AheadDevice(
        device=ROW.id,
        accepted=3,
        assigned=1,
        has={"hello": "components/main/hello/3.0.0.wasm"},
        wants={"hello": "components/main/hello/1.0.0.wasm"},
    ),
    operator_api.AheadDevice(device="other-1f2e3d4c", accepted=9, obstacle="it has not shown its assignment"),
)


def test_reconciling_shows_what_it_would_do_and_asks(fleet, desk):
    path = "/v1/reconcile"
    desk.routes["POST", path] = operator_api.Reconciliation(devices=AHEAD)
    result = fleet("server", "reconcile", "--adopt", stdin="n\n")
    assert result.exit_code == 130
    assert "nothing was changed" in result.stderr
    assert "Adopt on 1 devices?" in result.stderr
    line = next(line for line in words(result.stdout) if line[0] == ROW.id)
    assert " ".join(line).split()[1:4] == ["3", "over", "1"]
    assert "main/hello@3.0.0" in result.stdout
    assert "it has not shown its assignment" in " ".join(result.stdout.split())
    assert desk.sent(path) == {"mode": "adopt", "selector": "", "dry_run": True}

    desk.routes["POST", path] = operator_api.Reconciliation(devices=AHEAD, done=True)
    result = fleet("server", "reconcile", "--impose", "site=berlin", "--yes")
    assert desk.sent(path) == {"mode": "impose", "selector": "site=berlin", "dry_run": False}
    assert "1 devices are reconciled." in result.stdout
    assert "Left as they are: other-1f2e3d4c." in result.stdout
    assert result.exit_code == 4  # one was left


def test_reconciling_needs_a_decision_and_says_when_there_is_nothing(fleet, desk):
    for chosen in ((), ("--adopt", "--impose"), ("--impose", "--adopt", "--yes")):
        result = fleet("server", "reconcile", *chosen)
        assert (result.exit_code, "Choose one of --adopt and --impose" in result.stderr) == (2, True), chosen
    desk.routes["POST", "/v1/reconcile"] = operator_api.Reconciliation()
    result = fleet("server", "reconcile", "--adopt")
    assert (result.exit_code, result.stdout) == (0, "No device is ahead of the server.\n")
    found = msgspec.json.decode(fleet("server", "reconcile", "--adopt", "--json").stdout)
    assert found == {"devices": [], "done": False}


@pytest.mark.parametrize("verb", ["pause", "resume", "abort"])
def test_acts_on_a_rollout(verb, fleet, desk):
    desk.routes["POST", f"/v1/rollouts/7/{verb}"] = ROLLOUT
    result = fleet("rollout", verb, "7")
    assert result.exit_code == 0
    assert result.stdout.startswith("Rollout 7 ")


def test_a_number_alone_shows_the_rollout(fleet, desk):
    desk.routes["GET", "/v1/rollouts/7"] = ROLLOUT
    text = fleet("rollout", "7").stdout
    assert text.startswith("Rollout 7: main/hello@1.0.0 as hello to group edge-eu")
    assert ["reason", "1 of 1 devices failed"] in words(text)


def test_undo_and_remove_say_what_they_mean(fleet, desk):
    desk.views = [ROLLOUT] * 4
    assert fleet("undo", "7", "--detach").exit_code == 1  # it is decided already, and badly
    assert desk.sent("/v1/undo") == {"rollout": "7", "group": "", "waves": ""}
    fleet("remove", "hello", "--group", "edge-eu", "--keep-data")
    sent = desk.sent("/v1/removals")
    assert (sent["instance"], sent["group"], sent["keep_data"]) == ("hello", "edge-eu", True)


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (
            operator_api.Problem(
                type="unknown-group",
                title="no group 'edge-eu'",
                status=404,
                detail="there are none",
                action="make it with 'fleet group'",
            ),
            "error: no group 'edge-eu'; there are none; make it with 'fleet group'\n",
        ),
        (
            operator_api.Problem(
                type="unknown-target", title="components/main/hello/1.0.0.wasm is not published", status=404
            ),
            "error: main/hello@1.0.0 is not published\n",
        ),
        (
            operator_api.Problem(type="unauthorised", title="the token is not known here", status=401),
            "error: the token is not known here\n",
        ),
    ],
)
def test_what_the_server_refuses_is_one_line_and_exit_code_4(problem, line, fleet, desk):
    desk.routes["GET", "/v1/devices"] = problem
    result = fleet("devices")
    assert (result.exit_code, result.stderr) == (4, line)


# -- the home ------------------------------------------------------------------------------------------------------


def test_an_unreachable_server_is_exit_code_3_and_named(fleet, home):
    result = fleet("devices")
    assert result.exit_code == 3
    assert "https://127.0.0.1:8743; connection refused" in result.stderr
    assert "fleet serve" in result.stderr


def test_no_fleet_here(fleet):
    result = fleet("devices")
    assert result.exit_code == 2
    assert "no fleet in" in result.stderr
    assert "fleet init --dev" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('url = "', "is not TOML"),
        ("url = " + "9" * 5000, "is not TOML"),
        ('fleet = "f"\nnamespace = "main"\n', "has no url"),
        ("url = 7\n", "has no url"),
    ],
)
def test_a_damaged_configuration_is_named(text, words, fleet, home):
    (home / "operator/config.toml").write_text(text)
    result = fleet("devices")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_token_that_others_can_read_is_not_used(fleet, home):
    (home / "operator/token").chmod(0o640)
    result = fleet("devices")
    assert result.exit_code == 2
    assert "chmod 600" in result.stderr


def test_a_token_that_is_gone_is_no_reason_to_create_another_fleet(fleet, home):
    (home / "operator/token").unlink()
    result = fleet("devices")
    assert result.exit_code == 2
    assert "operator/token does not exist" in result.stderr
    assert "fleet operators add" in result.stderr
    assert "fleet init" not in result.stderr


def test_init_names_its_home_in_the_next_steps_if_fleet_would_not_find_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WASMFLEET_HOME", raising=False)
    elsewhere = CliRunner().invoke(main, ["--home", str(tmp_path / "try"), "init", "--dev"])
    assert f"fleet --home {tmp_path}/try serve" in elsewhere.stdout
    monkeypatch.setenv("WASMFLEET_HOME", str(tmp_path / "named"))
    named = CliRunner().invoke(main, ["init", "--dev"])
    assert "  fleet serve" in named.stdout


def test_init_never_overwrites(fleet, home):
    token = (home / "operator/token").read_bytes()
    result = fleet("init", "--dev")
    assert result.exit_code == 2
    assert "holds a fleet already" in result.stderr
    assert (home / "operator/token").read_bytes() == token


# -- what the shell offers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "begun", "offered"),
    [
        ("push x.wasm --group", "", ["edge-eu", "spares"]),
        ("push x.wasm --group", "edge", ["edge-eu"]),
        ("why", "", ["gate-0a0a0a0a", "hut-1b1b1b1b"]),
        ("rollout abort", "", ["7"]),
        ("device", "", ["gate-0a0a0a0a", "hut-1b1b1b1b", "set", "show", "unset"]),
        ("device show", "gate", ["gate-0a0a0a0a"]),
        ("device gate-0a0a0a0a", "--eff", ["--effective"]),
        ("group", "", ["edge-eu", "spares", "change", "policy"]),
        ("group edge-eu", "--ad", ["--add"]),
        ("rollout", "7", ["7"]),
        ("de", "de", ["demo", "deploy", "devices", "device"]),
    ],
)
def test_the_shell_is_offered_what_there_is(line, begun, offered, fleet_of_two, home):
    from click.shell_completion import ShellComplete

    from fleet.cli.main import main

    words = ["--home", str(home), *line.split()]
    words = words[:-1] if begun and words[-1] == begun else words
    completions = ShellComplete(main, {}, "fleet", "_FLEET_COMPLETE").get_completions(words, begun)
    assert [item.value for item in completions] == offered


def test_the_shell_is_offered_nothing_where_nobody_answers(home):
    from click.shell_completion import ShellComplete

    from fleet.cli.main import main

    completing = ShellComplete(main, {}, "fleet", "_FLEET_COMPLETE")
    assert completing.get_completions(["--home", str(home), "why"], "") == []
    assert completing.get_completions(["--home", "/nowhere", "why"], "") == []


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 80 columns; returns its screen."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(output, "console", lambda: console)
    return screen


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        (("devices",), [ROW.id, DARK.id, "online", "edge-eu", "aarch64", "5 d ago", "hello@1.0.0,", "(backoff)"]),
        (
            ("device", ROW.id),
            [ROW.id, "hello@1.0.0", "running", "1.5 ms", "4.0 MiB", "WORKER", "LINES DROPPED", "6.0 KiB"],
        ),
        (
            ("rollouts",),
            ["7", "reverted", "main/hello@1.0.0", "edge-eu", "1", "failed", "min ago", "1 of 1", "devices"],
        ),
        (("groups",), ["edge-eu", "hello@1.0.0", "spares", "label", "site=berlin,", "priority"]),
    ],
)
def test_a_narrow_terminal_wraps_long_cells_and_cuts_nothing(fleet, fleet_of_two, narrow, arguments, whole):
    assert fleet(*arguments).exit_code == 0
    lines = narrow.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in narrow.getvalue()
    for text in whole:
        assert any(text in line for line in lines), text


LONG = msgspec.structs.replace(
    ROLLOUT, number=117, instance="temperature-reader", device="gate-7-1f2e3d4c", group="",
    target="components/acme-corp/temperature-reader/1.4.0-rc.1.wasm", counts={"succeeded": 12, "not-affected": 3},
    reason="wave 2 needs 1 success and has 0; it waits for gate-7-1f2e3d4c (offline)",
    created_at=NOW - timedelta(days=3),
)  # fmt: skip


@pytest.mark.parametrize("rows", [(ROLLOUT,), (LONG,), (ROLLOUT, LONG)], ids=["short", "long", "both"])
def test_no_id_of_a_rollout_is_broken_on_a_narrow_terminal(fleet, desk, narrow, rows):
    desk.routes["GET", "/v1/rollouts"] = operator_api.Rollouts(rollouts=rows)
    assert fleet("rollouts").exit_code == 0
    lines = narrow.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for row in rows:
        place = row.group or row.device
        for text in (f"{row.number} ", row.state, row.instance, output.target(row.target), place, *row.reason.split()):
            assert any(text in line for line in lines), (text, narrow.getvalue())
    assert lines[0].split()[:4] == ["NO", "STATE", "INSTANCE", "TARGET"]


def test_columns_that_do_not_fit_go_below_their_row_with_their_names(fleet, desk, narrow):
    desk.routes["GET", "/v1/rollouts"] = operator_api.Rollouts(rollouts=(LONG,))
    assert fleet("rollouts").exit_code == 0
    assert [line.rstrip() for line in narrow.getvalue().splitlines()] == [
        "NO   STATE     INSTANCE            TARGET",
        "117  reverted  temperature-reader  acme-corp/temperature-reader@1.4.0-rc.1",
        "    TO gate-7-1f2e3d4c  DEVICES 12 succeeded 3 not-affected  STARTED 3 d ago",
        "    REASON wave 2 needs 1 success and has 0; it waits for gate-7-1f2e3d4c",
        "    (offline)",
    ]


def test_the_history_of_a_device_that_never_was_is_not_doubted(fleet, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
    result = fleet("audit", "verify", "gate-00000000")
    assert result.exit_code == 4
    assert result.stderr == "error: there is no device gate-00000000; 'fleet devices' lists them\n"
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["devices", "deploy hello@1.0.0 --group edge-eu --dry-run"])
def test_an_empty_selector_does_not_mean_every_device(fleet, desk, command):
    result = fleet(*command.split(), "--where", "")
    assert result.exit_code == 2
    assert "'--where': column 1: expected a name such as site or arch" in result.stderr
    assert not desk.seen
