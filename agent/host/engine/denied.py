"""Functions of WASI that deny each call, in place of the engine's.

Standard libraries import sockets, and some toolchains outgoing requests, whatever their program does. Sockets that a
grant names are the adapter's, and requests go out only through the adapter of wasi:http. The engine denies the same,
but says nothing of it to the host, has another error code for names, and would send a request if it could. A function
whose type is not that of WASI stays the engine's, so that the linker refuses it.
"""

from collections.abc import Callable
from typing import Any, Final

from wasmtime import component as wc

from agent.host.engine.adapter_abi import Denials
from agent.host.engine.runtime import Image
from agent.host.ipc.heads import ERRORS, REQUEST_DENIED
from fleet.component import wasi
from fleet.component.reader import bare

_NO_SOCKETS: Final = "no sockets are granted (grants.outbound, such as tcp://10.1.0.5:502)"
_NO_REQUESTS: Final = f"requests go out only from components that export {wasi.HTTP_HANDLER}"
_ACCESS: Final = "access-denied"
_LOOKUP: Final = f"{wasi.SOCKETS}/ip-name-lookup"
_ADDRESSES: Final = "resolve-address-stream"
_ADDRESSES_TYPE: Final = 1

_DENYING: Final[dict[tuple[str, str], tuple[tuple[type, ...], str]]] = {
    (f"{wasi.SOCKETS}/tcp-create-socket", "create-tcp-socket"): ((wc.EnumType,), _NO_SOCKETS),
    (f"{wasi.SOCKETS}/udp-create-socket", "create-udp-socket"): ((wc.EnumType,), _NO_SOCKETS),
    (_LOOKUP, "resolve-addresses"): ((wc.BorrowType, wc.String), _NO_SOCKETS),
    (wasi.OUTGOING_HANDLER, "handle"): ((wc.OwnType, wc.OptionType), _NO_REQUESTS),
}
"""By interface and function: its parameters, and why it is denied. The rest of wasi:sockets needs a socket first."""

_METHODS: Final = frozenset(f"[method]{_ADDRESSES}.{name}" for name in ("resolve-next-address", "subscribe"))


def define(linker: wc.Linker, image: Image, denials: Denials) -> None:
    """Define what denies calls, for the interfaces that an image imports. The engine's WASI must be there already."""
    linker.allow_shadowing = True
    with linker.root() as root:
        for name in image.imports:
            functions = image.functions(name) if image.imports[name] else {}
            denied = {each: _denying(bare(name), each, kind, denials) for each, kind in functions.items()}
            if not any(denied.values()):
                continue
            with root.add_instance(name) as instance:
                if bare(name) == _LOOKUP:
                    instance.add_resource(_ADDRESSES, wc.ResourceType.host(_ADDRESSES_TYPE), _forget)
                for each, function in denied.items():
                    if function is not None:
                        instance.add_func(each, function)
                    elif each in _METHODS:
                        instance.add_func(each, _unreachable)
    linker.allow_shadowing = False


def _denying(interface: str, function: str, kind: Any, denials: Denials) -> Callable[..., Any] | None:
    """Return what denies a function's calls; None for a function that is none of these, or of another type."""
    params, why = _DENYING.get((interface, function), ((), ""))
    code = _code(kind)
    if not why or code is None or not _takes(kind, params):
        return None
    called = f"{interface}.{function}"

    def deny(store: Any, *arguments: Any) -> Any:
        for each in arguments:
            if isinstance(each, wc.ResourceAny):
                each.drop(store)
        denials.deny(called, f"{called} is denied: {why}")
        return code

    return deny


def _takes(kind: Any, params: tuple[type, ...]) -> bool:
    """Tell whether a function has parameters of these kinds, an option that of a resource."""
    found = [each for _, each in kind.params]
    options = (each for each in found if isinstance(each, wc.OptionType))
    return tuple(map(type, found)) == params and all(isinstance(each.payload, wc.OwnType) for each in options)


def _code(kind: Any) -> Any:
    """Return the value of a function's result that denies; None where it has no such value."""
    result = kind.result
    if not isinstance(result, wc.ResultType) or not isinstance(result.ok, wc.OwnType):
        return None
    error = result.err
    if isinstance(error, wc.EnumType):
        return _ACCESS if _ACCESS in error.names else None
    if isinstance(error, wc.VariantType) and tuple(name for name, _ in error.cases) == ERRORS:
        return wc.Variant(ERRORS[REQUEST_DENIED])
    return None


def _forget(_store: object, _number: int) -> None:
    """Drop a stream of addresses, which is never made."""


def _unreachable(_store: object, *_arguments: object) -> None:
    raise AssertionError("no stream of addresses is ever made")
