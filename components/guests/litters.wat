;; litters: each request makes a hundred empty files more in its data directory. Answers 200, or 507 where it may not.
(component
  (import "wasi:io/error@0.2.0" (instance $io-error (export "error" (type (sub resource)))))
  (alias export $io-error "error" (type $io-error'))
  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $descriptor (sub resource)))
    (type $code (enum "access" "would-block" "already" "bad-descriptor" "busy" "deadlock" "quota" "exist"
      "file-too-large" "illegal-byte-sequence" "in-progress" "interrupted" "invalid" "io" "is-directory" "loop"
      "too-many-links" "message-size" "name-too-long" "no-device" "no-entry" "no-lock" "insufficient-memory"
      "insufficient-space" "not-directory" "not-empty" "not-recoverable" "unsupported" "no-tty" "no-such-device"
      "overflow" "not-permitted" "pipe" "read-only" "invalid-seek" "text-file-busy" "cross-device"))
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
      (result (result (own $descriptor) (error $error-code)))))))
  (alias export $types "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $descriptor'))
    (export "descriptor" (type $mine (eq $descriptor')))
    (export "get-directories" (func (result (list (tuple (own $mine) string)))))))
  (core module $room
    (memory (export "memory") 3)
    (global $top (mut i32) (i32.const 131072))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 131072))))
  (core instance $room (instantiate $room))
  (core func $directories (canon lower (func $preopens "get-directories")
    (memory (core memory $room "memory")) (realloc (core func $room "realloc"))))
  (core func $open-at (canon lower (func $types "[method]descriptor.open-at") (memory (core memory $room "memory"))))
  (core func $drop (canon resource.drop $descriptor))
  (core module $guest
    (import "room" "memory" (memory 3))
    (import "host" "directories" (func $directories (param i32)))
    (import "host" "open-at" (func $open-at (param i32 i32 i32 i32 i32 i32 i32)))
    (import "host" "drop" (func $drop (param i32)))
    (global $room (mut i32) (i32.const -1))
    (data (i32.const 16) "hello\n")
    (data (i32.const 32) "00000000")
    (func $refuse (result i32)
      (i32.store16 (i32.const 64) (i32.const 507))
      (i32.const 64))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $n i32) (local $at i32)
      ;; The answer: status 200, no header fields, the body at 16.
      (i32.store16 (i32.const 64) (i32.const 200))
      (i32.store (i32.const 76) (i32.const 16))
      (i32.store (i32.const 80) (i32.const 6))
      (if (i32.eq (global.get $room) (i32.const -1)) (then
        (call $directories (i32.const 128))
        (if (i32.eqz (i32.load (i32.const 132))) (then (return (call $refuse))))
        (global.set $room (i32.load (i32.load (i32.const 128))))))
      (local.set $n (i32.const 100))
      (loop $more
        ;; The next name.
        (local.set $at (i32.const 40))
        (loop $carry
          (local.set $at (i32.sub (local.get $at) (i32.const 1)))
          (i32.store8 (local.get $at) (i32.add (i32.load8_u (local.get $at)) (i32.const 1)))
          (if (i32.gt_u (i32.load8_u (local.get $at)) (i32.const 57)) (then
            (i32.store8 (local.get $at) (i32.const 48))
            (br $carry))))
        (call $open-at (global.get $room) (i32.const 0) (i32.const 32) (i32.const 8)
          (i32.const 1) (i32.const 3) (i32.const 144))
        (if (i32.load8_u (i32.const 144)) (then (return (call $refuse))))
        (call $drop (i32.load (i32.const 148)))
        (local.set $n (i32.sub (local.get $n) (i32.const 1)))
        (br_if $more (local.get $n)))
      (i32.const 64)))
  (core instance $guest (instantiate $guest
    (with "room" (instance $room))
    (with "host" (instance (export "directories" (func $directories)) (export "open-at" (func $open-at))
      (export "drop" (func $drop))))))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $guest "handle") (memory (core memory $room "memory"))
      (realloc (core func $room "realloc")) (post-return (core func $room "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
