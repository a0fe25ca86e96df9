;; answer-1gib: answers with a body of 1 GiB that is not there: it ends far beyond its memory.
(component
  (core module $guest
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 1024))
    ;; The answer: status 200, no header fields, 1 GiB from 16 on.
    (data (i32.const 64) "\c8\00\00\00" "\00\00\00\00\00\00\00\00" "\10\00\00\00\00\00\00\40")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024)))
    (func (export "check") (result i32) (i32.const 96)))
  (core instance $guest (instantiate $guest))
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
