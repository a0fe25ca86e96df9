"""Values that functions of the host's own give to guests and take from them, for modules without wasmtime."""

from typing import Any

from wasmtime import component as wc


def resource(handle: int, number: int) -> Any:
    """Return a resource of the host's own that the guest then owns; `number` is that of its type among the host's."""
    return wc.ResourceHost.own(handle, number)


def handle_of(store: Any, value: Any) -> int:
    """Return the handle of a resource that a guest hands in, which ends a borrow."""
    return int(value.to_host(store).rep)


def case(name: str, payload: Any = None) -> Any:
    """Return a value of a variant."""
    return wc.Variant(name, payload)
