;; command: an ordinary main (wasi:cli/run). Its first argument says what it does:
;;   print    writes a line to each stream and ends        args   writes its arguments and variables
;;   exit     ends with exit code 1                         fail   returns that it failed
;;   trap     traps                                         serve  writes "up", reads its input to the end, writes "down"
;;   loop     never comes back                              block  waits for an hour
(component
  (import "wasi:io/error@0.2.0" (instance $errors (export "error" (type (sub resource)))))
  (alias export $errors "error" (type $error))
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $pollable'))
    (export "pollable" (type $pollable (eq $pollable')))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "input-stream" (type $in (sub resource)))
    (export "output-stream" (type $out (sub resource)))
    (alias outer 1 $error (type $error'))
    (export "error" (type $error (eq $error')))
    (type $stream-error' (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error')))
    (export "[method]input-stream.blocking-read" (func (param "self" (borrow $in)) (param "len" u64)
      (result (result (list u8) (error $stream-error)))))
    (export "[method]output-stream.blocking-write-and-flush" (func (param "self" (borrow $out))
      (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "input-stream" (type $in))
  (alias export $streams "output-stream" (type $out))
  (import "wasi:cli/stdin@0.2.0" (instance $stdin
    (alias outer 1 $in (type $in'))
    (export "input-stream" (type $in (eq $in')))
    (export "get-stdin" (func (result (own $in))))))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $out (type $out'))
    (export "output-stream" (type $out (eq $out')))
    (export "get-stdout" (func (result (own $out))))))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $out (type $out'))
    (export "output-stream" (type $out (eq $out')))
    (export "get-stderr" (func (result (own $out))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit (export "exit" (func (param "status" (result))))))
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-environment" (func (result (list (tuple string string)))))
    (export "get-arguments" (func (result (list string))))))
  (core module $memory
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (data (i32.const 16) "hello from run\n")
    (data (i32.const 48) "a warning\nwithout an end")
    (data (i32.const 80) "up\n")
    (data (i32.const 88) "down\n")
    (data (i32.const 100) "\n"))
  (core instance $memory (instantiate $memory))
  (core func $read (canon lower (func $streams "[method]input-stream.blocking-read")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory (core memory $memory "memory"))))
  (core func $get-stdin (canon lower (func $stdin "get-stdin")))
  (core func $get-stdout (canon lower (func $stdout "get-stdout")))
  (core func $get-stderr (canon lower (func $stderr "get-stderr")))
  (core func $exit (canon lower (func $exit "exit")))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $get-arguments (canon lower (func $environment "get-arguments")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $get-environment (canon lower (func $environment "get-environment")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core module $guest
    (import "host" "memory" (memory 1))
    (import "host" "read" (func $read (param i32 i64 i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (import "host" "stdin" (func $stdin (result i32)))
    (import "host" "stdout" (func $stdout (result i32)))
    (import "host" "stderr" (func $stderr (result i32)))
    (import "host" "exit" (func $exit (param i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "block" (func $block (param i32)))
    (import "host" "arguments" (func $arguments (param i32)))
    (import "host" "environment" (func $environment (param i32)))
    (global $out (mut i32) (i32.const 0))
    (func $say (param $at i32) (param $size i32)
      (call $write (global.get $out) (local.get $at) (local.get $size) (i32.const 2048)))
    ;; Writes `count` strings that lie from `at` on, a line each.
    (func $list (param $at i32) (param $count i32)
      (loop $next
        (if (local.get $count) (then
          (call $say (i32.load (local.get $at)) (i32.load offset=4 (local.get $at)))
          (call $say (i32.const 100) (i32.const 1))
          (local.set $at (i32.add (local.get $at) (i32.const 8)))
          (local.set $count (i32.sub (local.get $count) (i32.const 1)))
          (br $next)))))
    (func (export "run") (result i32)
      (local $what i32)
      (local $input i32)
      (global.set $out (call $stdout))
      (call $arguments (i32.const 1024))
      ;; The first two letters of the first argument, behind the program's name.
      (local.set $what (i32.load16_u (i32.load (i32.add (i32.load (i32.const 1024)) (i32.const 8)))))
      (if (i32.eq (local.get $what) (i32.const 0x7270)) (then ;; "pr"
        (call $say (i32.const 16) (i32.const 15))
        (call $write (call $stderr) (i32.const 48) (i32.const 24) (i32.const 2048))))
      (if (i32.eq (local.get $what) (i32.const 0x7261)) (then ;; "ar"
        (call $list (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))
        (call $environment (i32.const 1032))
        (call $list (i32.load (i32.const 1032)) (i32.mul (i32.const 2) (i32.load (i32.const 1036))))))
      (if (i32.eq (local.get $what) (i32.const 0x7865)) (then (call $exit (i32.const 1)))) ;; "ex"
      (if (i32.eq (local.get $what) (i32.const 0x6166)) (then (return (i32.const 1)))) ;; "fa"
      (if (i32.eq (local.get $what) (i32.const 0x7274)) (then unreachable)) ;; "tr"
      (if (i32.eq (local.get $what) (i32.const 0x6f6c)) (then (loop $again (br $again)))) ;; "lo"
      (if (i32.eq (local.get $what) (i32.const 0x6c62)) (then ;; "bl"
        (call $say (i32.const 80) (i32.const 3))
        (call $block (call $subscribe (i64.const 3600000000000)))))
      (if (i32.eq (local.get $what) (i32.const 0x6573)) (then ;; "se"
        (local.set $input (call $stdin))
        (call $say (i32.const 80) (i32.const 3))
        (loop $more
          (call $read (local.get $input) (i64.const 100) (i32.const 2048))
          (br_if $more (i32.eqz (i32.load8_u (i32.const 2048)))))
        (call $say (i32.const 88) (i32.const 5))))
      (i32.const 0)))
  (core instance $guest (instantiate $guest (with "host" (instance
    (export "memory" (memory $memory "memory"))
    (export "read" (func $read)) (export "write" (func $write))
    (export "stdin" (func $get-stdin)) (export "stdout" (func $get-stdout)) (export "stderr" (func $get-stderr))
    (export "exit" (func $exit)) (export "subscribe" (func $subscribe)) (export "block" (func $block))
    (export "arguments" (func $get-arguments)) (export "environment" (func $get-environment))))))
  (func $run (result (result)) (canon lift (core func $guest "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
