"""What the reader says of components, and of files that are none."""

import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasmtime import wat2wasm

from fleet.component import binary, reader, wasi
from fleet.component.reader import Fault, NotAComponentError
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants

COMPONENTS = Path(__file__).resolve().parents[3] / "components"
FIXTURES = {path.name: path.read_bytes() for path in (COMPONENTS / "demo").glob("*.wasm")}
GUESTS = {path.stem: bytes(wat2wasm(path.read_text())) for path in (COMPONENTS / "guests").glob("*.wat")}


def refusal(data, file_name="thing.wasm"):
    with pytest.raises(NotAComponentError) as caught:
        reader.read(data, file_name=file_name)
    message = str(caught.value)
    assert message.startswith(file_name)
    assert "\n" not in message
    return caught.value.fault, message


def test_a_demo_component():
    v1 = reader.read(FIXTURES["v1.wasm"])
    assert v1.imports == ()
    assert v1.exports == ("wasmfleet:http/handler@0.1.0", "wasmfleet:http/health@0.1.0")
    assert v1.size_bytes == len(FIXTURES["v1.wasm"])
    assert len(v1.modules) == 1
    assert 0 < v1.modules[0] < v1.size_bytes
    assert any(made.startswith("processed-by wit-component ") for made in v1.producers)
    assert v1.exported("wasmfleet:http/handler") == "wasmfleet:http/handler@0.1.0"
    assert v1.exported("wasi:http/incoming-handler") is None


def test_imports_keep_their_versions():
    ticker = reader.read(FIXTURES["ticker.wasm"])
    assert ticker.imports == ("wasi:logging/logging@0.1.0-draft",)
    assert reader.read(GUESTS["wants-clock"]).imports == ("wasi:clocks/monotonic-clock@0.2.0",)


def test_every_kind_of_import_and_export_is_passed_over_correctly():
    data = wat2wasm("""
        (component
          (import "module" (core module (export "f" (func))))
          (import "a-func" (func $f (param "x" u32)))
          (import "a-resource" (type $r (sub resource)))
          (import "an-alias" (type (eq $r)))
          (import "a-component" (component $c))
          (import "wasi:cli/stdout@0.2.3" (instance $i (export "x" (func))))
          (component $inner (core module) (component))
          (export "one" (func $f))
          (export "two" (type $r))
          (export "three" (component $c))
          (export "ns:pkg/four@1.2.3-rc.1" (instance $i)))""")
    seen = reader.read(bytes(data))
    assert seen.imports == ("module", "a-func", "a-resource", "an-alias", "a-component", "wasi:cli/stdout@0.2.3")
    assert seen.exports == ("one", "two", "three", "ns:pkg/four@1.2.3-rc.1")
    assert (len(seen.modules), seen.components) == (1, 2)


def test_names_with_options_are_read():
    data = wat2wasm("""
        (component
          (import "primary" (implements "test:test/face") (instance))
          (import "backup" (implements "test:test/face@1") (versionsuffix ".2.3") (instance))
          (import "test:test/other@1" (versionsuffix ".2.3") (instance)))
    """)
    assert reader.read(bytes(data)).imports == ("primary", "backup", "test:test/other@1.2.3")


def test_what_is_missing_from_the_grants():
    ticker = reader.read(FIXTURES["ticker.wasm"])
    assert ticker.missing(Grants()) == ("wasi:logging/logging@0.1.0-draft",)
    assert ticker.missing(Grants(interfaces=("wasi:logging",))) == ()
    assert ticker.missing(Grants(interfaces=("wasi:logging/logging",))) == ()
    assert ticker.missing(Grants(interfaces=("wasi:log",))) == ("wasi:logging/logging@0.1.0-draft",)


