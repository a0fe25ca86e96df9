"""A guest that calls wasi:keyvalue as the request's body says, and answers with its memory from `BASE` on.

The body: an operation (a letter), the length and bytes of a bucket's name, the length and bytes of a key, and a value.
The answer's status is 409 where the bucket cannot be opened. `Pairs` sends such requests, and reads what came back.
"""

import struct

from tests.agent.host import support

BASE = 128
DRAFT, DRAFT2 = "0.2.0-draft", "0.2.0-draft2"
ERRORS = ("no-such-store", "access-denied", "other")

_TEXT = """(component
  (import "wasi:keyvalue/store@{version}" (instance $store
    (export "bucket" (type $bucket (sub resource)))
    (type $error' (variant (case "no-such-store") (case "access-denied") (case "other" string)))
    (export "error" (type $error (eq $error')))
    (type $page' (record (field "keys" (list string)) (field "cursor" (option {cursor}))))
    (export "key-response" (type $page (eq $page')))
    (export "open" (func (param "identifier" string) (result (result (own $bucket) (error $error)))))
    (export "[method]bucket.get" (func (param "self" (borrow $bucket)) (param "key" string)
      (result (result (option (list u8)) (error $error)))))
    (export "[method]bucket.set" (func (param "self" (borrow $bucket)) (param "key" string) (param "value" (list u8))
      (result (result (error $error)))))
    (export "[method]bucket.delete" (func (param "self" (borrow $bucket)) (param "key" string)
      (result (result (error $error)))))
    (export "[method]bucket.exists" (func (param "self" (borrow $bucket)) (param "key" string)
      (result (result bool (error $error)))))
    (export "[method]bucket.list-keys" (func (param "self" (borrow $bucket)) (param "cursor" (option {cursor}))
      (result (result $page (error $error)))))))
  (alias export $store "bucket" (type $bucket))
  (alias export $store "error" (type $error))
  (import "wasi:keyvalue/atomics@{version}" (instance $atomics
    (alias outer 1 $bucket (type $bucket'))
    (export "bucket" (type $bucket (eq $bucket')))
    (alias outer 1 $error (type $error'))
    (export "error" (type $error (eq $error')))
    {cas}
    (export "increment" (func (param "bucket" (borrow $bucket)) (param "key" string) (param "delta" {number})
      (result (result {number} (error $error)))))))
  (import "wasi:keyvalue/batch@{version}" (instance $batch
    (alias outer 1 $bucket (type $bucket'))
    (export "bucket" (type $bucket (eq $bucket')))
    (alias outer 1 $error (type $error'))
    (export "error" (type $error (eq $error')))
    (export "get-many" (func (param "bucket" (borrow $bucket)) (param "keys" (list string))
      (result (result (list {pair}) (error $error)))))
    (export "set-many" (func (param "bucket" (borrow $bucket))
      (param "key-values" (list (tuple string (list u8)))) (result (result (error $error)))))
    (export "delete-many" (func (param "bucket" (borrow $bucket)) (param "keys" (list string))
      (result (result (error $error)))))))
  (core module $memory
    (memory (export "memory") 64)
    (global $top (export "top") (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024))))
  (core instance $memory (instantiate $memory))
  {lowered}
  (core func $drop (canon resource.drop $bucket))
  (core module $guest
    (import "" "memory" (memory 1))
    (import "" "top" (global $top (mut i32)))
    (import "" "open" (func $open (param i32 i32 i32)))
    (import "" "get" (func $get (param i32 i32 i32 i32)))
    (import "" "set" (func $set (param i32 i32 i32 i32 i32 i32)))
    (import "" "delete" (func $delete (param i32 i32 i32 i32)))
    (import "" "exists" (func $exists (param i32 i32 i32 i32)))
    (import "" "list" (func $list (param i32 i32 {core_cursor} i32)))
    (import "" "increment" (func $increment (param i32 i32 i32 i64 i32)))
    {cas_imports}
    (import "" "get-many" (func $get_many (param i32 i32 i32 i32)))
    (import "" "set-many" (func $set_many (param i32 i32 i32 i32)))
    (import "" "delete-many" (func $delete_many (param i32 i32 i32 i32)))
    (import "" "drop" (func $drop (param i32)))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $op i32) (local $name i32) (local $name_size i32) (local $key i32) (local $key_size i32)
      (local $value i32) (local $size i32) (local $bucket i32) (local $left i32) (local $cas i32)
      (local.set $op (i32.load8_u (local.get 6)))
      (local.set $name_size (i32.load align=1 (i32.add (local.get 6) (i32.const 1))))
      (local.set $name (i32.add (local.get 6) (i32.const 5)))
      (local.set $key (i32.add (local.get $name) (local.get $name_size)))
      (local.set $key_size (i32.load align=1 (local.get $key)))
      (local.set $key (i32.add (local.get $key) (i32.const 4)))
      (local.set $value (i32.add (local.get $key) (local.get $key_size)))
      (local.set $size (i32.sub (i32.add (local.get 6) (local.get 7)) (local.get $value)))
      (memory.fill (i32.const 128) (i32.const 0) (i32.const 256))
      (i32.store16 (i32.const 64) (i32.const 200))
      (i64.store (i32.const 68) (i64.const 0))
      (if (i32.eq (local.get $op) (i32.const 111)) (then  ;; o: a storm of handles that are kept
        (local.set $left (i32.const 1000))
        (loop $again
          (call $open (local.get $name) (local.get $name_size) (i32.const 128))
          (local.set $left (i32.sub (local.get $left) (i32.const 1)))
          (br_if $again (i32.and (i32.ne (local.get $left) (i32.const 0))
            (i32.eqz (i32.load8_u (i32.const 128))))))
        (i32.store (i32.const 200) (local.get $left))))
      (if (i32.ne (local.get $op) (i32.const 111)) (then
        (call $open (local.get $name) (local.get $name_size) (i32.const 128))
        (if (i32.load8_u (i32.const 128))
          (then (i32.store16 (i32.const 64) (i32.const 409)))
          (else
            (local.set $bucket (i32.load (i32.const 132)))
            (memory.fill (i32.const 128) (i32.const 0) (i32.const 64))
            (if (i32.eq (local.get $op) (i32.const 103)) (then
              (call $get (local.get $bucket) (local.get $key) (local.get $key_size) (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 115)) (then
              (call $set (local.get $bucket) (local.get $key) (local.get $key_size)
                (local.get $value) (local.get $size) (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 100)) (then
              (call $delete (local.get $bucket) (local.get $key) (local.get $key_size) (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 120)) (then
              (call $exists (local.get $bucket) (local.get $key) (local.get $key_size) (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 108)) (then
              (call $list (local.get $bucket) (i32.ne (local.get $key_size) (i32.const 0)) {given_cursor}
                (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 105)) (then
              (call $increment (local.get $bucket) (local.get $key) (local.get $key_size)
                (i64.load align=1 (local.get $value)) (i32.const 128))))
            (i32.store (i32.const 512) (local.get $key)) (i32.store (i32.const 516) (local.get $key_size))
            (if (i32.eq (local.get $op) (i32.const 109)) (then  ;; m: the key, and the bucket's name as a key
              (i32.store (i32.const 520) (local.get $name)) (i32.store (i32.const 524) (local.get $name_size))
              (call $get_many (local.get $bucket) (i32.const 512) (i32.const 2) (i32.const 128))))
            (if (i32.eq (local.get $op) (i32.const 118)) (then
              (call $delete_many (local.get $bucket) (i32.const 512) (i32.const 1) (i32.const 128))))
            (i32.store (i32.const 520) (local.get $value)) (i32.store (i32.const 524) (local.get $size))
            (if (i32.eq (local.get $op) (i32.const 110)) (then
              (call $set_many (local.get $bucket) (i32.const 512) (i32.const 1) (i32.const 128))))
            {cas_code}
            (call $drop (local.get $bucket))))))
      (i32.store (i32.const 76) (i32.const 128))
      (i32.store (i32.const 80) (i32.sub (global.get $top) (i32.const 128)))
      (i32.const 64)))
  (core instance $guest (instantiate $guest (with "" (instance
    (export "memory" (memory $memory "memory")) (export "top" (global $memory "top"))
    {given} (export "drop" (func $drop))))))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $memory "memory"))
      (realloc (core func $memory "realloc")) (post-return (core func $memory "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
"""
_CAS = """(export "cas" (type $cas (sub resource)))
    (type $cas-error' (variant (case "store-error" $error) (case "cas-failed" (own $cas))))
    (export "cas-error" (type $cas-error (eq $cas-error')))
    (export "[static]cas.new" (func (param "bucket" (borrow $bucket)) (param "key" string)
      (result (result (own $cas) (error $error)))))
    (export "[method]cas.current" (func (param "self" (borrow $cas))
      (result (result (option (list u8)) (error $error)))))
    (export "swap" (func (param "cas" (own $cas)) (param "value" (list u8)) (result (result (error $cas-error)))))"""
