"""`fleet component check`, and the dry runs of push and deploy: by the real host, by the table, by what devices say."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from fleet.component import wasi
from fleet.protocol import operator_api
from fleet.protocol.messages import Versions
from tests import odd_components

GUESTS = Path(__file__).resolve().parents[3] / "components/guests"
ADAPTER = GUESTS.with_name("adapter")
HELLO = bytes(wat2wasm((GUESTS / "hello.wat").read_text()))
ENGINE = "this machine's host: wasmtime "
TABLE = "the table of interfaces that devices serve: "


@pytest.fixture
def without_host(tmp_path):
    """An environment like that of `pip install wasmfleet[cli]`: there is no wasmtime."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text("import sys\nsys.modules['wasmtime'] = None\n")
    return {"PYTHONPATH": str(tmp_path / "bare")}


def run(*arguments, **environment):
    """Run the real command; what it prints as JSON, and its exit code."""
    command = [sys.executable, "-m", "fleet.cli.main", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300, env=os.environ | environment)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def saved(tmp_path):
    def save(data, name="odd.wasm"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def test_a_pipeline_goes_on_after_a_component_that_runs(saved):
    code, said = run("component", "check", saved(HELLO))
    assert (code, said["ok"], said["problems"]) == (0, True, [])
    assert said["checked_by"].startswith(ENGINE)


@pytest.mark.parametrize("kind", odd_components.UNLINKED)
def test_only_the_host_knows_functions_and_types(saved, without_host, kind):
    text, sentence = odd_components.UNLINKED[kind]
    file = saved(odd_components.server(text))
    file.with_name("component.toml").write_text('[grants]\ninterfaces = ["wasi:cli/environment"]\n')
    code, said = run("component", "check", file)
    assert code == 1
    assert said["problems"][0].startswith(sentence)
    code, said = run("component", "check", file, **without_host)
    assert (code, said["problems"]) == (0, [])
    assert said["checked_by"].startswith(TABLE + "wasmfleet[agent] is not installed here")


@pytest.mark.parametrize("kind", odd_components.UNSERVED)
def test_the_table_alone_knows_what_is_served_nowhere(saved, without_host, kind):
    text, sentence = odd_components.UNSERVED[kind]
    code, said = run("component", "check", saved(odd_components.server(text)), **without_host)
    (problem,) = said["problems"]
    assert (code, said["component_toml"]) == (1, "")
    assert sentence in problem


def test_a_host_that_does_not_start_leaves_the_table(saved, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/httptools.py").write_text("raise ImportError('no such library')\n")
    code, said = run("component", "check", saved(HELLO), PYTHONPATH=str(tmp_path / "broken"))
    assert code == 0
    assert said["checked_by"].startswith(TABLE + "this machine's host does not start: ImportError: no such library")


@pytest.mark.parametrize("pages", [256, 257])
def test_memory_is_held_to_its_limit(saved, pages):
    code, said = run("component", "check", saved(odd_components.server(pages=pages)))
    assert code == int(pages > 256)
    if code:
        assert "limits.memory, which is 16MiB" in said["problems"][0]


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('[limits]\nmemory = "5GiB"\n', "limits.memory is 5GiB: a component addresses at most 4GiB"),
        ("[health]\ncheck = true\n", None),
        ("memory = 5\n", None),
    ],
)
def test_manifests(saved, toml, problem):
    file = saved(odd_components.server())
    file.with_name("component.toml").write_text(toml)
    if problem is None:
        command = [sys.executable, "-m", "fleet.cli.main", "component", "check", str(file)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=300, text=True)
        assert done.returncode == 2
        assert str(file.with_name("component.toml")) in done.stderr
    else:
        code, said = run("component", "check", file)
        assert code == 1
        assert problem in said["problems"][0]


def test_missing_grants_are_suggested_and_the_rest_is_judged(saved):
    logs = odd_components.instance("wasi:logging/logging@0.1.0-draft")
    file = saved(odd_components.server(odd_components.NEWER, logs))
    code, said = run("component", "check", file)
    assert code == 1
    assert "its manifest does not grant" in said["problems"][0]
    assert "get-hostname of wasi:cli/environment@0.2.20" in said["problems"][1]
    assert 'interfaces = ["wasi:logging/logging"]' in said["component_toml"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\0asm\x01\0\0\0", "odd.wasm is a core module"),
        (bytes(wat2wasm('(component (import "wasi:cli/run@0.2.0-rc-2023-11-10" (instance)))')), "a pre-release"),
        (bytes(wat2wasm("(component)")), "odd.wasm exports nothing"),
    ],
)
def test_what_no_device_could_call(saved, data, sentence):
    code, said = run("component", "check", saved(data))
    assert code == 1
    assert sentence in said["problems"][0]


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path):
    command = [sys.executable, "-m", "fleet.cli.main", "component", "check", str(tmp_path / "none.wasm")]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 2


