"""The composer: what it makes of the adapter and a guest, judged by engines that did not make it, and its refusals."""

import contextlib
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st
from wasmtime import component as wc

from fleet.component import binary, compose, reader, types
from tests import packed

ROOT = Path(__file__).resolve().parents[3]
PROBE = packed.guest("probe")
DEMO = (ROOT / "components" / "demo" / "v1.wasm").read_bytes()


@pytest.fixture(scope="module")
def whole():
    return compose.compose(compose.load_adapter(), PROBE)


def compiles(data: bytes) -> wc.Component:
    return wc.Component(wasmtime.Engine(), data)


def test_the_engine_takes_what_was_composed(whole):
    assert compiles(whole).serialize()


@pytest.mark.skipif(shutil.which("wasm-tools") is None, reason="wasm-tools is not on PATH")
def test_an_independent_validator_takes_it_too(whole, tmp_path):
    file = tmp_path / "whole.wasm"
    file.write_bytes(whole)
    subprocess.run(["wasm-tools", "validate", file], check=True)


def test_the_whole_begins_with_the_adapter_and_nests_the_guest_byte_for_byte(whole):
    sockets = reader.read_index(compose.load_adapter()).components[-compose.WITH_SOCKETS :]
    rest = b"".join(binary.section(reader.NESTED, each) for each in sockets)
    assert compose.load_adapter().endswith(rest)
    assert whole.startswith(compose.load_adapter().removesuffix(rest))
    assert PROBE in whole
    assert not any(each in whole for each in sockets), "it carries what only a guest with sockets needs"


@pytest.mark.parametrize("guest", ["dial", "dial-task"])
def test_a_guest_with_sockets_has_them_from_the_adapter(guest):
    artifact = lzma.decompress((ROOT / "components" / "adapter" / f"{guest}.wasm.xz").read_bytes())
    whole = compose.compose(compose.load_adapter(), artifact, sockets=True)
    assert whole.startswith(compose.load_adapter())
    compiles(whole)
    shape = reader.read_index(whole)
    assert not any(name.startswith("wasi:sockets/") for name in shape.instances)
    assert any(name.startswith(f"{compose.SOCKETS_HOST}@") for name in shape.instances)
    exported = "wasmfleet:adapter/bridge@0.1.0" if guest == "dial" else "wasmfleet:schedule/task@0.1.0"
    assert shape.exports == [exported]


def test_the_same_two_give_the_same_bytes(whole):
    assert compose.compose(compose.load_adapter(), PROBE) == whole


def test_the_whole_exports_the_bridge_in_place_of_the_handler_and_imports_no_http(whole):
    found = reader.read(whole)
    assert {reader.bare(name) for name in found.exports} == {compose.BRIDGE, "wasmfleet:http/health"}
    assert not [name for name in found.imports if name.startswith("wasi:http")]
    assert [name for name in found.imports if name.startswith("wasmfleet:")] == [f"{compose.HOST}@0.1.0"]


def test_each_interface_is_imported_once_however_old_the_guests_wasi_is(whole):
    names = [reader.bare(name) for name in reader.read(whole).imports]
    assert len(names) == len(set(names))
    assert {reader.bare(name) for name in reader.read(PROBE).imports} - set(names) == {
        "wasi:http/types",
        "wasi:http/outgoing-handler",
    }


def test_only_guests_of_wasi_http_need_the_adapter():
    assert compose.needs_adapter(reader.read(PROBE))
    assert not compose.needs_adapter(reader.read(DEMO))
    assert not compose.needs_adapter(reader.read(compose.load_adapter()))


def test_a_component_without_the_handler_is_refused_in_a_sentence():
    with pytest.raises(compose.ComposeError, match=r"exports no wasi:http/incoming-handler@0\.2"):
        compose.compose(compose.load_adapter(), DEMO)


def test_an_adapter_that_is_none_is_refused():
    with pytest.raises(compose.ComposeError):
        compose.compose(DEMO, PROBE)


def wat(imports: str, more: str = "") -> bytes:
    """A guest that answers nothing, with other imports before its handler and other exports after it."""
    return bytes(
        wasmtime.wat2wasm(f"""
    (component {imports}
      (import "wasi:http/types@0.2.1" (instance $types
        (export "incoming-request" (type (sub resource))) (export "response-outparam" (type (sub resource)))))
      (alias export $types "incoming-request" (type $request))
      (alias export $types "response-outparam" (type $outparam))
      (core module $m (func (export "handle") (param i32 i32)))
      (core instance $i (instantiate $m))
      (func $handle (param "request" (own $request)) (param "response-out" (own $outparam))
        (canon lift (core func $i "handle")))
      (instance $handler (export "handle" (func $handle)))
      (export "wasi:http/incoming-handler@0.2.1" (instance $handler)) {more})""")
    )


