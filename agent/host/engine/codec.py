"""Way of an HTTP exchange into a guest: values laid out by hand, since the stock way costs a microsecond a byte.

Owns one request value and reuses it: the strings point straight into Python's bytes, and a body is one strided copy
into an array of C values that only grows (a value is 32 bytes, its byte stands at offset 8). Not thread-safe, like
everything of the bindings: one process, one thread that enters wasm.

The layout is read from the bindings' own structures, and `agent.host.worker.zygote.self_test` sends bytes through a
real component before anything relies on it; where that fails, the stock codec serves (`Stock`).

Every layout here is that of one WIT function, whose `Signature` stands beside it. `agent.host.engine.runtime` compares
a component's own types with these before it instantiates it; what comes back is read by its own kind all the same.
"""

import ctypes
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from typing import Any, Final, Protocol

from wasmtime import Store, WasiConfig, WasmtimeError
from wasmtime import _ffi as ffi
from wasmtime import component as wc
from wasmtime.component import Func, Record

_VALUE: Final = ctypes.sizeof(ffi.wasmtime_component_val_t)
_PAYLOAD: Final = ffi.wasmtime_component_val_t.of.offset
_KIND: Final = ffi.wasmtime_component_val_t.kind.offset
_FIELDS: Final = (b"method", b"target", b"headers", b"body")
_KEEP_VALUES: Final = 64 * 1024  # a buffer for larger bodies is given back after the call

Answer = tuple[int, bytes, bytes]

# Bounds of the text that names a type: an expected one fits within, and a guest's may be of any size.
_DEPTH_MAX: Final = 6
_MEMBERS_MAX: Final = 16
_SAID_MAX_CHARS: Final = 400
_CUT: Final = "..."
_PLAIN: Final[dict[type, str]] = {
    getattr(wc, name): name.lower()
    for name in ("Bool", "S8", "S16", "S32", "S64", "U8", "U16", "U32", "U64", "F32", "F64", "Char", "String")
}


@dataclass(frozen=True, slots=True)
class Signature:
    """Type of a component function, its parts as WIT text.

    Attributes:
        params: name and type of each parameter.
        result: empty for none.
        concurrent: whether it is an `async func`.
    """

    params: tuple[tuple[str, str], ...] = ()
    result: str = ""
    concurrent: bool = False

    def __str__(self) -> str:
        """Give the type as WIT has it."""
        params = ", ".join(f"{name}: {kind}" for name, kind in self.params)
        result = f" -> {self.result}" if self.result else ""
        return f"{'async ' if self.concurrent else ''}func({params}){result}"

    def unlike(self, item: Any) -> str | None:
        """Name the type of a component's item if its values are laid out in another way; None for one that fits.

        Parameters have places, and their names do not matter.
        """
        if not isinstance(item, wc.FuncType):
            return "no function"
        other = signature(item)
        ours, theirs = ([kind for _, kind in each.params] for each in (self, other))
        if (ours, self.result, self.concurrent) == (theirs, other.result, other.concurrent):
            return None
        said = str(other)
        return said if len(said) <= _SAID_MAX_CHARS else said[:_SAID_MAX_CHARS] + _CUT


_OUTCOME: Final = "result<_, string>"
HANDLE: Final = Signature(
    (("request", "record { method: string, target: string, headers: string, body: list<u8> }"),),
    "record { status: u16, headers: string, body: list<u8> }",
)
EXCHANGE: Final = Signature((("head", "string"),), "string")
FLUSH: Final = Signature()
SERVE: Final = Signature(
    (("calls", "u32"), ("last", "bool"), ("metered", "bool"), ("prompt", "bool"), ("token", "string")), "u64"
)
CHECK: Final = Signature((), _OUTCOME)
RUN: Final = Signature((("scheduled-ms", "u64"),), _OUTCOME)
COMMAND: Final = Signature((), "result<_, _>")
RECEIVE: Final = Signature(
    (("message", "own"),),
    "result<_, variant { timeout, connection(string), permission-denied(string), other(string) }>",
)
SAVE_STATE: Final = Signature((), "result<list<u8>, string>")
LOAD_STATE: Final = Signature((("state", "list<u8>"),), _OUTCOME)


def signature(function: wc.FuncType) -> Signature:
    """Read the type of a component's function."""
    result = function.result
    return Signature(
        tuple((name, _wit(kind)) for name, kind in function.params[:_MEMBERS_MAX])
        + (((_CUT, _CUT),) if len(function.params) > _MEMBERS_MAX else ()),
        "" if result is None else _wit(result),
        concurrent=bool(ffi.wasmtime_component_func_type_async(function.ptr())),
    )