def test_imports_of_standard_libraries_need_no_grant_and_others_do():
    libraries = tuple(f"{name}@0.2.3" for name in sorted(wasi.UNGRANTED))
    others = ("wasi:logging/logging@0.1.0-draft", "wasi:config/store@0.2.0-rc.1", "wasi:keyvalue/store@0.2.0")
    wanted = reader.Component(size_bytes=1, imports=(*libraries, *others), exports=())
    assert wanted.missing(Grants()) == others
    assert {"wasi:cli/exit", "wasi:sockets/tcp", "wasi:http/outgoing-handler", "wasi:random/random"} < wasi.UNGRANTED


def test_an_interface_known_only_for_its_types_needs_no_grant():
    seen = reader.read(
        bytes(
            wat2wasm("""
        (component
          (import "my:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
          (alias export $error "error" (type $error-type))
          (import "my:clocks/monotonic-clock@0.2.0" (instance $clock
            (type $d u64) (export "duration" (type (eq $d)))
            (type $r (record (field "a" $d))) (export "both" (type (eq $r)))))
          (alias export $clock "duration" (type $duration))
          (import "my:clocks/wall-clock@0.2.0" (instance
            (alias outer 1 $duration (type $d)) (export "now" (func (result $d)))))
          (import "my:errors/again@0.2.0" (instance
            (alias outer 1 $error-type (type $e)) (export "error" (type (eq $e)))))
          (import "my:empty/nothing@0.1.0" (instance))
          (core module)
          (component))""")
        )
    )
    assert seen.plain == {"my:clocks/monotonic-clock@0.2.0", "my:empty/nothing@0.1.0"}
    assert seen.missing(Grants()) == ("my:io/error@0.2.0", "my:clocks/wall-clock@0.2.0", "my:errors/again@0.2.0")


def test_a_world_that_uses_a_type_by_its_name_needs_no_grant_for_it():
    seen = reader.read(
        bytes(
            wat2wasm("""
        (component
          (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
          (alias export $error "error" (type $e))
          (import "err" (type (eq $e)))
          (import "thing" (type (sub resource))))""")
        )
    )
    assert seen.plain == {"err"}


@pytest.mark.parametrize("name", ["wasi:config/store@0.2.0-rc.1", "wasi:nn/graph@0.2.0-rc-2024-10-28"])
def test_packages_of_which_there_are_only_drafts_are_read(name):
    assert reader.read(bytes(wat2wasm(f'(component (import "{name}" (instance)))'))).imports == (name,)


PREVIEW1 = '(module (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32))){})'


