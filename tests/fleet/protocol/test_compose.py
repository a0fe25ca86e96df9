"""The composer: what it makes of the adapter and a guest, judged by engines that did not make it, and its refusals."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st
from wasmtime import component as wc

from fleet.protocol import adapter, component, compose, deftype, wasm

ROOT = Path(__file__).resolve().parents[3]
PROBE = (ROOT / "components" / "adapter" / "probe.wasm").read_bytes()
DEMO = (ROOT / "components" / "demo" / "v1.wasm").read_bytes()


@pytest.fixture(scope="module")
def whole():
    return compose.compose(adapter.load(), PROBE)


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
    assert whole.startswith(adapter.load())
    assert PROBE in whole


def test_the_same_two_give_the_same_bytes(whole):
    assert compose.compose(adapter.load(), PROBE) == whole


def test_the_whole_exports_the_bridge_alone_and_imports_no_http(whole):
    found = component.read(whole)
    assert [component.bare(name) for name in found.exports] == [compose.BRIDGE]
    assert not [name for name in found.imports if name.startswith("wasi:http")]
    assert [name for name in found.imports if name.startswith("wasmfleet:")] == [f"{compose.HOST}@0.1.0"]


def test_each_interface_is_imported_once_however_old_the_guests_wasi_is(whole):
    names = [component.bare(name) for name in component.read(whole).imports]
    assert len(names) == len(set(names))
    assert {component.bare(name) for name in component.read(PROBE).imports} - set(names) == {
        "wasi:http/types",
        "wasi:http/outgoing-handler",
    }


def test_only_guests_of_wasi_http_need_the_adapter():
    assert compose.needs_adapter(component.read(PROBE))
    assert not compose.needs_adapter(component.read(DEMO))
    assert not compose.needs_adapter(component.read(adapter.load()))


def test_a_component_without_the_handler_is_refused_in_a_sentence():
    with pytest.raises(compose.ComposeError, match=r"exports no wasi:http/incoming-handler@0\.2"):
        compose.compose(adapter.load(), DEMO)


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
    compiles(compose.compose(adapter.load(), wat("")))


def test_types_of_every_shape_survive_the_move():
    shapes = """
      (import "wasi:io/streams@0.2.0" (instance $streams
        (export "input-stream" (type (sub resource))) (export "output-stream" (type (sub resource)))))
      (alias export $streams "input-stream" (type $input))
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
    whole = compose.compose(adapter.load(), wat(shapes))
    compiles(whole)
    assert "ours:shapes/all@1.2.3" in component.read(whole).imports


def test_an_import_that_is_no_interface_is_refused():
    with pytest.raises(compose.ComposeError, match="tick is not an interface"):
        compose.compose(adapter.load(), wat('(import "tick" (func))'))


def test_a_health_check_beside_the_handler_is_exported_by_the_whole():
    check = """(core module $n (func (export "f") (result i32) i32.const 0))
      (core instance $j (instantiate $n)) (func $f (result (result)) (canon lift (core func $j "f")))
      (instance $h (export "check" (func $f))) (export "wasmfleet:http/health@0.1.0" (instance $h))"""
    whole = compose.compose(adapter.load(), wat("", check))
    compiles(whole)
    assert component.read(whole).exported(component.HTTP_HEALTH)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_guests_end_in_a_refusal_and_nothing_else(data):
    guest = bytearray(PROBE)
    for _ in range(data.draw(st.integers(1, 8))):
        # the first sections are what is read; the core modules behind them are the engine's business
        guest[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(guest)))
    for sample in (bytes(guest), bytes(guest[:cut])):
        with contextlib.suppress(compose.ComposeError):
            compose.compose(adapter.load(), sample)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_type(raw):
    with contextlib.suppress(wasm.DamagedError, deftype.ForeignTypeError):
        deftype.rewrite(wasm.Cursor(raw), deftype.same)
