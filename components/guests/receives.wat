;; receives: logs each message that it gets, its topic as the context. The first byte of the message decides what comes
;; then: T traps, L loops for ever, E returns an error, B is not logged (its bytes need not be UTF-8).
(component
  (import "wasi:logging/logging@0.1.0-draft" (instance $logging
    (type $levels (enum "trace" "debug" "info" "warn" "error" "critical"))
    (export "level" (type $level (eq $levels)))
    (export "log" (func (param "level" $level) (param "context" string) (param "message" string)))))
  (import "wasi:messaging/types@0.2.0-draft" (instance $types
    (export "message" (type $message (sub resource)))
    (type $error' (variant
      (case "timeout") (case "connection" string) (case "permission-denied" string) (case "other" string)))
    (export "error" (type $error (eq $error')))
    (export "[method]message.topic" (func (param "self" (borrow $message)) (result (option string))))
    (export "[method]message.data" (func (param "self" (borrow $message)) (result (list u8))))))
  (alias export $types "message" (type $message))
  (alias export $types "error" (type $error))
  (core module $memory
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 1024))
    (data (i32.const 16) "not now")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (global.set $top (i32.const 1024))))
  (core instance $memory (instantiate $memory))
  (core func $log (canon lower (func $logging "log") (memory (core memory $memory "memory"))))
  (core func $topic (canon lower (func $types "[method]message.topic")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $data (canon lower (func $types "[method]message.data")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $drop (canon resource.drop $message))
  (core module $guest
    (import "" "memory" (memory 1))
    (import "" "reset" (func $reset))
    (import "" "log" (func $log (param i32 i32 i32 i32 i32)))
    (import "" "topic" (func $topic (param i32 i32)))
    (import "" "data" (func $data (param i32 i32)))
    (import "" "drop" (func $drop (param i32)))
    (func (export "handle") (param $message i32) (result i32)
      (local $first i32)
      (call $reset)
      (call $topic (local.get $message) (i32.const 128)) ;; 128: some, 132 and 136: its text
      (call $data (local.get $message) (i32.const 144)) ;; 144 and 148
      (call $drop (local.get $message))
      (if (i32.load (i32.const 148)) (then (local.set $first (i32.load8_u (i32.load (i32.const 144))))))
      (if (i32.ne (local.get $first) (i32.const 0x42)) (then
        (call $log (i32.const 2) (i32.load (i32.const 132)) (i32.load (i32.const 136))
          (i32.load (i32.const 144)) (i32.load (i32.const 148)))))
      (if (i32.eq (local.get $first) (i32.const 0x54)) (then unreachable))
      (if (i32.eq (local.get $first) (i32.const 0x4c)) (then (loop $ever (br $ever)))) ;; L
      ;; At 64: failed, 68: the case other, 72: its text.
      (i32.store8 (i32.const 64) (i32.eq (local.get $first) (i32.const 0x45)))
      (i32.store8 (i32.const 68) (i32.const 3))
      (i32.store (i32.const 72) (i32.const 16))
      (i32.store (i32.const 76) (i32.const 7))
      (i32.const 64)))
  (core instance $guest (instantiate $guest (with "" (instance
    (export "memory" (memory $memory "memory")) (export "reset" (func $memory "reset")) (export "log" (func $log))
    (export "topic" (func $topic)) (export "data" (func $data)) (export "drop" (func $drop))))))
  (func $handle (param "message" (own $message)) (result (result (error $error)))
    (canon lift (core func $guest "handle") (memory (core memory $memory "memory"))))
  (instance $handler (export "message" (type $message)) (export "error" (type $error))
    (export "handle" (func $handle)))
  (export "wasi:messaging/incoming-handler@0.2.0-draft" (instance $handler)))
