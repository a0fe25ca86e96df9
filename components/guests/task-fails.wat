;; task-fails: a scheduled task that answers "the pump is stuck" each time.
(component
  (core module $guest
    (memory (export "memory") 1)
    (data (i32.const 128) "the pump is stuck")
    ;; The verdict: an error, its sentence at 128.
    (data (i32.const 64) "\01\00\00\00" "\80\00\00\00\11\00\00\00")
    (func (export "run") (param i64) (result i32) (i32.const 64)))
  (core instance $guest (instantiate $guest))
  (func $run (param "scheduled-ms" u64) (result (result (error string)))
    (canon lift (core func $guest "run") (memory (core memory $guest "memory"))))
  (instance $task (export "run" (func $run)))
  (export "wasmfleet:schedule/task@0.1.0" (instance $task)))