def _wit(kind: wc.ValType, depth: int = _DEPTH_MAX) -> str:
    """Name a type as WIT does; one that is too large is cut, and so equals no expected one."""
    plain = _PLAIN.get(type(kind))
    if plain is not None:
        return plain
    if not depth:
        return _CUT

    def inner(each: wc.ValType | None) -> str:
        return "_" if each is None else _wit(each, depth - 1)

    match kind:
        case wc.ListType():
            arguments = [inner(kind.element)]
        case wc.OptionType():
            arguments = [inner(kind.payload)]
        case wc.ResultType():
            arguments = [inner(kind.ok), inner(kind.err)]
        case wc.TupleType():
            arguments = [inner(each) for each in kind.elements[: _MEMBERS_MAX + 1]]
        case _:
            arguments = []
    name = type(kind).__name__.removesuffix("Type").lower()
    if arguments:
        return f"{name}<{_members(arguments)}>"
    members = _members(_named(kind, inner))
    return f"{name} {{ {members} }}" if members else name


def _named(kind: wc.ValType, inner: Callable[[wc.ValType | None], str]) -> list[str]:
    """Name the members of a type that has names for them; no others have any."""
    match kind:
        case wc.RecordType():
            return [f"{name}: {inner(each)}" for name, each in kind.fields[: _MEMBERS_MAX + 1]]
        case wc.VariantType():
            cases = kind.cases[: _MEMBERS_MAX + 1]
            return [name if each is None else f"{name}({inner(each)})" for name, each in cases]
        case wc.EnumType() | wc.FlagsType():
            return kind.names[: _MEMBERS_MAX + 1]
        case _:
            return []


def _members(members: list[str]) -> str:
    return ", ".join(members if len(members) <= _MEMBERS_MAX else [*members[:_MEMBERS_MAX], _CUT])


class WrongKindError(WasmtimeError):
    """A value that came back is of another kind than its function's type promised."""


def _expect(value: Any, kind: Any) -> Any:
    """Give what a value holds, which is only there to be read if the value is of this kind. Raises WrongKindError."""
    if value.kind != kind.value:
        raise WrongKindError(f"the component returned a value of kind {value.kind} in place of {kind.value}")
    return value.of


class Codec(Protocol):
    """Calls `handle: func(request) -> response`."""

    def call(self, store: Store, func: Func, method: bytes, target: bytes, headers: bytes, body: bytes) -> Answer:
        """Call the guest; all but `body` must be UTF-8. Raises the binding's error if the call fails."""
        ...


def _point(vector: Any, array: Any) -> None:
    """Let a list's value begin at `array`, which its owner keeps.

    The address is written as a number: `ctypes.cast` ties an array and its pointer into a ring, and the memory of a
    large body would then be kept until the collector of rings comes by, long after the worker may have more.
    """
    ctypes.c_void_p.from_address(ctypes.addressof(vector) + type(vector).data.offset).value = ctypes.addressof(array)


def _pointer(string: Any) -> ctypes.c_char_p:
    """Where a string's value begins; set it to bytes, which it keeps until it is set again."""
    return ctypes.c_char_p.from_address(ctypes.addressof(string) + type(string).data.offset)


def _array(length: int) -> Any:
    """Make an array of `length` u8 values."""
    array = (ctypes.c_uint8 * (length * _VALUE))()
    if length:
        view = memoryview(array).cast("B")
        view[_KIND::_VALUE] = bytes([ffi.WASMTIME_COMPONENT_U8.value]) * length
    return array


