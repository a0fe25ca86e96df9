"""`fleet-host check-component` says of a component what a device says when it starts it."""

import subprocess
import sys

import msgspec
import pytest
import support
from wasmtime import wat2wasm

from agent.host.compiler import component_check
from agent.host.ipc import host_api
from fleet.component import reader, wasi
from fleet.protocol.component_check import ComponentCheckReply, ComponentCheckRequest, Step
from fleet.protocol.manifest import ConfigKey, Grants, Health, Http, Limits, Manifest, Schedule, Service
from tests import odd_components

COMMAND = [sys.executable, "-m", "agent.host.cli", "check-component"]


def ask(*arguments, stdin=b""):
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, check=False, timeout=300)
    return done.returncode, [msgspec.json.decode(line, type=ComponentCheckReply) for line in done.stdout.splitlines()]


def check(path, manifest=None):
    request = ComponentCheckRequest(file=str(path), manifest=manifest)
    status, (reply,) = ask(stdin=msgspec.json.encode(request) + b"\n")
    assert status == int(not reply.ok)
    return reply


def manifest(component, **more):
    names = tuple(dict.fromkeys(map(reader.bare, reader.read(component).imports)))
    given = {"trigger": Http(), "grants": Grants(interfaces=tuple(name for name in names if ":" in name))}
    return Manifest(name="odd", version="1.0.0", **(given | more))


@pytest.fixture
def saved(tmp_path):
    def save(data):
        (tmp_path / "odd.wasm").write_bytes(data)
        return tmp_path / "odd.wasm"

    return save


def guest(name):
    return bytes(wat2wasm((support.GUESTS / f"{name}.wat").read_text()))


def test_a_component_that_runs_is_compiled_and_started(saved):
    reply = check(saved(odd_components.server()))
    assert (reply.ok, reply.problem, reply.step) == (True, "", None)
    assert reply.exports == ("wasmfleet:http/handler",)
    assert reply.engine
    assert reply.machine
    assert reply.image_bytes > 10_000


def test_middleware_with_what_it_calls_composed_runs(saved):
    assert check(saved(odd_components.middleware_composed())).problem == ""


def test_a_composition_that_imports_after_it_has_made_an_instance_runs(saved):
    data = odd_components.composed_with_late_import()
    assert check(saved(data), manifest(data)).problem == ""


def test_a_composition_whose_import_has_a_type_of_its_own_is_refused_in_words(saved):
    reply = check(saved(odd_components.composed_with_late_import(foreign=True)))
    assert (reply.ok, reply.step) == (False, Step.COMPILE)
    assert "the type t of an import is an instance's of its own" in reply.problem


@pytest.mark.parametrize("kind", odd_components.UNSERVED)
def test_an_import_that_no_device_serves(saved, kind):
    text, sentence = odd_components.UNSERVED[kind]
    reply = check(saved(odd_components.server(text)))
    assert (reply.ok, reply.step, reply.code) == (False, Step.LINK, "start-failed")
    assert sentence in reply.problem


@pytest.mark.parametrize("kind", odd_components.UNLINKED)
def test_what_only_the_linker_knows_is_said_as_on_a_device(host, saved, kind):
    text, sentence = odd_components.UNLINKED[kind]
    data = odd_components.server(text)
    reply = check(saved(data), manifest(data))
    assert (reply.ok, reply.step) == (False, Step.LINK)
    assert reply.problem.startswith(sentence)
    refused = host.start(data, support.a_run("odd", 1, grants=manifest(data).grants))
    assert isinstance(refused, host_api.Failed)
    assert refused.message == f"odd: {reply.problem}"


def test_informational_answers_of_a_later_wasi_http_are_refused_in_words(saved):
    reply = check(saved(odd_components.server(types=odd_components.INFORMATIONAL)))
    assert (reply.step, reply.code) == (Step.COMPILE, "compile-failed")
    assert reply.problem.startswith(
        "it imports [method]response-outparam.send-informational of wasi:http/types@0.2.12, which this host does not"
    )


@pytest.mark.parametrize(
    ("name", "step", "sentence"),
    [
        ("declares-1gib", Step.LINK, "its memory begins with more than limits.memory, which is 16MiB: raise it"),
        (
            "huge-table",
            Step.LINK,
            "a table begins with 10000000 elements, at most 100000 are allowed (limits.table_elements)",
        ),
        ("trap-in-start", Step.START, "it failed in its start: wasm trap: wasm `unreachable`"),
        ("spin-in-start", Step.START, "it failed in its start: it used up its time"),
    ],
)
def test_limits_and_starts_are_judged_as_on_a_device(host, saved, name, step, sentence):
    data = guest(name)
    limits = Limits(start_ms=500)
    reply = check(saved(data), manifest(data, limits=limits))
    assert (reply.ok, reply.step) == (False, step)
    assert reply.problem.startswith(sentence)
    refused = host.start(data, support.a_run("odd", 1, limits=limits))
    assert isinstance(refused, host_api.Failed)
    assert reply.problem.removeprefix("it failed in its start: ") in refused.message