def test_a_handler_without_its_types_beside_it_serves_as_well():
    # toolchains export the two resource types with the handler; nothing in the model makes them
    compiles(compose.compose(compose.load_adapter(), wat("")))


def test_types_of_every_shape_survive_the_move():
    shapes = """
      (import "wasi:filesystem/types@0.2.0" (instance $files (export "descriptor" (type (sub resource)))))
      (alias export $files "descriptor" (type $input))
      (type $shade (enum "dark" "light"))
      (import "ours:shapes/all@1.2.3" (instance
        (alias outer 1 $input (type $in))
        (export "reader" (type $reader (eq $in)))
        (export "shade" (type $s (eq $shade)))
        (type $r' (record (field "a" u8) (field "b" (option string)) (field "c" (tuple char f32 f64))))
        (export "r" (type $r (eq $r')))
        (type $v' (variant (case "one" $r) (case "two") (case "three" (list s64))))
        (export "v" (type $v (eq $v')))
        (type $f' (flags "x" "y" "z"))
        (export "f" (type $f (eq $f')))
        (export "thing" (type $thing (sub resource)))
        (export "[constructor]thing" (func (param "from" (own $reader)) (result (own $thing))))
        (export "[method]thing.look" (func (param "self" (borrow $thing)) (param "f" $f)
          (result (result $v (error $s)))))
        (export "nothing" (func))))"""
    whole = compose.compose(compose.load_adapter(), wat(shapes))
    compiles(whole)
    assert "ours:shapes/all@1.2.3" in reader.read(whole).imports


IO = """
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (import "wasi:io/poll@0.2.0" (instance $poll (export "pollable" (type (sub resource)))))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "input-stream" (type (sub resource))) (export "output-stream" (type (sub resource)))))
  (alias export $error "error" (type $error'))
  (alias export $poll "pollable" (type $pollable'))
  (alias export $streams "input-stream" (type $input'))
  (alias export $streams "output-stream" (type $output'))"""


def codes(package):
    """The cases of an interface's error-code, as the adapter's WIT has them."""
    text = (ROOT / "components" / "adapter" / "wit" / "deps" / "engine" / "engine.wit").read_text()
    cases = text.partition(f"interface {package} {{")[2].partition("enum error-code {")[2].partition("}")[0]
    return " ".join(f'"{case.strip()}"' for case in cases.split(",") if case.strip())


CLOCK = """(import "wasi:clocks/monotonic-clock@0.2.1" (instance
    (alias outer 1 $pollable' (type $p)) (export "pollable" (type $pollable (eq $p)))
    (type $i u64) (export "instant" (type $instant (eq $i)))
    (export "now" (func (result $instant)))
    (export "subscribe-instant" (func (param "when" $instant) (result (own $pollable))))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))"""
FILES = f"""(import "wasi:filesystem/types@0.2.1" (instance
    (alias outer 1 $input' (type $i)) (export "input-stream" (type $input (eq $i)))
    (alias outer 1 $output' (type $o)) (export "output-stream" (type $output (eq $o)))
    (alias outer 1 $error' (type $e)) (export "error" (type $error (eq $e)))
    (type $c (enum {codes("files")})) (export "error-code" (type $code (eq $c)))
    (export "descriptor" (type $d (sub resource)))
    (export "[method]descriptor.sync" (func (param "self" (borrow $d)) (result (result (error $code)))))
    (export "[method]descriptor.read-via-stream" (func (param "self" (borrow $d)) (param "offset" u64)
      (result (result (own $input) (error $code)))))
    (export "[method]descriptor.write-via-stream" (func (param "self" (borrow $d)) (param "offset" u64)
      (result (result (own $output) (error $code)))))
    (export "[method]descriptor.append-via-stream" (func (param "self" (borrow $d))
      (result (result (own $output) (error $code)))))
    (export "filesystem-error-code" (func (param "err" (borrow $error)) (result (option $code))))))"""
