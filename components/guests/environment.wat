;; environment: answers with the memory into which it got its environment variables (wasi:cli/environment), as it came.
(component
  (import "wasi:cli/environment@0.2.0" (instance $cli
    (export "get-environment" (func (result (list (tuple string string)))))))
  (core module $room
    (memory (export "memory") 3)
    (global $top (export "top") (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024))))
  (core instance $room (instantiate $room))
  (core func $environment (canon lower (func $cli "get-environment")
    (memory (core memory $room "memory")) (realloc (core func $room "realloc"))))
  (core module $guest
    (import "room" "memory" (memory 3))
    (import "room" "top" (global $top (mut i32)))
    (import "host" "environment" (func $environment (param i32)))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $from i32)
      (local.set $from (global.get $top))
      (call $environment (i32.const 128))
      ;; The answer: status 200, no header fields, all that has come since.
      (i32.store16 (i32.const 64) (i32.const 200))
      (i32.store (i32.const 76) (local.get $from))
      (i32.store (i32.const 80) (i32.sub (global.get $top) (local.get $from)))
      (i32.const 64)))
  (core instance $guest (instantiate $guest
    (with "room" (instance $room))
    (with "host" (instance (export "environment" (func $environment))))))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $room "memory"))
      (realloc (core func $room "realloc")) (post-return (core func $room "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