@pytest.mark.parametrize(
    ("data", "fault", "says"),
    [
        (b"", Fault.EMPTY, "did its build fail"),
        (b"\x93\x01\x55\xaa" * 40, Fault.NOT_WASM, "begins with 93 01 55 aa"),
        (b"\0as", Fault.NOT_WASM, "not WebAssembly"),
        (b"\0asm\x0d", Fault.DAMAGED, "ends in its first 5 bytes"),
        (b"\x7fELF\x02\x01\x01", Fault.NOT_WASM, "devices take the component itself"),
        (b"\0asm\x0c\0\1\0", Fault.OTHER_VERSION, "0c 00 01 00"),
        (b";; a remark\n(component\n", Fault.TEXT, "wasm-tools parse thing.wasm -o thing.wasm"),
        (wat2wasm("(module)"), Fault.CORE_MODULE, "wasm-tools component embed"),
        (
            wat2wasm(
                '(module (import "__wbindgen_placeholder__" "f" (func)) (import "wasi_snapshot_preview1" "x" (func)))'
            ),
            Fault.CORE_MODULE,
            "wasm-bindgen for JavaScript (imports __wbindgen_placeholder__)",
        ),
        (wat2wasm('(module (import "./thing_bg.js" "f" (func)))'), Fault.CORE_MODULE, "leave wasm-bindgen"),
        (
            wat2wasm('(module (import "fastly_http_req" "f" (func)) (import "wasi_snapshot_preview1" "x" (func)))'),
            Fault.CORE_MODULE,
            "made for Fastly Compute (imports fastly_http_req): replace Fastly's SDK by wasi:http/incoming-handler",
        ),
        (
            wat2wasm('(module (import "env" "f" (func)) (import "wasi_snapshot_preview1" "x" (func)))'),
            Fault.CORE_MODULE,
            "(imports env)",  # the adapter alone would not help
        ),
        (wat2wasm(PREVIEW1.format("")), Fault.CORE_MODULE, "with the adapter from a release of Wasmtime"),
        (wat2wasm(PREVIEW1.format("")), Fault.CORE_MODULE, "--adapt wasi_snapshot_preview1.reactor.wasm"),
        (
            wat2wasm(PREVIEW1.format('(func (export "_start"))')),
            Fault.CORE_MODULE,
            "wasm-tools component new thing.wasm --adapt wasi_snapshot_preview1.command.wasm -o thing.component.wasm",
        ),
        (wat2wasm('(module (import "env" "memory" (memory 1 2)))'), Fault.CORE_MODULE, "imports env"),
        (wat2wasm('(module (import "" "0" (func)))'), Fault.CORE_MODULE, "(imports a module without a name)"),
        (
            wat2wasm(
                '(module (import "wasi_ephemeral_nn" "load" (func)) (import "wasi_snapshot_preview1" "x" (func)))'
            ),
            Fault.CORE_MODULE,
            "imports wasi_ephemeral_nn, which no device serves: build the model into the component",
        ),
        (wat2wasm('(module (import "wasi_unstable" "x" (global i32)))'), Fault.CORE_MODULE, "older than preview 1"),
        (wat2wasm('(module (@custom "component-type:x" "y"))'), Fault.CORE_MODULE, ": wasm-tools component new thing"),
        (wat2wasm("(module)") + b"\x02\x7f", Fault.CORE_MODULE, "damaged"),
        (
            wat2wasm('(component (import "wasi:http/types@0.3.0" (instance)))'),
            Fault.WASI_0_3,
            "wasi:http/types@0.3.0",
        ),
        (
            wat2wasm('(component (import "wasi:cli/stdin@0.3.0-rc-2025-09-16" (instance)))'),
            Fault.WASI_0_3,
            "WASI 0.2",
        ),
        (
            wat2wasm('(component (import "wasi:http/types@0.2.0-rc-2023-12-05" (instance)))'),
            Fault.WASI_DRAFT,
            "a pre-release of WASI 0.2 (wasi:http/types@0.2.0-rc-2023-12-05)",
        ),
        (
            wat2wasm(
                '(component (instance $i) (export "wasi:http/incoming-handler@0.2.0-rc-2023-11-10" (instance $i)))'
            ),
            Fault.WASI_DRAFT,
            "incoming-handler@0.2.0-rc-2023-11-10",
        ),
    ],
)
def test_what_is_refused_and_what_it_says(data, fault, says):
    found, message = refusal(bytes(data))
    assert found is fault
    assert says in message


def test_a_file_that_is_too_large():
    assert refusal(bytes(bounds.ARTIFACT_MAX_BYTES + 1))[0] is Fault.TOO_LARGE


def test_a_file_cut_anywhere_is_refused_or_has_lost_whole_sections_only():
    whole = FIXTURES["v1.wasm"]
    ends = {section.end for section in binary.sections(whole, 0, len(whole))} | {binary.PREAMBLE_BYTES}
    for size in range(1, len(whole)):
        if size not in ends:
            assert refusal(whole[:size])[0] in {Fault.DAMAGED, Fault.NOT_WASM}, size


def test_nesting_has_an_end():
    data = binary.COMPONENT
    for _ in range(40):
        data = binary.COMPONENT + binary.section(reader.NESTED, data)
    assert "nested deeper" in refusal(data)[1]


@pytest.mark.parametrize(("kind", "what"), [(reader.CORE_MODULE, "no core module"), (reader.NESTED, "no component")])
def test_a_nested_part_that_is_something_else(kind, what):
    assert what in refusal(binary.COMPONENT + binary.section(kind, b"something else"))[1]


def test_more_sections_than_anyone_needs():
    assert "sections" in refusal(binary.COMPONENT + b"\0\1\0" * 100_001)[1]


CALLS_MAX = 3_000_000
LARGE = 8 << 20


