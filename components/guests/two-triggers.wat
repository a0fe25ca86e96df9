;; two-triggers: a scheduled task that counts its runs in memory, and a handler that answers with the count, eight digits.
(component
  (core module $guest
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 1024))
    (data (i32.const 16) "00000000\n")
    ;; The answer: status 200, no header fields, the body at 16.
    (data (i32.const 64) "\c8\00\00\00" "\00\00\00\00\00\00\00\00" "\10\00\00\00\09\00\00\00")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024)))
    (func (export "run") (param i64) (result i32)
      (local $at i32)
      (local.set $at (i32.const 24))
      (loop $carry
        (local.set $at (i32.sub (local.get $at) (i32.const 1)))
        (i32.store8 (local.get $at) (i32.add (i32.load8_u (local.get $at)) (i32.const 1)))
        (if (i32.gt_u (i32.load8_u (local.get $at)) (i32.const 57)) (then
          (i32.store8 (local.get $at) (i32.const 48))
          (br $carry))))
      (i32.const 96)))
  (core instance $guest (instantiate $guest))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $guest "memory"))
      (realloc (core func $guest "realloc")) (post-return (core func $guest "reset"))))
  (func $run (param "scheduled-ms" u64) (result (result (error string)))
    (canon lift (core func $guest "run") (memory (core memory $guest "memory"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (instance $task (export "run" (func $run)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler))
  (export "wasmfleet:schedule/task@0.1.0" (instance $task)))