WRONG_HANDLER = """(component
  (core module $m (func (export "f") (param i32) (result i32) (local.get 0)))
  (core instance $i (instantiate $m))
  (func $f (param "request" u32) (result u32) (canon lift (core func $i "f")))
  (instance $handler (export "handle" (func $f)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))"""


def test_an_export_of_another_type_shows_the_expected_wit(host, saved):
    data = bytes(wat2wasm(WRONG_HANDLER))
    reply = check(saved(data), manifest(data))
    assert (reply.ok, reply.step) == (False, Step.LINK)
    assert "expected func(request: record { method: string" in reply.problem
    assert "found func(request: u32) -> u32" in reply.problem
    refused = host.start(data, support.a_run("odd", 1))
    assert refused.message == f"odd: {reply.problem}"


def test_a_trigger_or_a_health_check_that_it_does_not_export(saved):
    data = odd_components.server()
    reply = check(saved(data), manifest(data, trigger=Schedule(every_ms=1000)))
    assert reply.problem == "it exports no wasmfleet:schedule/task and no wasi:cli/run, which its trigger asks for"
    reply = check(saved(data), manifest(data, health=Health(check=True)))
    assert reply.problem == "it exports no wasmfleet:http/health, which its manifest asks for"


@pytest.mark.parametrize("trigger", [Schedule(every_ms=1000), Service()])
def test_a_main_is_started_and_not_run(saved, trigger):
    data = guest("command")
    reply = check(saved(data), manifest(data, trigger=trigger))
    assert (reply.ok, reply.problem, reply.exports) == (True, "", ("wasi:cli/run",))


def test_a_grant_that_its_manifest_lacks(saved):
    data = guest("flood")
    reply = check(saved(data), manifest(data, grants=Grants()))
    assert reply.code == "grant-denied"
    assert "wasi:logging/logging@0.1.0-draft, which is not granted" in reply.problem


@pytest.mark.parametrize("name", ["wants-clock", "wants-everything"])
def test_imports_of_standard_libraries_need_no_grant(saved, name):
    data = guest(name)
    assert check(saved(data), manifest(data, grants=Grants())).problem == ""


def test_fuel_and_configuration_are_the_manifests(saved):
    data = guest("config")
    config = {"greeting": ConfigKey(default="hello")}
    assert check(saved(data), manifest(data, limits=Limits(fuel=1_000_000), config=config)).problem == ""


@pytest.mark.parametrize(
    ("data", "code", "sentence"),
    [
        (b"", "not-a-component", "odd.wasm is empty"),
        (b"\0asm\x01\0\0\0", "not-a-component", "odd.wasm is a core module"),
        (b"\x7fELF", "not-a-component", "odd.wasm is a native program"),
        (odd_components.server()[:-5], "not-a-component", "odd.wasm is a damaged component"),
        (bytes(wat2wasm('(component (import "wasi:cli/run@0.3.0" (instance)))')), "not-a-component", "WASI 0.3"),
    ],
)
def test_what_is_no_component_is_said_by_its_reader(saved, data, code, sentence):
    reply = check(saved(data))
    assert (reply.ok, reply.step, reply.code) == (False, Step.READ, code)
    assert sentence in reply.problem


def test_one_line_for_each_component_in_order_whatever_became_of_the_one_before(tmp_path):
    for number, data in enumerate((guest("trap-in-start"), guest("hello"), b"none")):
        (tmp_path / f"{number}.wasm").write_bytes(data)
    files = [tmp_path / f"{number}.wasm" for number in range(3)]
    status, replies = ask(*files)
    assert status == 1
    assert [(reply.file, reply.ok) for reply in replies] == [
        (str(files[0]), False),
        (str(files[1]), True),
        (str(files[2]), False),
    ]
    assert ask(files[1])[0] == 0
    status, (missing,) = ask(tmp_path / "missing.wasm")
    assert (status, missing.code) == (1, "not-found")
    assert ask(stdin=b"{}\n")[0] == 2


def test_a_request_that_is_not_valid_is_named_by_its_line(tmp_path):
    good = msgspec.json.encode(ComponentCheckRequest(file=str(tmp_path / "missing.wasm")))
    done = subprocess.run(COMMAND, input=good + b"\nhello.wasm\n", capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"fleet-host: line 2 is no request: JSON is malformed")
    assert b'write {"file": "hello.wasm"}' in done.stderr


def test_a_host_says_which_packages_it_serves(host):
    welcome = host.ask(host_api.Hello)
    assert welcome.interfaces == (*wasi.SERVED, *wasi.CALLED)


def test_what_a_step_says_without_end_is_kept_within_a_bound():
    """A component may write to standard error while it starts, as much as its time allows."""
    program = (
        "import sys\nfor n in range(300): sys.stderr.write('x' * 100_000)\nprint('out')\nsys.exit('the last words')"
    )
    done = component_check._run([sys.executable, "-c", program], b"", Step.START)
    assert (done.returncode, done.stdout) == (1, b"out\n")
    assert len(done.stderr) <= 64 * 1024
    assert done.stderr.endswith(b"the last words\n")
