;; An HTTP component without a toolchain: WebAssembly text in, a component out. It implements the world `http` of
;; ../../wit/worlds.wit: `handle` answers each request, `check` says that it is well.
(component
  (core module $guest
    (memory (export "memory") 16)

    ;; The greeting at 16. Change it, and its length in bytes below.
    (data (i32.const 16) "hello from WebAssembly text\n")
    (global $length i32 (i32.const 28))

    ;; Allocate for the host: arguments are written behind each other, and dropped after the call.
    (global $top (mut i32) (i32.const 1024))
    (func $allocate (export "realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32)
      (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get $size)))
      ;; grow by what is missing; a host that gives no memory ends the call
      (block $fits
        (br_if $fits (i32.le_u (global.get $top) (i32.mul (memory.size) (i32.const 65536))))
        (if (i32.eq (i32.const -1) (memory.grow (i32.add (i32.const 1) (i32.shr_u (local.get $size) (i32.const 16)))))
          (then unreachable)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024)))

    ;; handle(method, target, headers, body), each as address and length -> address of
    ;; { status: u16, headers: address and length, body: address and length }
    (func (export "handle")
      (param $method i32) (param $method_length i32) (param $target i32) (param $target_length i32)
      (param $headers i32) (param $headers_length i32) (param $body i32) (param $body_length i32) (result i32)
      (i32.store (i32.const 64) (i32.const 200))
      (i32.store (i32.const 76) (i32.const 16))
      (i32.store (i32.const 80) (global.get $length))
      ;; give back what is posted to /echo: a target of five bytes that ends in "echo"
      (if (i32.eq (local.get $target_length) (i32.const 5))
        (then
          (if (i32.eq (i32.load offset=1 align=1 (local.get $target)) (i32.const 0x6f686365)) ;; "echo", little-endian
            (then
              (i32.store (i32.const 76) (local.get $body))
              (i32.store (i32.const 80) (local.get $body_length))))))
      (i32.const 64))

    ;; check() -> result<_, string>: 0 at 96 is ok
    (func (export "check") (result i32) (i32.const 96)))

  ;; Lift the functions to the types of the world.
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