def list_of(count, entries):
    return binary.u32(count) + entries


def instance_type(declarations):
    return b"\x42" + list_of(declarations, b"\x01\x7f" * declarations)


HOSTILE = {
    "producers in many sections": binary.section(
        reader.CUSTOM,
        binary.name("producers") + list_of(1, binary.name("f" * 4096) + list_of(500, b"\0\0" * 500)),
    ),
    "producers without a name": binary.section(
        reader.CUSTOM, binary.name("producers") + list_of(1, binary.name("") + list_of(10_000, b"\0\0" * 10_000))
    ),
    "fields of producers": binary.section(reader.CUSTOM, binary.name("producers") + list_of(10_000, b"\0\0" * 10_000)),
    "custom sections with long names": binary.section(reader.CUSTOM, binary.name("n" * 4096)),
    "imports in many sections": binary.section(reader.IMPORT, list_of(10_000, b"\0\0\x01\0" * 10_000)),
    "exports in many sections": binary.section(reader.EXPORT, list_of(10_000, b"\0\0\x01\0\0" * 10_000)),
    "types in many sections": binary.section(7, list_of(10_000, b"\x7f" * 10_000)),
    "aliases in many sections": binary.section(6, list_of(10_000, b"\x03\0\0\0" * 10_000)),
    "types within types": binary.section(7, list_of(1, instance_type(9999))),
    "empty sections": binary.section(reader.CUSTOM, b"\0"),
}


class TooMuchWorkError(Exception):
    pass


def counted(data):
    """Read a component; return what is said of it and how many calls of the reader that took."""
    calls = 0

    def count(frame, event, _argument):
        nonlocal calls
        calls += event == "call" and "fleet/component" in frame.f_code.co_filename
        if calls > CALLS_MAX:
            raise TooMuchWorkError

    sys.setprofile(count)
    try:
        return refusal(data), calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("each", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_component_is_refused_after_bounded_work(each):
    (fault, message), _calls = counted(binary.COMPONENT + each * (LARGE // len(each)))
    assert fault is Fault.DAMAGED
    assert "more than" in message


def test_a_type_imported_often_is_not_read_without_end():
    whole = binary.COMPONENT + binary.section(7, list_of(1, instance_type(9999)))
    whole += binary.section(reader.IMPORT, list_of(10_000, b"\0\x01i\x05\0" * 10_000))
    assert "more than" in counted(whole)[0][1]


@pytest.mark.parametrize("each", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_component_takes_little_memory(each):
    data = binary.COMPONENT + each * (LARGE // len(each))
    tracemalloc.start()
    try:
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 32 * bounds.MIB
    finally:
        tracemalloc.stop()


SEEDS = st.sampled_from([*FIXTURES.values(), *GUESTS.values(), bytes(wat2wasm(PREVIEW1.format("")))])


@st.composite
def mutated(draw):
    data = bytearray(draw(SEEDS))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 20))]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case _:
                data[at : at + 5] = b"\xff\xff\xff\xff\x0f"
        if not data:
            break
    return bytes(data)


@settings(max_examples=600)
@given(mutated())
def test_whatever_the_bytes_only_its_own_error_comes_out(data):
    try:
        seen = reader.read(data)
    except NotAComponentError:
        return
    assert seen.size_bytes == len(data)


@given(st.integers(0, 2**32 - 1))
def test_numbers_survive(value):
    assert binary.Cursor(binary.u32(value)).u32() == value


@pytest.mark.parametrize(
    ("raw", "value"), [(b"\x7f", -1), (b"\x00", 0), (b"\x3f", 63), (b"\x40", -64), (b"\xc0\x00", 64), (b"\x73", -13)]
)
def test_signed_numbers(raw, value):
    assert binary.Cursor(raw).s33() == value


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff\x1f", b"\xff\xff\xff\xff\xff\x01", b"\x80"])
def test_numbers_beyond_their_bounds(raw):
    with pytest.raises(binary.DamagedError):
        binary.Cursor(raw).u32()
