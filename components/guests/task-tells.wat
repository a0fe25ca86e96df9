;; task-tells: a scheduled task that writes "v1 begins" to its log, waits a quarter of a second and writes "v1 ends".
(component
  (import "wasi:logging/logging@0.1.0-draft" (instance $logging
    (type $levels (enum "trace" "debug" "info" "warn" "error" "critical"))
    (export "level" (type $level (eq $levels)))
    (export "log" (func (param "level" $level) (param "context" string) (param "message" string)))))
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $pollable'))
    (export "pollable" (type $pollable (eq $pollable')))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (core module $memory
    (memory (export "memory") 1)
    (data (i32.const 16) "v1 begins")
    (data (i32.const 32) "v1 ends"))
  (core instance $memory (instantiate $memory))
  (core func $log (canon lower (func $logging "log") (memory (core memory $memory "memory"))))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $drop (canon resource.drop $pollable))
  (core module $guest
    (import "host" "log" (func $log (param i32 i32 i32 i32 i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "block" (func $block (param i32)))
    (import "host" "drop" (func $drop (param i32)))
    (memory (export "memory") 1)
    (func (export "run") (param i64) (result i32)
      (local $timer i32)
      (call $log (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 16) (i32.const 9))
      (local.set $timer (call $subscribe (i64.const 250000000)))
      (call $block (local.get $timer))
      (call $drop (local.get $timer))
      (call $log (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 32) (i32.const 7))
      (i32.const 64)))
  (core instance $guest (instantiate $guest
    (with "host" (instance (export "log" (func $log)) (export "subscribe" (func $subscribe))
      (export "block" (func $block)) (export "drop" (func $drop))))))
  (func $run (param "scheduled-ms" u64) (result (result (error string)))
    (canon lift (core func $guest "run") (memory (core memory $guest "memory"))))
  (instance $task (export "run" (func $run)))
  (export "wasmfleet:schedule/task@0.1.0" (instance $task)))