_CAS_IMPORTS = """(import "" "new" (func $new (param i32 i32 i32 i32)))
    (import "" "current" (func $current (param i32 i32)))
    (import "" "swap" (func $swap (param i32 i32 i32 i32)))"""
# c: swap; a value that begins with `!` is set by another write first, and swapped again with the handle of the failure.
_CAS_CODE = """(if (i32.eq (local.get $op) (i32.const 99)) (then
              (call $new (local.get $bucket) (local.get $key) (local.get $key_size) (i32.const 128))
              (local.set $cas (i32.load (i32.const 132)))
              (if (i32.eq (i32.load8_u (local.get $value)) (i32.const 33)) (then
                (call $set (local.get $bucket) (local.get $key) (local.get $key_size)
                  (local.get $value) (i32.const 1) (i32.const 160))))
              (call $swap (local.get $cas) (local.get $value) (local.get $size) (i32.const 128))
              (i32.store (i32.const 200) (i32.load8_u (i32.const 128)))
              (if (i32.load8_u (i32.const 128)) (then
                (i32.store (i32.const 204) (i32.load8_u (i32.const 132)))
                (if (i32.eq (i32.load8_u (i32.const 132)) (i32.const 1)) (then
                  (local.set $cas (i32.load (i32.const 136)))
                  (call $current (local.get $cas) (i32.const 208))
                  (call $swap (local.get $cas) (local.get $value) (local.get $size) (i32.const 128))))))))"""
