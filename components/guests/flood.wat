;; flood: each request writes 20,000 lines of 64 characters to the log. For the limit on log lines.
(component
  (import "wasi:logging/logging@0.1.0-draft" (instance $logging
    (type $levels (enum "trace" "debug" "info" "warn" "error" "critical"))
    (export "level" (type $level (eq $levels)))
    (export "log" (func (param "level" $level) (param "context" string) (param "message" string)))))
  (core module $memory
    (memory (export "memory") 1)
    (data (i32.const 256) "the flood rises and the flood rises and the flood rises and the "))
  (core instance $memory (instantiate $memory))
  (core func $log (canon lower (func $logging "log") (memory (core memory $memory "memory"))))
  (core module $guest
    (import "host" "log" (func $log (param i32 i32 i32 i32 i32)))
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 1024))
    (data (i32.const 16) "hello\n")
    ;; The answer: status 200, no header fields, the body at 16.
    (data (i32.const 64) "\c8\00\00\00" "\00\00\00\00\00\00\00\00" "\10\00\00\00\06\00\00\00")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $n i32)
      (loop $more
        (call $log (i32.const 2) (i32.const 256) (i32.const 9) (i32.const 256) (i32.const 64))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $more (i32.lt_u (local.get $n) (i32.const 20000))))
      (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024)))
    (func (export "check") (result i32) (i32.const 96)))
  (core instance $guest (instantiate $guest
    (with "host" (instance (export "log" (func $log))))))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $guest "memory"))
      (realloc (core func $guest "realloc")) (post-return (core func $guest "reset"))))
  (func $check (result (result (error string)))
    (canon lift (core func $guest "check") (memory (core memory $guest "memory"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (instance $health (export "check" (func $check)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler))
  (export "wasmfleet:http/health@0.1.0" (instance $health)))
