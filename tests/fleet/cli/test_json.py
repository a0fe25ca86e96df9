"""What programs read: one documented object for each command, names as commands take them, times in UTC, errors."""

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import pytest

from fleet.cli.answers import ANSWERS, fits
from fleet.protocol import operator_api, trust_api
from fleet.protocol.messages import LogView
from tests import packed
from tests.fleet.cli.conftest import problem
from tests.fleet.cli.shown import DEVICE, SHOWN, answers
from tests.fleet.cli.walk import COMMANDS
from tests.golden import support

COMPONENTS = Path(__file__).resolve().parents[3] / "components"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
PATH = "components/main/hello/1.0.0.wasm"


def test_every_command_with_json_says_what_it_answers():
    able = {name for name, command in COMMANDS.items() if any("--json" in each.opts for each in command.params)}
    assert able == ANSWERS.keys()


def with_targets(value: object) -> object:
    """An example in which every target is one that a repository could hold."""
    match value:
        case dict():
            named = {"target", "running", "previous", "next"}
            return {k: PATH if k in named and isinstance(v, str) else with_targets(v) for k, v in value.items()}
        case list():
            return [with_targets(each) for each in value]
        case _:
            return value


def strings(value: object):
    match value:
        case dict():
            for each in value.values():
                yield from strings(each)
        case list():
            for each in value:
                yield from strings(each)
        case str():
            yield value


def check(name: str, text: str) -> dict[str, object]:
    """Hold an answer to what is documented of all answers."""
    found = json.loads(text)
    assert isinstance(found, dict), "a bare list"
    assert fits(name, found), (name, sorted(found))
    assert PATH not in strings(found)
    for each in strings(found):
        assert not re.match(r"\d{4}-\d\d-\d\d[T ]", each) or RFC3339.match(each), each
    return found


def full_name(words: tuple[str, ...]) -> str:
    """Full name of a command as people type it, in short."""
    words = tuple(word for word in words if not word.startswith("-"))
    one, two = words[0], " ".join(words[:2])
    short = {"device": "device show", "rollout": "rollout show", "group": "group change"}
    return two if two in COMMANDS else short.get(one, one)


@pytest.mark.parametrize("method", sorted(SHOWN.keys() - {"withdrawal"}))
def test_what_the_server_answers(fleet, desk, method):
    kind = answers(method)
    assert kind is not None
    where, words = SHOWN[method]
    desk.routes["POST", f"/v1/devices/{DEVICE}/command"] = support.full(operator_api.CommandReply)
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
    answer = with_targets(json.loads(msgspec.json.encode(support.full(kind))))
    desk.routes[where] = answer if kind is not LogView else LogView(lines=("one",), heard=True, ended=True)
    done = fleet(*words, "--json", stdin="a value\n")
    assert done.stdout, done.stderr
    found = check(full_name(words), done.stdout)
    if "target" in found:
        assert found["target"] == "main/hello@1.0.0"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copy(COMPONENTS / "demo" / "v1.wasm", "hello.wasm")
    shutil.copy(packed.guest_file("probe"), "probe.wasm")
    return tmp_path / "work"


LOCAL = (
    "component inspect hello.wasm",
    "component inspect hello.wasm --write",
    "component check hello.wasm",
    "component compose probe.wasm -o whole.wasm",
    "push hello.wasm --version 1.0.0 --group edge-eu --dry-run",
    "publish hello.wasm --version 1.0.0",
    "withdraw hello@1.0.0 --dry-run",
    "sbom show hello@1.0.0",
    "affected serde<1.0.200 --published",
    "server key director",
    "server backup -o fleet.tar",
    "operators add bob",
    "operators rotate bob",
    "operators revoke bob",
    "consumers add historian --group edge-eu --topic plant/# -o historian",
    "consumers revoke historian",
    "keys new alice",
    "keys show alice",
    "keys list",
    "keys import other director-2.pub",
    "keys rotate main --yes --out event.json",
    "keys rotate sensors --new-namespace --yes",
    "sign status",
    "sign renew --yes",
    "sign renew root --yes",
    "publisher keys --out .",
    "audit verify",
    "rollout simulate --group edge-eu --runs 1",
)


