;; task-spins: a scheduled task that never ends.
(component
  (core module $guest
    (memory (export "memory") 1)
    (func (export "run") (param i64) (result i32)
      (loop $ever (br $ever))
      (unreachable)))
  (core instance $guest (instantiate $guest))
  (func $run (param "scheduled-ms" u64) (result (result (error string)))
    (canon lift (core func $guest "run") (memory (core memory $guest "memory"))))
  (instance $task (export "run" (func $run)))
  (export "wasmfleet:schedule/task@0.1.0" (instance $task)))