def test_people_read_who_judged_it(saved, fleet):
    result = fleet("component", "check", saved(HELLO))
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("checked by this machine's host: wasmtime ") for line in lines)
    assert lines[-1] == "verdict it can run"
    assert any("one at a time" in line for line in lines)


def test_a_directory_without_a_project_is_no_component(fleet, tmp_path):
    result = fleet("component", "check", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path} has no component.toml; 'fleet component new NAME")


def row(name, **more):
    host = Versions(agent="1", host="1", engine="50.0.1", interfaces=wasi.SERVED)
    given = {"groups": ("edge-eu",), "online": True, "machine": "riscv64", "versions": host}
    return operator_api.DeviceRow(id=name, name=name, **(given | more))


EARLIER = Versions(agent="1", host="1", engine="41.0.0", interfaces=("wasi:io@0.2", "wasi:http@0.2"))
DEVICES = (row("new"), row("small", memory_bytes=8 << 20), row("old", versions=EARLIER), row("gone", revoked=True))


def test_other_architectures_are_judged_by_what_devices_reported(saved, fleet, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    file = saved(
        odd_components.server(odd_components.instance("wasi:random/random@0.2.0", "get-random-u64", "(result u64)"))
    )
    file.with_name("component.toml").write_text('[grants]\ninterfaces = ["wasi:random"]\n')
    result = fleet("component", "check", file, "--group", "edge-eu", "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["problems"]) == (0, [])
    assert said["excluded"] == [
        {"device": "small", "reason": "it has 8 MiB of memory, limits.memory is 16MiB"},
        {"device": "old", "reason": "its host does not serve wasi:random/random@0.2.0: upgrade its agent"},
        {"device": "gone", "reason": "it is revoked"},
    ]
    assert "not compiled for riscv64 with wasmtime 41.0.0 (devices: 1): judged by what they reported" in said["notes"]
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES[1:])
    result = fleet("component", "check", file, "--group", "edge-eu", "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (1, ["none of these devices could run it"])


TWO_TRIGGERS = bytes(wat2wasm((GUESTS / "two-triggers.wat").read_text()))
TRIGGERS = 'triggers = ["http", { type = "schedule", every = "10s" }]\n'


def test_several_triggers_are_shown_judged_by_this_machine_and_by_what_devices_reported(saved, fleet, desk):
    newer = Versions(agent="1", host="1", engine="50.0.1", interfaces=(*wasi.SERVED, *wasi.CALLED))
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=(row("new", versions=newer), row("before")))
    file = saved(TWO_TRIGGERS)
    file.with_name("component.toml").write_text(TRIGGERS)
    result = fleet("component", "check", file, "--group", "edge-eu", "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["problems"]) == (0, [])
    reason = "its host is too old, it knows manifests with one trigger only: upgrade its agent"
    assert said["excluded"] == [{"device": "before", "reason": reason}]
    lines = [" ".join(line.split()) for line in fleet("component", "inspect", file).stdout.splitlines()]
    assert lines[lines.index("called by HTTP requests") + 1] == "a timer, every 10000 ms"
    said = json.loads(fleet("component", "inspect", file, "--json").stdout)
    assert [each["type"] for each in said["triggers"]] == ["http", "schedule"]


def test_sockets_are_judged_by_what_devices_reported(saved, fleet, desk):
    newer = Versions(agent="1", host="1", engine="50.0.1", interfaces=(*wasi.SERVED, *wasi.CALLED))
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=(row("new", versions=newer), row("before")))
    file = saved(lzma.decompress((ADAPTER / "dial.wasm.xz").read_bytes()))
    file.with_name("component.toml").write_text('[grants]\noutbound = ["tcp://10.1.0.5:502"]\n')
    said = json.loads(fleet("component", "check", file, "--group", "edge-eu", "--json").stdout)
    assert said["problems"] == []
    reason = "its host is too old, it denies every socket, whatever grants.outbound names: upgrade its agent"
    assert said["excluded"] == [{"device": "before", "reason": reason}]
    assert not any("sockets" in note for note in said["notes"])
    file.with_name("component.toml").write_text("")
    said = json.loads(fleet("component", "check", file, "--group", "edge-eu", "--json").stdout)
    assert any("unless grants.outbound names where they lead" in note for note in said["notes"])


def test_a_trigger_without_its_export_is_named_before_anybody_signs(saved, fleet):
    file = saved(HELLO)
    file.with_name("component.toml").write_text(TRIGGERS)
    result = fleet("push", file, "--group", "edge-eu", "--dry-run")
    assert result.exit_code != 0
    assert "exports neither wasmfleet:schedule/task nor wasi:cli/run" in result.stderr


NO_DEVICES = operator_api.Devices(devices=())


def test_a_group_without_devices_is_no_proof_that_they_can_run_it(saved, fleet, desk):
    desk.routes["GET", "/v1/devices"] = NO_DEVICES
    result = fleet("component", "check", saved(HELLO), "--group", "edge-eu")
    assert (result.exit_code, "the group 'edge-eu' has no devices" in result.stderr) == (2, True), result


@pytest.mark.parametrize("command", [("component", "check"), ("push", "--dry-run", "--waves", "1, 100%")])
def test_a_group_that_is_not_there_is_refused(saved, fleet, desk, command):
    desk.routes["GET", "/v1/devices"] = NO_DEVICES
    unknown = operator_api.Problem(type="unknown-group", title="there is no group 'edge-ue'", status=404)
    desk.routes["GET", "/v1/groups/edge-ue/policy"] = unknown
    result = fleet(*command, saved(HELLO), "--group", "edge-ue")
    assert (result.exit_code != 0, "there is no group 'edge-ue'" in result.stderr) == (True, True), result


def test_a_dry_run_asks_the_host_and_devices_and_fails_for_what_cannot_run(saved, fleet, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    file = saved(odd_components.server(odd_components.NEWER))
    file.with_name("component.toml").write_text('[grants]\ninterfaces = ["wasi:cli/environment"]\n')
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1
    assert said["checked_by"].startswith(ENGINE)
    assert said["problems"][0].startswith("it imports get-hostname of wasi:cli/environment@0.2.20")
    assert [each["device"] for each in said["excluded"]] == ["small", "old", "gone"]


@pytest.mark.parametrize("verb", ["push", "publish"])
def test_nothing_is_signed_that_no_device_serves(saved, fleet, desk, verb):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    file = saved(odd_components.server(odd_components.KEYVALUE))
    file.with_name("component.toml").write_text('[grants]\ninterfaces = ["wasi:keyvalue/watcher"]\n')
    result = fleet(verb, file, *(["--group", "edge-eu"] if verb == "push" else []))
    assert result.exit_code == 2
    assert "no device serves wasi:keyvalue/watcher@0.2.0-draft" in result.stderr
    assert desk.artifacts == {}


def test_push_says_that_requests_wait_for_each_other(saved, fleet, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    said = fleet("push", saved(HELLO), "--group", "edge-eu", "--dry-run", "--json")
    assert any("limits.concurrency" in line for line in json.loads(said.stdout)["warnings"])
    assert "limits.concurrency" in fleet("component", "inspect", saved(HELLO)).stdout


@pytest.fixture
def foreseen(desk):
    """Ask the server what a rollout would do."""
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    desk.routes["POST", "/v1/preflight"] = operator_api.Preflight(waves=(("new",), ("small", "old")))
    return desk


def test_a_dry_run_of_deploy_judges_what_is_published(saved, fleet, foreseen):
    assert fleet("publish", saved(HELLO, "hello.wasm"), "--version", "1.0.0").exit_code == 0
    result = fleet("deploy", "hello@1.0.0", "--group", "edge-eu", "--dry-run", "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["problems"]) == (0, [])
    assert said["checked_by"].startswith(ENGINE)
    assert "small could not run main/hello@1.0.0: it has 8 MiB of memory, limits.memory is 16MiB" in said["warnings"]
    foreseen.artifacts = dict.fromkeys(foreseen.artifacts, b"other bytes")
    assert fleet("deploy", "hello@1.0.0", "--group", "edge-eu", "--dry-run").exit_code == 4


def test_a_dry_run_of_deploy_fails_for_what_cannot_run(saved, fleet, foreseen):
    file = saved(odd_components.server(odd_components.NEWER), "newer.wasm")
    file.with_name("component.toml").write_text('[grants]\ninterfaces = ["wasi:cli/environment"]\n')
    assert fleet("publish", file, "--version", "1.0.0").exit_code == 0
    result = fleet("deploy", "newer@1.0.0", "--group", "edge-eu", "--dry-run")
    assert result.exit_code == 1
    assert "get-hostname of wasi:cli/environment@0.2.20" in " ".join(result.stdout.split())
