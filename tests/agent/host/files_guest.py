"""A guest that calls wasi:filesystem as the request's body says: an operation (a letter), a directory's number, a path.

`Files` sends such requests. What a call was refused with is its error code's name.
"""

from tests.agent.host import support

CODES = (
    *("access", "would-block", "already", "bad-descriptor", "busy", "deadlock", "quota", "exist"),
    *("file-too-large", "illegal-byte-sequence", "in-progress", "interrupted", "invalid", "io", "is-directory", "loop"),
    *("too-many-links", "message-size", "name-too-long", "no-device", "no-entry", "no-lock", "insufficient-memory"),
    *("insufficient-space", "not-directory", "not-empty", "not-recoverable", "unsupported", "no-tty"),
    *("no-such-device", "overflow", "not-permitted", "pipe", "read-only", "invalid-seek", "text-file-busy"),
    "cross-device",
)

GUEST = """(component
  (import "wasi:io/error@0.2.0" (instance $io-error (export "error" (type (sub resource)))))
  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $descriptor (sub resource)))
    (type $code (enum {codes}))
    (export "error-code" (type $error-code (eq $code)))
    (type $follow (flags "symlink-follow"))
    (export "path-flags" (type $path-flags (eq $follow)))
    (type $open (flags "create" "directory" "exclusive" "truncate"))
    (export "open-flags" (type $open-flags (eq $open)))
    (type $access (flags "read" "write" "file-integrity-sync" "data-integrity-sync" "requested-write-sync"
      "mutate-directory"))
    (export "descriptor-flags" (type $descriptor-flags (eq $access)))
    (export "[method]descriptor.open-at" (func (param "self" (borrow $descriptor)) (param "path-flags" $path-flags)
      (param "path" string) (param "open-flags" $open-flags) (param "flags" $descriptor-flags)
      (result (result (own $descriptor) (error $error-code)))))
    (export "[method]descriptor.read" (func (param "self" (borrow $descriptor)) (param "length" u64)
      (param "offset" u64) (result (result (tuple (list u8) bool) (error $error-code)))))
    (export "[method]descriptor.write" (func (param "self" (borrow $descriptor)) (param "buffer" (list u8))
      (param "offset" u64) (result (result u64 (error $error-code)))))
    (export "[method]descriptor.unlink-file-at" (func (param "self" (borrow $descriptor)) (param "path" string)
      (result (result (error $error-code)))))
    (export "[method]descriptor.create-directory-at" (func (param "self" (borrow $descriptor)) (param "path" string)
      (result (result (error $error-code)))))
    (export "[method]descriptor.symlink-at" (func (param "self" (borrow $descriptor)) (param "old-path" string)
      (param "new-path" string) (result (result (error $error-code)))))))
  (alias export $types "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $descriptor'))
    (export "descriptor" (type $mine (eq $descriptor')))
    (export "get-directories" (func (result (list (tuple (own $mine) string)))))))
  (core module $room
    (memory (export "memory") 8)
    (global $top (export "top") (mut i32) (i32.const 65536))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 65536))))
  (core instance $room (instantiate $room))
  {lowered}
  (core func $drop (canon resource.drop $descriptor))
  (core module $guest
    (import "room" "memory" (memory 8))
    (import "host" "get-directories" (func $directories (param i32)))
    (import "host" "open-at" (func $open (param i32 i32 i32 i32 i32 i32 i32)))
    (import "host" "read" (func $read (param i32 i64 i64 i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i64 i32)))
    (import "host" "unlink-file-at" (func $unlink (param i32 i32 i32 i32)))
    (import "host" "create-directory-at" (func $mkdir (param i32 i32 i32 i32)))
    (import "host" "symlink-at" (func $link (param i32 i32 i32 i32 i32 i32)))
    (import "host" "drop" (func $drop (param i32)))
    (func $answer (param $status i32) (param $at i32) (param $size i32)
      (i32.store16 (i32.const 64) (local.get $status))
      (i32.store (i32.const 76) (local.get $at))
      (i32.store (i32.const 80) (local.get $size)))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $op i32) (local $path i32) (local $size i32) (local $list i32) (local $count i32) (local $number i32)
      (local $dir i32) (local $file i32)
      (local.set $op (i32.load8_u (local.get 6)))
      (local.set $path (i32.add (local.get 6) (i32.const 2)))
      (local.set $size (i32.sub (local.get 7) (i32.const 2)))
      (call $answer (i32.const 200) (i32.const 0) (i32.const 0))
      (call $directories (i32.const 128))
      (local.set $list (i32.load (i32.const 128)))
      (local.set $count (i32.load (i32.const 132)))
      (if (i32.eq (local.get $op) (i32.const 112)) (then  ;; p: the places of the directories, a line each
        (local.set $path (i32.const 1024))
        (loop $next
          (if (i32.lt_u (local.get $number) (local.get $count)) (then
            (local.set $dir (i32.add (local.get $list) (i32.mul (local.get $number) (i32.const 12))))
            (local.set $size (i32.load offset=8 (local.get $dir)))
            (memory.copy (local.get $path) (i32.load offset=4 (local.get $dir)) (local.get $size))
            (i32.store8 (i32.add (local.get $path) (local.get $size)) (i32.const 10))
            (local.set $path (i32.add (local.get $path) (i32.add (local.get $size) (i32.const 1))))
            (local.set $number (i32.add (local.get $number) (i32.const 1)))
            (br $next))))
        (call $answer (i32.const 200) (i32.const 1024) (i32.sub (local.get $path) (i32.const 1024)))
        (return (i32.const 64))))
      (local.set $number (i32.load8_u offset=1 (local.get 6)))
      (if (i32.ge_u (local.get $number) (local.get $count)) (then
        (call $answer (i32.const 404) (i32.const 0) (i32.const 0))
        (return (i32.const 64))))
      (local.set $dir (i32.load (i32.add (local.get $list) (i32.mul (local.get $number) (i32.const 12)))))
      (i64.store (i32.const 144) (i64.const 0))
      (if (i32.eq (local.get $op) (i32.const 117)) (then
        (call $unlink (local.get $dir) (local.get $path) (local.get $size) (i32.const 144))
        (i32.store8 (i32.const 148) (i32.load8_u (i32.const 145)))))
      (if (i32.eq (local.get $op) (i32.const 109)) (then
        (call $mkdir (local.get $dir) (local.get $path) (local.get $size) (i32.const 144))
        (i32.store8 (i32.const 148) (i32.load8_u (i32.const 145)))))
      (if (i32.eq (local.get $op) (i32.const 108)) (then
        (call $link (local.get $dir) (local.get $path) (local.get $size) (local.get $path) (local.get $size)
          (i32.const 144))
        (i32.store8 (i32.const 148) (i32.load8_u (i32.const 145)))))
      (if (i32.eq (local.get $op) (i32.const 119)) (then  ;; w: a new file
        (call $open (local.get $dir) (i32.const 1) (local.get $path) (local.get $size) (i32.const 1) (i32.const 3)
          (i32.const 144))))
      (if (i32.eq (local.get $op) (i32.const 97)) (then  ;; a: a file that is there, to be written
        (call $open (local.get $dir) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i32.const 2)
          (i32.const 144))))
      (if (i32.eq (local.get $op) (i32.const 114)) (then  ;; r: its first 64 KiB
        (call $open (local.get $dir) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i32.const 1)
          (i32.const 144))))
      (if (i32.load8_u (i32.const 144)) (then
        (call $answer (i32.const 409) (i32.const 148) (i32.const 1))
        (return (i32.const 64))))
      (local.set $file (i32.load (i32.const 148)))
      (if (i32.or (i32.eq (local.get $op) (i32.const 119)) (i32.eq (local.get $op) (i32.const 97))) (then
        (call $write (local.get $file) (i32.const 64) (i32.const 1) (i64.const 0) (i32.const 160))
        (call $drop (local.get $file))
        (if (i32.load8_u (i32.const 160)) (then (call $answer (i32.const 409) (i32.const 168) (i32.const 1))))))
      (if (i32.eq (local.get $op) (i32.const 114)) (then
        (call $read (local.get $file) (i64.const 65536) (i64.const 0) (i32.const 160))
        (call $drop (local.get $file))
        (if (i32.load8_u (i32.const 160))
          (then (call $answer (i32.const 409) (i32.const 164) (i32.const 1)))
          (else (call $answer (i32.const 200) (i32.load (i32.const 164)) (i32.load (i32.const 168)))))))
      (i32.const 64)))
  (core instance $guest (instantiate $guest
    (with "room" (instance $room))
    (with "host" (instance {given} (export "drop" (func $drop))))))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $room "memory"))
      (realloc (core func $room "realloc")) (post-return (core func $room "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
"""
_METHODS = ("open-at", "read", "write", "unlink-file-at", "create-directory-at", "symlink-at")
_LOWERED = {
    "get-directories": ("preopens", "get-directories"),
    **{name: ("types", f"[method]descriptor.{name}") for name in _METHODS},
}


def guest():
    """Return the guest's text."""
    options = '(memory (core memory $room "memory")) (realloc (core func $room "realloc"))'
    lowered = (
        f'(core func ${name} (canon lower (func ${instance} "{function}") {options}))'
        for name, (instance, function) in _LOWERED.items()
    )
    parts = {
        "codes": " ".join(f'"{code}"' for code in CODES),
        "lowered": "\n  ".join(lowered),
        "given": " ".join(f'(export "{name}" (func ${name}))' for name in _LOWERED),
    }
    text = GUEST
    for name, value in parts.items():
        text = text.replace("{" + name + "}", value)
    return text


class Files:
    """Client of the guest; `Files(port).ask("r", 0, "a/b")` is what is in the file, or the error's name."""

    def __init__(self, port):
        self.port = port

    def ask(self, op, directory=0, path=""):
        body = op.encode() + bytes([directory]) + path.encode()
        request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        status, _, said = support.http(self.port, request)
        assert status in {200, 404, 409}, (status, said)
        return {200: said, 404: None}.get(status) if status != 409 else CODES[said[0]]

    def places(self):
        """Where the guest sees its directories, in their order."""
        return self.ask("p").decode().split()