_LOWERED = {
    "open": ("store", "open"),
    **{name: ("store", f"[method]bucket.{name}") for name in ("get", "set", "delete", "exists")},
    "list": ("store", "[method]bucket.list-keys"),
    "increment": ("atomics", "increment"),
    **{name: ("batch", name) for name in ("get-many", "set-many", "delete-many")},
}
_LOWERED_CAS = {
    "new": ("atomics", "[static]cas.new"),
    "current": ("atomics", "[method]cas.current"),
    "swap": ("atomics", "swap"),
}


def guest(version=DRAFT2, **more):
    """Return the guest's text; `more` replaces types, for one that is built against something else."""
    is_second = version == DRAFT2
    lowered = _LOWERED | (_LOWERED_CAS if is_second else {})
    options = '(memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))'
    parts = {
        "version": version,
        "cursor": "string" if is_second else "u64",
        "number": "s64" if is_second else "u64",
        "pair": "(tuple string (option (list u8)))" if is_second else "(option (tuple string (list u8)))",
        "core_cursor": "i32 i32" if is_second else "i64",
        "given_cursor": "(local.get $key) (local.get $key_size)"
        if is_second
        else "(i64.load align=1 (local.get $value))",
        "cas": _CAS if is_second else "",
        "cas_imports": _CAS_IMPORTS if is_second else "",
        "cas_code": _CAS_CODE if is_second else "",
        "lowered": "\n  ".join(
            f'(core func ${name} (canon lower (func ${instance} "{function}") {options}))'
            for name, (instance, function) in lowered.items()
        ),
        "given": " ".join(f'(export "{name}" (func ${name}))' for name in lowered),
    }
    text = _TEXT
    for name, value in {**parts, **more}.items():
        text = text.replace("{" + name + "}", value)
    return text


