"""The codec tried on this board: bytes of many lengths go through a component and back before anything relies on it."""

from typing import Final

from agent.host.engine import Engine, Guest
from fleet.protocol.manifest import Grants, Limits

_ECHO: Final = """
(component
  (core module $m
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (i32.store16 (i32.const 64) (i32.const 299))
      (i32.store (i32.const 68) (local.get 4)) (i32.store (i32.const 72) (local.get 5))
      (i32.store (i32.const 76) (local.get 6)) (i32.store (i32.const 80) (local.get 7))
      (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024))))
  (core instance $i (instantiate $m))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $i "handle") (memory (core memory $i "memory"))
      (realloc (core func $i "realloc")) (post-return (core func $i "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
"""


def self_test(engine: Engine) -> bool:
    """Send bytes of many lengths through a component and back by the fast codec. Call it in a forked child only."""
    image = engine.read(_ECHO)
    guest = Guest(image, limits=Limits(), grants=Grants(), config={}, log=lambda _line: None)
    pattern = bytes(range(256)) * 64
    return all(
        guest.handle(b"PUT", b"/x", b"a: \xc3\xa9\r\n", pattern[:length]) == (299, b"a: \xc3\xa9\r\n", pattern[:length])
        for length in (0, 1, 31, 256, 4096, len(pattern), 7)
    )