class FastCodec:
    """The hand-laid request."""

    def __init__(self) -> None:
        self._names = [ctypes.create_string_buffer(name, len(name)) for name in _FIELDS]
        self._entries = (ffi.wasmtime_component_valrecord_entry * len(_FIELDS))()
        for entry, name in zip(self._entries, self._names, strict=True):
            entry.name.size = len(name)
            _point(entry.name, name)
            entry.val.kind = ffi.WASMTIME_COMPONENT_STRING
        self._entries[3].val.kind = ffi.WASMTIME_COMPONENT_LIST
        self._value = ffi.wasmtime_component_val_t()
        self._value.kind = ffi.WASMTIME_COMPONENT_RECORD
        self._value.of.record.size = len(_FIELDS)
        self._value.of.record.data = self._entries
        self._texts = [(entry.val.of.string, _pointer(entry.val.of.string)) for entry in self._entries[:3]]
        self._body = _array(0)
        self._room = 0

    def call(self, store: Store, func: Func, method: bytes, target: bytes, headers: bytes, body: bytes) -> Answer:
        """See `Codec.call`."""
        for (string, pointer), text in zip(self._texts, (method, target, headers), strict=True):
            string.size = len(text)
            pointer.value = text
        self._put(body)
        result = ffi.wasmtime_component_val_t()
        try:
            error = ffi.wasmtime_component_func_call(
                byref(func._func),  # noqa: SLF001 - the bindings offer no other way to the raw call
                store._context(),  # noqa: SLF001
                byref(self._value),
                1,
                byref(result),
                1,
            )
        finally:
            if self._room > _KEEP_VALUES:
                self._body, self._room = _array(0), 0
        if error:
            raise WasmtimeError._from_ptr(error)  # noqa: SLF001
        try:
            return _read(result)
        finally:
            ffi.wasmtime_component_val_delete(byref(result))

    def _put(self, body: bytes) -> None:
        length = len(body)
        if length > self._room:
            self._body, self._room = _array(length), length
        if length:
            memoryview(self._body).cast("B")[_PAYLOAD : length * _VALUE : _VALUE] = body
        values = self._entries[3].val.of.list
        values.size = length
        _point(values, self._body)


def _text(vector: Any) -> bytes:
    return ctypes.string_at(vector.data, vector.size) if vector.size else b""


def _read(result: Any) -> Answer:
    record = _expect(result, ffi.WASMTIME_COMPONENT_RECORD).record
    entries = (record.data[number] for number in range(record.size))
    fields = {_text(entry.name): entry.val for entry in entries}
    try:
        status, headers, body = fields[b"status"], fields[b"headers"], fields[b"body"]
    except KeyError as error:
        raise WrongKindError(f"the component returned a record without the field {error}") from error
    return (
        _expect(status, ffi.WASMTIME_COMPONENT_U16).u16,
        _text(_expect(headers, ffi.WASMTIME_COMPONENT_STRING).string),
        _bytes(body),
    )


def _bytes(value: Any) -> bytes:
    values = _expect(value, ffi.WASMTIME_COMPONENT_LIST).list
    if not values.size:
        return b""
    _expect(values.data[0], ffi.WASMTIME_COMPONENT_U8)  # a list's values are all of one kind
    raw = (ctypes.c_uint8 * (values.size * _VALUE)).from_address(ctypes.addressof(values.data.contents))
    return memoryview(raw).cast("B")[_PAYLOAD::_VALUE].tobytes()


def exchange(store: Store, func: Func, head: bytes) -> bytes:
    """Call `handle: func(head: string) -> string`; `head` must be UTF-8. Raises the binding's error if it fails."""
    value, result = ffi.wasmtime_component_val_t(), ffi.wasmtime_component_val_t()
    value.kind = ffi.WASMTIME_COMPONENT_STRING
    value.of.string.size = len(head)
    _pointer(value.of.string).value = head
    error = ffi.wasmtime_component_func_call(
        byref(func._func),  # noqa: SLF001 - the bindings offer no other way to the raw call
        store._context(),  # noqa: SLF001
        byref(value),
        1,
        byref(result),
        1,
    )
    if error:
        raise WasmtimeError._from_ptr(error)  # noqa: SLF001
    try:
        return _text(_expect(result, ffi.WASMTIME_COMPONENT_STRING).string)
    finally:
        ffi.wasmtime_component_val_delete(byref(result))


def give_bytes(store: Store, func: Func) -> tuple[bytes, str | None]:
    """Call `func() -> result<list<u8>, string>`: bytes, or a sentence. Raises the binding's error if it fails."""
    result = ffi.wasmtime_component_val_t()
    error = ffi.wasmtime_component_func_call(byref(func._func), store._context(), None, 0, byref(result), 1)  # noqa: SLF001
    if error:
        raise WasmtimeError._from_ptr(error)  # noqa: SLF001
    try:
        problem = _problem(result)
        return (b"" if problem is not None else _bytes(_payload(result))), problem
    finally:
        ffi.wasmtime_component_val_delete(byref(result))