class Memory:
    """Answer of the guest: its memory from `BASE` on."""

    def __init__(self, data):
        self._data = data

    def byte(self, at):
        return self._data[at - BASE]

    def word(self, at):
        return struct.unpack_from("<I", self._data, at - BASE)[0]

    def number(self, at):
        return struct.unpack_from("<q", self._data, at - BASE)[0]

    def bytes(self, at):
        """What a list or a string at `at` holds."""
        place, size = self.word(at), self.word(at + 4)
        return self._data[place - BASE : place - BASE + size] if size else b""

    def error(self, at):
        case = ERRORS[self.byte(at)]
        return f"other: {self.bytes(at + 4).decode()}" if case == "other" else case


class Pairs:
    """Client of the guest. A method's result is what its call returned, or the error as a text."""

    def __init__(self, port, version=DRAFT2):
        self.port = port
        self.second = version == DRAFT2

    def send(self, op, key=b"", value=b"", name=b""):
        body = op.encode() + struct.pack("<I", len(name)) + name + struct.pack("<I", len(key)) + key + value
        request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        status, _, said = support.http(self.port, request)
        assert status in {200, 409}, (status, said)
        return status, Memory(said)

    def call(self, op, *arguments, at=132, **more):
        """Return the error, or None and the memory."""
        status, memory = self.send(op, *arguments, **more)
        if status == 409:
            return memory.error(132), memory
        return (memory.error(at) if memory.byte(128) else None), memory

    def get(self, key, **more):
        error, memory = self.call("g", key, **more)
        return error or (memory.bytes(136) if memory.byte(132) else None)

    def set(self, key, value, **more):
        return self.call("s", key, value, **more)[0]

    def delete(self, key):
        return self.call("d", key)[0]

    def exists(self, key):
        error, memory = self.call("x", key)
        return error or bool(memory.byte(132))

    def increment(self, key, delta=1):
        error, memory = self.call("i", key, struct.pack("<q", delta), at=136)
        return error or memory.number(136)

    def page(self, cursor=None):
        """Return the keys of a page, and the next cursor; None for the last page."""
        if self.second:
            error, memory = self.call("l", cursor or b"")
            keys, following = 132, memory.bytes(144) if memory.byte(140) else None
        else:
            given = (b"", b"") if cursor is None else (b"x", struct.pack("<Q", cursor))
            error, memory = self.call("l", *given, at=136)
            keys, following = 136, memory.number(152) if memory.byte(144) else None
        if error:
            return error
        place, count = memory.word(keys), memory.word(keys + 4)
        return [memory.bytes(place + 8 * number) for number in range(count)], following

    def keys(self):
        found, cursor = self.page()
        while cursor is not None:
            more, cursor = self.page(cursor)
            found += more
        return found

    def get_many(self, key, name):
        error, memory = self.call("m", key, name=name)
        if error:
            return error
        place = memory.word(132)
        found = []
        for at in (place, place + 20):
            if self.second:
                found.append((memory.bytes(at), memory.bytes(at + 12) if memory.byte(at + 8) else None))
            else:
                found.append((memory.bytes(at + 4), memory.bytes(at + 12)) if memory.byte(at) else None)
        return found