def test_what_commands_make_here(fleet, desk, home, work, monkeypatch):
    """In one home, one after the other."""
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse")
    row = operator_api.DeviceRow(id=DEVICE, name="gate", groups=("edge-eu",), online=True)
    bob = trust_api.OperatorRow(name="bob", role=trust_api.Role.VIEWER, created_at=datetime.now(UTC))
    nobody, somebody = trust_api.Operators(), trust_api.Operators(operators=(bob,))
    desk.routes |= {
        ("GET", "/v1/devices"): operator_api.Devices(devices=(row,)),
        ("GET", "/v1/rollouts"): operator_api.Rollouts(),
        ("GET", "/v1/components"): operator_api.Components(),
        ("GET", "/v1/operators"): [nobody, somebody, somebody],
        ("PUT", "/v1/operators/bob"): trust_api.OperatorReply(name="bob", role=trust_api.Role.VIEWER, token="t" * 20),
        ("GET", "/v1/status"): support.full(operator_api.Status),
        ("POST", "/v1/consumers"): support.full(trust_api.ConsumerReply),
        ("GET", "/v1/consumers"): trust_api.Consumers(
            consumers=(msgspec.structs.replace(support.full(trust_api.ConsumerView), name="historian"),)
        ),
        ("POST", "/v1/consumers/historian/revoke"): trust_api.Consumers(),
        ("POST", "/v1/operators/bob/remove"): nobody,
        ("GET", "/v1/withdrawal"): operator_api.WithdrawalView(target=PATH),
    }
    for line in LOCAL:
        words = line.split()
        done = fleet(*words, "--json")
        assert done.stdout, (line, done.stderr)
        found = check(full_name(tuple(words)), done.stdout)
        if words[:2] == ["server", "key"]:
            Path("director-2.pub").write_text(str(found["public"]))


@pytest.mark.parametrize(
    ("words", "kind", "exit_code", "more"),
    [
        ("no-such-verb", "usage", 2, {}),
        ("devices --no-such-option", "usage", 2, {}),
        ("deploy hello --group edge-eu", "usage", 2, {}),
        ("component inspect none.wasm", "usage", 2, {}),
        ("device gate-00000000", "refused", 4, {"problem": "not-found"}),
        ("status", "unreachable", 3, {}),
        ("completion tcsh", "usage", 2, {}),
        ("withdraw hello@1.0.0", "refused", 4, {}),
    ],
)
def test_errors_are_one_line_of_json_on_standard_error(words, kind, exit_code, more, fleet, desk, home):
    desk.routes["GET", "/v1/status"] = httpx.ConnectError("refused")
    desk.routes["GET", "/v1/devices/gate-00000000"] = problem("not-found", "no such device", 404)
    done = fleet(*words.split(), "--json")
    assert (done.exit_code, done.stdout) == (exit_code, "")
    (line,) = done.stderr.splitlines()
    error = json.loads(line)["error"]
    assert error == {"message": error["message"], "kind": kind, "exit_code": exit_code, **more}
    assert error["message"]
    assert not fleet(*words.split()).stderr.startswith("{")


def test_an_error_carries_what_is_to_be_saved(fleet, home, work):
    shutil.copy(COMPONENTS / "demo" / "ticker.wasm", "ticker.wasm")
    done = fleet("publish", "ticker.wasm", "--json")
    assert done.stdout == ""
    assert "[" in json.loads(done.stderr)["error"]["extra"]


def test_what_belongs_to_somebody_else_keeps_its_text(fleet, desk):
    item = operator_api.Effective(instance="a", target=PATH, source="pin", config={"target": PATH})
    row = operator_api.DeviceRow(id=DEVICE, name="gate", labels={"target": PATH})
    desk.routes["GET", f"/v1/devices/{DEVICE}"] = operator_api.DeviceDetail(
        row=row, enrolled_at=datetime.now(UTC), effective=(item,)
    )
    found = json.loads(fleet("device", DEVICE, "--json").stdout)
    assert found["effective"][0]["target"] == "main/hello@1.0.0"
    assert found["effective"][0]["config"] == found["row"]["labels"] == {"target": PATH}