SOCKETS = f"""(import "wasi:sockets/network@0.2.8" (instance $network
    (alias outer 1 $error' (type $e)) (export "error" (type $error (eq $e)))
    (type $c (enum {codes("network")})) (export "error-code" (type $code (eq $c)))
    (export "network" (type (sub resource)))
    (export "network-error-code" (func (param "err" (borrow $error)) (result (option $code))))))
  (alias export $network "error-code" (type $code'))
  (import "wasi:sockets/tcp@0.2.8" (instance
    (alias outer 1 $input' (type $i)) (export "input-stream" (type $input (eq $i)))
    (alias outer 1 $output' (type $o)) (export "output-stream" (type $output (eq $o)))
    (alias outer 1 $pollable' (type $p)) (export "pollable" (type $pollable (eq $p)))
    (alias outer 1 $code' (type $c)) (export "error-code" (type $code (eq $c)))
    (export "tcp-socket" (type $s (sub resource)))
    (export "[method]tcp-socket.finish-connect" (func (param "self" (borrow $s))
      (result (result (tuple (own $input) (own $output)) (error $code)))))
    (export "[method]tcp-socket.accept" (func (param "self" (borrow $s))
      (result (result (tuple (own $s) (own $input) (own $output)) (error $code)))))
    (export "[method]tcp-socket.subscribe" (func (param "self" (borrow $s)) (result (own $pollable))))))
  (import "wasi:sockets/udp@0.2.8" (instance
    (alias outer 1 $pollable' (type $p)) (export "pollable" (type $pollable (eq $p)))
    (export "udp-socket" (type $s (sub resource)))
    (export "incoming-datagram-stream" (type $in (sub resource)))
    (export "outgoing-datagram-stream" (type $out (sub resource)))
    (export "[method]udp-socket.subscribe" (func (param "self" (borrow $s)) (result (own $pollable))))
    (export "[method]incoming-datagram-stream.subscribe" (func (param "self" (borrow $in)) (result (own $pollable))))
    (export "[method]outgoing-datagram-stream.subscribe" (func (param "self" (borrow $out)) (result (own $pollable))))))
  (import "wasi:sockets/ip-name-lookup@0.2.8" (instance
    (alias outer 1 $pollable' (type $p)) (export "pollable" (type $pollable (eq $p)))
    (export "resolve-address-stream" (type $s (sub resource)))
    (export "[method]resolve-address-stream.subscribe" (func (param "self" (borrow $s)) (result (own $pollable))))))"""


@pytest.mark.parametrize("imports", [CLOCK, FILES, SOCKETS, CLOCK + FILES + SOCKETS])
def test_what_hands_out_streams_and_pollables_gets_a_shim_for_each_function_that_does(imports):
    compiles(compose.compose(compose.load_adapter(), wat(IO + imports)))


def test_an_interface_nobody_knows_that_hands_out_streams_is_refused_by_name():
    stranger = """(import "ours:pipes/all@1.0.0" (instance
      (alias outer 1 $input' (type $i)) (export "input-stream" (type $input (eq $i)))
      (export "open" (func (result (own $input))))))"""
    with pytest.raises(compose.ComposeError, match=r"ours:pipes/all@1\.0\.0, whose streams"):
        compose.compose(compose.load_adapter(), wat(IO + stranger))


def test_an_import_that_is_no_interface_is_refused():
    with pytest.raises(compose.ComposeError, match="tick is not an interface"):
        compose.compose(compose.load_adapter(), wat('(import "tick" (func))'))


def test_a_health_check_beside_the_handler_is_exported_by_the_whole():
    check = """(core module $n (func (export "f") (result i32) i32.const 0))
      (core instance $j (instantiate $n)) (func $f (result (result)) (canon lift (core func $j "f")))
      (instance $h (export "check" (func $f))) (export "wasmfleet:http/health@0.1.0" (instance $h))"""
    whole = compose.compose(compose.load_adapter(), wat("", check))
    compiles(whole)
    assert reader.read(whole).exported(reader.HTTP_HEALTH)


def test_a_message_handler_beside_the_handler_is_exported_by_the_whole():
    receives = (ROOT / "components" / "guests" / "receives.wat").read_text()
    receives = receives[receives.index("(component") + len("(component") : receives.rindex(")")]
    receives = receives.replace("$types", "$of-messages").replace("$handle", "$take")
    whole = compose.compose(compose.load_adapter(), wat(receives))
    assert "wasi:messaging/incoming-handler@0.2.0-draft" in reader.read(whole).exports
    compiles(whole)


@settings(max_examples=300)
@given(st.data())
def test_damaged_guests_end_in_a_refusal_and_nothing_else(data):
    guest = bytearray(PROBE)
    for _ in range(data.draw(st.integers(1, 8))):
        # the first sections are what is read; the core modules behind them are the engine's business
        guest[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(guest)))
    for sample in (bytes(guest), bytes(guest[:cut])):
        with contextlib.suppress(compose.ComposeError):
            compose.compose(compose.load_adapter(), sample)


@pytest.mark.parametrize("value", [0, 1])
def test_types_and_interfaces_that_use_one_another_in_a_circle_or_are_not_there_are_refused(value):
    for at in range(120, 160):  # types of the first interfaces
        with contextlib.suppress(compose.ComposeError):
            compose.compose(compose.load_adapter(), PROBE[:at] + bytes([value]) + PROBE[at + 1 :])


@given(st.binary(max_size=200))
def test_random_bytes_are_no_type(raw):
    with contextlib.suppress(binary.DamagedError, types.ForeignTypeError):
        types.rewrite(binary.Cursor(raw), types.same)
