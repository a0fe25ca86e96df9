"""Components whose exports have the right names but wrong types are refused before their code runs.

Values cross by hand-laid structures (`agent.host.engine.codec`): a type that is not checked is memory read as what it
is not.
"""

import ctypes
import dataclasses

import pytest
import support
from wasmtime import _ffi as ffi

from agent.host.engine import codec
from agent.host.ipc import host_api
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Schedule

OUTCOME = "(result (error string))"
HANDLE_TYPE = (
    "func(request: record { method: string, target: string, headers: string, body: list<u8> })"
    " -> record { status: u16, headers: string, body: list<u8> }"
)


def record(*fields):
    inner = " ".join(f'(field "{name}" {kind})' for name, kind in fields)
    return f"(record {inner})"


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to export: its parameters take `flat` core values, and `types` stand beside it by name."""

    interface: str
    name: str
    flat: tuple[str, ...]
    params: str
    result: str
    types: tuple[tuple[str, str], ...] = ()


STATUS, HEADERS, BODY = ("status", "u16"), ("headers", "string"), ("body", "(list u8)")
METHOD, TARGET = ("method", "string"), ("target", "string")


REQUEST = ("request", record(METHOD, TARGET, HEADERS, BODY))
HANDLE = Function(
    "wasmfleet:http/handler@0.1.0",
    "handle",
    ("i32",) * 8,
    '(param "request" $request)',
    "$response",
    (REQUEST, ("response", record(STATUS, HEADERS, BODY))),
)
HEALTH = Function("wasmfleet:http/health@0.1.0", "check", (), "", OUTCOME)
TASK = Function("wasmfleet:schedule/task@0.1.0", "run", ("i64",), '(param "scheduled-ms" u64)', OUTCOME)
SAVE = Function("wasmfleet:state/state@0.1.0", "save-state", (), "", "(result (list u8) (error string))")
LOAD = Function("wasmfleet:state/state@0.1.0", "load-state", ("i32", "i32"), '(param "state" (list u8))', OUTCOME)
changed = dataclasses.replace


def answering(*fields):
    return changed(HANDLE, types=(REQUEST, ("response", record(*fields))))


def taking(*fields, flat=8):
    return changed(HANDLE, types=(("request", record(*fields)), HANDLE.types[1]), flat=("i32",) * flat)


def component(*functions, start=""):
    """Write a component that exports these; each answers with what lies at 64, a response of 60,000 bytes."""
    core, lifted, exported = [], [], []
    for number, each in enumerate(functions):
        back = "(result i32) (i32.const 64)" if each.result else ""
        core.append(f'(func (export "f{number}") (param {" ".join(each.flat)}) {back})')
        lifted += [f"(type ${name} {kind})" for name, kind in each.types]
        lifted.append(
            f"(func $f{number} {each.params} {f'(result {each.result})' if each.result else ''}"
            f' (canon lift (core func $guest "f{number}") (memory (core memory $guest "memory"))'
            ' (realloc (core func $guest "realloc"))))'
        )
        types = " ".join(f'(export "{name}" (type ${name}))' for name, _ in each.types)
        exported.append(f'(instance $i{number} {types} (export "{each.name}" (func $f{number})))')
        exported.append(f'(export "{each.interface}" (instance $i{number}))')
    return f"""
    (component
      (core module $guest
        (memory (export "memory") 4)
        (data (i32.const 64) "\\c8\\00\\00\\00" "\\00\\00\\00\\00\\00\\00\\00\\00" "\\00\\01\\00\\00\\60\\ea\\00\\00")
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 65536))
        {" ".join(core)}
        {start})
      (core instance $guest (instantiate $guest))
      {" ".join(lifted)}
      {" ".join(exported)})"""


WRONG = [
    pytest.param(answering(*answer), found, id=name)
    for name, answer, found in [
        ("a string for the body", (STATUS, HEADERS, ("body", "string")), "body: string }"),
        ("a wider status", (("status", "u32"), HEADERS, BODY), "status: u32"),
        ("no headers", (STATUS, BODY), "-> record { status: u16, body: list<u8> }"),
        ("a field more", (STATUS, HEADERS, BODY, ("more", "u8")), "more: u8"),
        ("another order", (HEADERS, STATUS, BODY), "-> record { headers: string, status: u16, body"),
        ("headers as a list", (STATUS, ("headers", "(list string)"), BODY), "headers: list<string>"),
        ("wider bytes", (STATUS, HEADERS, ("body", "(list u16)")), "body: list<u16>"),
        ("a list of strings", (STATUS, HEADERS, ("body", "(list string)")), "body: list<string>"),
        ("a body that may be missing", (STATUS, HEADERS, ("body", "(option (list u8))")), "body: option<list<u8>>"),
        ("a body of pairs", (STATUS, HEADERS, ("body", "(list (tuple u8 u8))")), "body: list<tuple<u8, u8>>"),
    ]
] + [
    pytest.param(handler, found, id=name)
    for name, handler, found in [
        (
            "an answer that may be missing",
            changed(HANDLE, result="(option $response)"),
            "-> option<record { status: u16",
        ),
        ("a string", changed(HANDLE, result="string"), "-> string"),
        ("nothing", changed(HANDLE, result=""), "body: list<u8> });"),
        ("a request of another order", taking(TARGET, METHOD, HEADERS, BODY), "record { target: string"),
        ("a request with a text", taking(METHOD, TARGET, HEADERS, ("body", "string")), "body: string"),
        ("a request without headers", taking(METHOD, TARGET, BODY, flat=6), "target: string, body"),
        (
            "a string to take",
            changed(HANDLE, params='(param "head" string)', flat=("i32", "i32")),
            "func(head: string)",
        ),
        ("nothing to take", changed(HANDLE, params="", flat=()), "func() ->"),
    ]
]


@pytest.mark.parametrize(("handler", "found"), WRONG)
def test_a_handler_of_another_type_is_refused_with_both_types(host, handler, found):
    reply = host.start(component(handler), support.a_run("wrong", 1))
    assert isinstance(reply, host_api.Failed), reply
    assert reply.code is RejectCode.START_FAILED
    assert f"expected {HANDLE_TYPE}" in reply.message
    assert found in reply.message.partition("found ")[2]


OTHERS = [
    (changed(HEALTH, result="u32"), "func() -> result<_, string>", "func() -> u32"),
    (changed(HEALTH, result="(result string (error string))"), "func() -> result<_, string>", "result<string, string>"),
    (changed(HEALTH, params='(param "deep" u32)', flat=("i32",)), "func() -> result<_, string>", "func(deep: u32)"),
    (
        changed(TASK, params='(param "scheduled-ms" u32)', flat=("i32",)),
        "func(scheduled-ms: u64)",
        "func(scheduled-ms: u32)",
    ),
    (
        changed(TASK, params='(param "when" string)', flat=("i32", "i32")),
        "func(scheduled-ms: u64)",
        "func(when: string)",
    ),
    (changed(TASK, result="(list string)"), "-> result<_, string>", "-> list<string>"),
    (changed(SAVE, result="(list u8)"), "func() -> result<list<u8>, string>", "func() -> list<u8>"),
    (changed(SAVE, result="(result string (error string))"), "-> result<list<u8>, string>", "result<string, string>"),
    (changed(SAVE, result="(result (list u8))"), "-> result<list<u8>, string>", "result<list<u8>, _>"),
    (changed(LOAD, params='(param "state" string)'), "func(state: list<u8>)", "func(state: string)"),
    (changed(LOAD, result="(result (error (list u8)))"), "-> result<_, string>", "result<_, list<u8>>"),
]


@pytest.mark.parametrize(("function", "expected", "found"), OTHERS)
def test_whatever_else_the_host_would_call_is_of_its_type_too(host, function, expected, found):
    trigger = Schedule(every_ms=3_600_000) if function.name == "run" else Http()
    handler = () if function.name == "run" else (HANDLE,)
    reply = host.start(component(*handler, function), support.a_run("wrong", 1, trigger=trigger))
    assert isinstance(reply, host_api.Failed), reply
    assert reply.code is RejectCode.START_FAILED
    said, _, actual = reply.message.partition("found ")
    assert expected in said
    assert found in actual


def test_none_of_its_code_runs_before(host):
    traps = "(func $go (unreachable)) (start $go)"
    reply = host.start(component(changed(HANDLE, result="string"), start=traps), support.a_run("wrong", 1))
    assert "another type of handle" in reply.message


def test_a_type_without_end_is_named_in_few_words(host):
    fields = [(f"number-{number}", "(tuple u8 u16 u32 u64)") for number in range(60)]
    reply = host.start(component(answering(*fields)), support.a_run("wrong", 1))
    assert isinstance(reply, host_api.Failed), reply
    assert len(reply.message) < 900
    assert reply.message.partition("found ")[2].count("...") == 1


def test_parameters_may_have_names_of_their_own(host):
    named = changed(HANDLE, params='(param "asked" $request)')
    reply = host.start(component(named), support.a_run("own", 1))
    assert isinstance(reply, host_api.Started), reply
    status, _, body = support.http(host.port, "GET /own/ HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (status, body) == (200, bytes(60_000))


CONFIG_ERROR = "variant { upstream(string), io(string) }"
TAKEN = [
    ("wasi:config/store@0.2.0-draft", "get", '(param "key" string) (result u32)', f"option<string>, {CONFIG_ERROR}>"),
    ("wasi:config/store@0.2.0-rc.1", "get", '(param "key" string) (result (option string))', CONFIG_ERROR),
    (
        "wasi:config/runtime@0.2.0-draft",
        "get-all",
        "(result (list (tuple string string)))",
        "list<tuple<string, string>>,",
    ),
    (
        "wasi:logging/logging@0.1.0-draft",
        "log",
        '(param "level" u8) (param "text" string)',
        "level: enum { trace, debug",
    ),
]


@pytest.mark.parametrize(("interface", "name", "kind", "expected"), TAKEN)
def test_what_the_host_serves_itself_is_imported_by_its_type(host, interface, name, kind, expected):
    """Or a call of it would fail in the host, in the middle of the component's own."""
    imported = f'(import "{interface}" (instance (export "{name}" (func {kind}))))'
    guest = component(HANDLE).replace("(component\n", f"(component {imported}\n", 1)
    grants = Grants(interfaces=("wasi:config", "wasi:logging"))
    reply = host.start(guest, support.a_run("wrong", 1, grants=grants))
    assert isinstance(reply, host_api.Failed), reply
    assert reply.code is RejectCode.START_FAILED
    said, _, found = reply.message.partition("found ")
    assert f"it imports {interface} with another type of {name}" in said
    assert expected in said
    assert found.startswith("func(")


