"""A guest that ends because it got no more memory: the error names the limit."""

import pytest
import support

from agent.host.engine.guest import start
from agent.host.engine.runtime import Engine, GuestError
from fleet.protocol.manifest import Grants, Limits

HANDLE = '    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 64))\n'
GROWS = """
    (func ${name} (unreachable))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (loop (br_if 0 (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
      (call ${name})
      (i32.const 64))
"""


def failure(name):
    text = support.wasm("hello").decode().partition("\n")[2]
    assert HANDLE in text
    image = Engine().read(text.replace(HANDLE, GROWS.replace("{name}", name)))
    limits = Limits(memory_bytes=1 << 20)
    guest = start(image, limits=limits, grants=Grants(), config={}, log=lambda _: None)
    with pytest.raises(GuestError) as caught:
        guest.handle(b"GET", b"/", b"", b"")
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "name",
    ["alloc::alloc::handle_alloc_error", "__rust_alloc_error_handler", "runtime.outOfMemory", "std::alloc::rust_oom"],
)
def test_a_failed_allocation_names_the_limit_of_memory(name):
    assert "limits.memory" in failure(name)


@pytest.mark.parametrize("name", ["abort", "core::panicking::panic", "about_memory"])
def test_another_trap_does_not(name):
    assert failure(name) == "wasm trap: wasm `unreachable` instruction executed"
