;; task: the smallest good scheduled task.
(component
  (core module $guest
    (memory (export "memory") 1)
    (func (export "run") (param i64) (result i32) (i32.const 64)))
  (core instance $guest (instantiate $guest))
  (func $run (param "scheduled-ms" u64) (result (result (error string)))
    (canon lift (core func $guest "run") (memory (core memory $guest "memory"))))
  (instance $task (export "run" (func $run)))
  (export "wasmfleet:schedule/task@0.1.0" (instance $task)))