def value(kind, **of):
    made = ffi.wasmtime_component_val_t()
    made.kind = kind
    for name, content in of.items():
        setattr(made.of, name, content)
    return made


def a_record(**fields):
    """Lay out a record as the engine does; what it points to is kept beside it."""
    entries = (ffi.wasmtime_component_valrecord_entry * len(fields))()
    names = [ctypes.create_string_buffer(name.encode(), len(name)) for name in fields]
    for entry, name, content in zip(entries, names, fields.values(), strict=True):
        entry.name.size = len(name)
        codec._point(entry.name, name)
        entry.val = content
    made = value(ffi.WASMTIME_COMPONENT_RECORD)
    made.of.record.size = len(fields)
    made.of.record.data = entries
    return made, (entries, names)


U16, TEXT = value(ffi.WASMTIME_COMPONENT_U16, u16=200), value(ffi.WASMTIME_COMPONENT_STRING)
BYTES = value(ffi.WASMTIME_COMPONENT_LIST)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": U16, "headers": TEXT, "body": TEXT},
        {"status": TEXT, "headers": TEXT, "body": BYTES},
        {"status": U16, "headers": BYTES, "body": BYTES},
        {"status": U16, "body": BYTES},
    ],
)
def test_the_codec_reads_a_value_by_its_own_kind_alone(fields):
    """Nothing relies on the check before the call alone."""
    made, kept = a_record(**fields)
    with pytest.raises(codec.WrongKindError):
        codec._read(made)
    good, kept = a_record(status=U16, headers=TEXT, body=BYTES)
    assert codec._read(good) == (200, b"", b"")
    del kept


def test_a_list_of_something_else_is_no_bytes():
    element = value(ffi.WASMTIME_COMPONENT_U16, u16=7)
    listed = value(ffi.WASMTIME_COMPONENT_LIST)
    listed.of.list.size = 1
    codec._point(listed.of.list, element)
    with pytest.raises(codec.WrongKindError):
        codec._bytes(listed)