def take_bytes(store: Store, func: Func, data: bytes) -> str | None:
    """Call `func(data: list<u8>) -> result<_, string>`: None, or a sentence. Raises the binding's error if it fails."""
    value, result = ffi.wasmtime_component_val_t(), ffi.wasmtime_component_val_t()
    array = _array(len(data))
    if data:
        memoryview(array).cast("B")[_PAYLOAD::_VALUE] = data
    value.kind = ffi.WASMTIME_COMPONENT_LIST
    value.of.list.size = len(data)
    _point(value.of.list, array)
    error = ffi.wasmtime_component_func_call(
        byref(func._func),  # noqa: SLF001
        store._context(),  # noqa: SLF001
        byref(value),
        1,
        byref(result),
        1,
    )
    if error:
        raise WasmtimeError._from_ptr(error)  # noqa: SLF001
    try:
        return _problem(result)
    finally:
        ffi.wasmtime_component_val_delete(byref(result))


def _problem(result: Any) -> str | None:
    if _expect(result, ffi.WASMTIME_COMPONENT_RESULT).result.is_ok:
        return None
    return _text(_expect(_payload(result), ffi.WASMTIME_COMPONENT_STRING).string).decode(errors="replace")


def _payload(result: Any) -> Any:
    """Give what a result's case carries. Raises WrongKindError where that is nothing."""
    if not result.of.result.val:
        raise WrongKindError("the component returned a case that carries no value")
    return result.of.result.val.contents


def set_stdin(wasi: WasiConfig, body: bytes) -> None:
    """Make `body` the standard input of a store."""
    vector = ffi.wasm_byte_vec_t()
    # The array is copied, and its owner is then the configuration.
    ffi.wasm_byte_vec_new(byref(vector), len(body), ctypes.cast(ctypes.c_char_p(body), ctypes.POINTER(ctypes.c_uint8)))
    ffi.wasi_config_set_stdin_bytes(wasi.ptr(), byref(vector))


class StockCodec:
    """The bindings' own codec: slower, and the measure of the other."""

    def call(self, store: Store, func: Func, method: bytes, target: bytes, headers: bytes, body: bytes) -> Answer:
        """See `Codec.call`."""
        request: Any = Record()
        request.method, request.target, request.headers = method.decode(), target.decode(), headers.decode()
        request.body = body
        answer = func(store, request)
        return answer.status, answer.headers.encode(), bytes(answer.body)


class Failure:
    """Error of a host function's result: the bindings cannot tell one from a success whose type is an option."""

    def __init__(self, error: Any) -> None:
        self.error = error


_result_to_c: Final = wc.ResultType.convert_to_c
_list_to_c: Final = wc.ListType.convert_to_c
_list_from_c: Final = wc.ListType.convert_from_c


def _lower_result(kind: wc.ResultType, store: Any, value: Any, into: Any) -> None:
    if not isinstance(value, Failure):
        _result_to_c(kind, store, value, into)
        return
    raw, error = ffi.wasmtime_component_val_t(), kind.err
    assert error is not None, "a result whose error carries a value"
    error.convert_to_c(store, value.error, ctypes.pointer(raw))
    into.contents.kind = ffi.WASMTIME_COMPONENT_RESULT
    into.contents.of.result.is_ok = False
    into.contents.of.result.val = ffi.wasmtime_component_val_new(byref(raw))


def _lower_list(kind: wc.ListType, store: Any, value: Any, into: Any) -> None:
    """Lay out bytes by one strided copy; the bindings take a microsecond for each."""
    if not isinstance(value, bytes) or not isinstance(kind.element, wc.U8):
        _list_to_c(kind, store, value, into)
        return
    raw = ffi.wasmtime_component_vallist_t()
    ffi.wasmtime_component_vallist_new_uninit(raw, len(value))
    if value:
        room = (ctypes.c_uint8 * (len(value) * _VALUE)).from_address(ctypes.addressof(raw.data.contents))
        view = memoryview(room).cast("B")
        view[_KIND::_VALUE] = bytes([ffi.WASMTIME_COMPONENT_U8.value]) * len(value)
        view[_PAYLOAD::_VALUE] = value
    into.contents.kind = ffi.WASMTIME_COMPONENT_LIST
    into.contents.of.list = raw


def _lift_list(kind: wc.ListType, value: Any) -> Any:
    if not isinstance(kind.element, wc.U8):
        return _list_from_c(kind, value)
    try:
        return _bytes(value)
    finally:
        ffi.wasmtime_component_vallist_delete(byref(value.of.list))


# The bindings have no other place for it; tests/agent/host/interfaces/test_keyvalue.py sends every shape through them.
for _kind, _name, _ours in (
    (wc.ResultType, "convert_to_c", _lower_result),
    (wc.ListType, "convert_to_c", _lower_list),
    (wc.ListType, "convert_from_c", _lift_list),
):
    setattr(_kind, _name, _ours)
