"""Standard output of a worker whose guest speaks past the adapter: bounded in memory and time."""

import support
from support import Limits

from agent.host.ipc import host_api
from tests.eventually import eventually

# In place of the adapter: writes 4 KiB of x to standard output {times} times, without the end of a line or of a head.
FLOODS = """(component
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $e))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (alias outer 1 $e (type $e'))
    (export "error" (type $err (eq $e')))
    (export "output-stream" (type $out (sub resource)))
    (type $failure (variant (case "last-operation-failed" (own $err)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $failure)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $out)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $stream (type $s'))
    (export "output-stream" (type $s (eq $s')))
    (export "get-stdout" (func (result (own $s))))))
  (core module $room (memory (export "memory") 3))
  (core instance $room (instantiate $room))
  (core func $get (canon lower (func $stdout "get-stdout")))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory (core memory $room "memory"))))
  (core module $guest
    (import "room" "memory" (memory 3))
    (import "host" "get" (func $get (result i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (data (i32.const 64) "\\00\\01\\00\\00\\0d\\00\\00\\00")
    (data (i32.const 256) "200 whole\\0d\\0a\\0d\\0a")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 32768))
    (func (export "handle") (param i32 i32) (result i32)
      (local $out i32) (local $n i32)
      (memory.fill (i32.const 65536) (i32.const 120) (i32.const 4096))
      (local.set $out (call $get))
      (loop $on
        (call $write (local.get $out) (i32.const 65536) (i32.const 4096) (i32.const 512))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $on (i32.lt_u (local.get $n) (i32.const {times}))))
      (i32.const 64))
    (func (export "flush")))
  (core instance $guest (instantiate $guest
    (with "room" (instance $room))
    (with "host" (instance (export "get" (func $get)) (export "write" (func $write))))))
  (func $handle (param "head" string) (result string) (canon lift (core func $guest "handle")
    (memory (core memory $room "memory")) (realloc (core func $guest "realloc"))))
  (func $flush (canon lift (core func $guest "flush")))
  (instance $bridge (export "handle" (func $handle)) (export "flush" (func $flush)))
  (export "wasmfleet:adapter/bridge@0.1.0" (instance $bridge)))
"""


def test_output_without_the_end_of_a_head_is_neither_kept_nor_searched_again(host, neighbour):
    """Otherwise all of it would be kept, and searched from its start for each piece."""
    limits = Limits(call_ms=30_000, total_ms=60_000, response_bytes=1 << 20)
    reply = host.start(FLOODS.replace("{times}", str(64 * 256)), support.a_run("floods", 1, limits=limits))
    assert isinstance(reply, host_api.Started), reply
    status, _, _ = support.http(host.port, "GET /floods/ HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 502
    eventually(lambda: any("end of a head" in line for line in host.lines_of("floods")), "the log says it")
    health = host.health("floods")
    assert health.restarts == 0
    assert health.memory_bytes < 40 << 20  # 64 MiB were written
