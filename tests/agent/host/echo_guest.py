"""Component that answers each request with its fields and body."""

from native_guests import handler

ECHO = f"""
(component
  (core module $m
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (block $enough (loop $more
        (br_if $enough (i32.le_u (global.get $top) (i32.shl (memory.size) (i32.const 16))))
        (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (unreachable)))
        (br $more)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (i32.store16 (i32.const 64) (i32.const 200))
      (i32.store (i32.const 68) (local.get 4)) (i32.store (i32.const 72) (local.get 5))
      (i32.store (i32.const 76) (local.get 6)) (i32.store (i32.const 80) (local.get 7))
      (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024))))
  (core instance $i (instantiate $m))
  {handler("i", "i")})
"""
