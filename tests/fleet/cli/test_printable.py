"""What devices, publishers and a server wrote reaches a terminal only as printable text, by whichever command.

Reflection over the client's methods: a method whose answer no command here shows fails the test.
"""

import inspect
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fleet.cli import output
from fleet.client import Client
from fleet.protocol import operator_api, printable
from fleet.protocol.messages import LogView, Report
from tests.fleet.cli.shown import DEVICE, SHOWN, answers
from tests.golden import support
from tests.signing.sealing_device import Device

HOSTILE = "a\x1b[2J\x1b[31mb\x9b1mc\u202ed\r\n  forged-0a0a0a0a  online\x07\u2028e\x7f\x00\u200f\tf\u2066"
DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
JOINED = re.compile(r"(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
STYLE = re.compile(r"\x1b\[(?:0|1|2|3[0-7]|9[0-7]|[0-9]+(?:;[0-9]+)+)m")

# Answers of which no command prints a text: numbers, hashes, tokens and what is verified before it is used.
SILENT = {
    "audit", "install_issuing", "revoke_issuer", "countersign", "discard_waiting", "set_operator", "remove_operator",
    "add_consumer", "revoke_consumer", "upload", "publish_role", "publish_event", "sealing_keys", "history",
    "preflight", "freezes",
}  # fmt: skip


# Answers with a text of the device, shown at the end of a long poll: tests of their own.
ELSEWHERE = {"archive_view", "messages"}  # test_archive.py, test_messages.py


def spoiled(kind: type[msgspec.Struct]) -> list[bytes]:
    """Answers with every field set, and one hostile text each: in each of the places that can hold one."""
    sound = json.loads(msgspec.json.encode(support.full(kind)))
    return [msgspec.json.encode(_with(sound, path)) for path in texts(sound) if _decodes(kind, _with(sound, path))]


def texts(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    match value:
        case dict():
            return [found for key, each in value.items() for found in texts(each, (*path, key))]
        case list():
            return [found for number, each in enumerate(value) for found in texts(each, (*path, number))]
        case str():
            return [path]
        case _:
            return []


def _with(sound: Any, path: tuple[Any, ...]) -> Any:
    tree = json.loads(json.dumps(sound))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] += HOSTILE
    return tree


def _decodes(kind: type, tree: Any) -> bool:
    try:
        msgspec.json.decode(msgspec.json.encode(tree), type=kind)
    except msgspec.ValidationError:
        return False  # a time or a word of a closed vocabulary
    return True


METHODS = [
    name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_") and answers(name)
]


def assert_printable(text: str, *, styled: bool = False) -> None:
    plain = STYLE.sub("", text) if styled else text
    odd = {each for each in plain if not each.isprintable() and each != "\n"}
    assert not odd, (odd, text)
    # on a terminal, where long cells wrap, a line may begin with anything
    assert styled or not [line for line in plain.splitlines() if line.lstrip().startswith("forged-0a0a0a0a")], text


def test_every_answer_of_the_server_is_shown_by_a_command_here() -> None:
    assert set(METHODS) == SHOWN.keys() | SILENT | ELSEWHERE


@pytest.mark.parametrize("name", SHOWN)
def test_no_text_of_an_answer_reaches_the_output_raw(fleet, desk, name, tmp_path):
    kind = answers(name)
    assert kind is not None
    where, words = SHOWN[name]
    if name == "withdrawal":
        assert (
            fleet("publish", shutil.copy(DEMO / "v1.wasm", tmp_path / "hello.wasm"), "--version", "1.0.0").exit_code
            == 0
        )
    shown = 0
    desk.routes["POST", f"/v1/devices/{DEVICE}/command"] = support.full(operator_api.CommandReply)
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
    for data in spoiled(kind):
        desk.routes[where] = msgspec.Raw(data)
        for more in ((), ("--json",)):
            result = fleet(*words, *more, stdin="a value\n")
            assert_printable(result.stdout)
            assert_printable(result.stderr)
            shown += "forged" in result.output
    assert shown or name == "command", "the hostile text was shown nowhere"


@pytest.mark.parametrize("name", ["devices", "device", "rollout", "rollouts", "status", "timeline"])
def test_nor_on_a_terminal(fleet, desk, name, monkeypatch):
    kind = answers(name)
    assert kind is not None
    where, words = SHOWN[name]
    for data in spoiled(kind):
        desk.routes[where] = msgspec.Raw(data)
        monkeypatch.setattr(output, "console", lambda: Console(force_terminal=True, highlight=False, width=80))
        assert_printable(fleet(*words).stdout, styled=True)


def test_what_a_device_signed_of_itself_is_printable_in_the_audit(fleet, desk):
    device = Device()
    sound = json.loads(msgspec.json.encode(support.full(Report)))
    trees = [_with(sound, path) for path in texts(sound) if _decodes(Report, _with(sound, path))]
    assert len(trees) > 5
    for number, tree in enumerate(trees, 1):
        report = {**tree, "sequence": number, "phase": "committed", "progress": None}
        signed = device.signer.sign(json.dumps(report).encode())
        history = operator_api.History(
            device=device.id, certificate_pem=device.certificate.decode(), reports=(msgspec.Raw(signed),)
        )
        desk.routes["GET", "/v1/devices"] = operator_api.Devices()
        desk.routes["GET", f"/v1/devices/{device.id}/reports"] = history
        for more in ((), ("--json",)):
            result = fleet("audit", "verify", device.id, *more)
            assert_printable(result.output)


def test_json_keeps_every_character_escaped(fleet, desk):
    view = LogView(lines=(HOSTILE,), heard=True, ended=True)
    desk.routes["POST", f"/v1/devices/{DEVICE}/command"] = support.full(operator_api.CommandReply)
    desk.routes["GET", f"/v1/devices/{DEVICE}/logs"] = view
    result = fleet("logs", "hello", "--device", DEVICE, "--json")
    assert_printable(result.stdout)
    assert json.loads(result.stdout)["line"] == HOSTILE


def test_an_error_of_the_server_is_one_printable_line(fleet, desk):
    problem = operator_api.Problem(type="x", title=HOSTILE, status=409, detail=HOSTILE, action=HOSTILE)
    desk.routes["GET", "/v1/status"] = problem
    for more in ((), ("--json",)):
        result = fleet("status", *more)
        assert result.exit_code == 4
        assert_printable(result.stderr)
        assert len(result.stderr.splitlines()) == 1


def test_a_followed_rollout_is_printable(fleet, desk):
    for data in spoiled(operator_api.RolloutView):
        view = msgspec.json.decode(data, type=operator_api.RolloutView)
        desk.views = [msgspec.structs.replace(view, state="in-progress", revision=1), view]
        desk.routes.pop(("GET", "/v1/rollouts/7"), None)
        result = fleet("rollout", "show", "7", "--follow")
        assert_printable(result.stdout)
        assert_printable(result.stderr)


def test_a_log_record_is_one_line_whatever_a_device_put_into_it():
    formatter = printable.PrintableFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "dropped from %s", (HOSTILE,), None)
    assert_printable(formatter.format(record))
    assert "\n" not in formatter.format(record)
    with pytest.raises(ValueError, match="a") as raised:
        int(HOSTILE)
    record.exc_info = (ValueError, raised.value, raised.tb)
    text = formatter.format(record)
    assert not {each for each in text if not each.isprintable() and each != "\n"}
    assert "Traceback" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u00a0b\u3000c\u2009d", "a b c d"),
        ("\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),  # Persian: a non-joiner within a word
        ("\u0915\u094d\u200d\u0937", None),  # Devanagari: a joiner after a virama
        ("\U0001f469\u200d\U0001f4bb", None),  # woman + computer
        ("\u2764\ufe0f\u200d\U0001f525", None),
        ("ad\u200dmin", "ad\\u200dmin"),
        ("\u200d\u0646\u200c", "\\u200d\u0646\\u200c"),
        ("\u0646\u200c\u200c\u0646", "\u0646\\u200c\\u200c\u0646"),
        ("\u0646\u200c\u202e", "\u0646\\u200c\\u202e"),
        ("\u0646\u200b\u0646", "\u0646\\u200b\u0646"),
    ],
)
def test_spaces_are_plain_and_joiners_stay_within_words_alone(text, shown):
    assert printable.printable(text) == (text if shown is None else shown)


@given(st.text())
def test_a_text_becomes_one_printable_line_and_printable_text_stays(text):
    shown = printable.printable(text)
    assert JOINED.sub("", shown).isprintable()
    assert printable.printable(shown) == shown
    assert shown == text or not text.isprintable()


@given(st.text() | st.dictionaries(st.text(), st.text()))
def test_json_text_is_the_same_value_and_printable(value):
    shown = printable.json_text(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    assert json.loads(shown) == value
    assert all(each.isprintable() or each == "\n" for each in shown)


@given(st.text())
def test_json_that_is_called_plain_needs_no_cleaning(text):
    data = msgspec.json.encode([text])
    assert not printable.is_plain(data) or printable.cleaned([text]) == [text]
