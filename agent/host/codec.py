"""How an HTTP exchange crosses into a guest: values laid out by hand, since the stock way costs a microsecond a byte.

Owns one request value and reuses it: the strings point straight into Python's bytes, and a body is one strided copy
into an array of C values that only grows (a value is 32 bytes, its byte stands at offset 8). Not thread-safe, like
everything of the bindings: one process, one thread that enters wasm.

The layout is read from the bindings' own structures, and `agent.host.selftest.self_test` sends bytes through a real
component before anything relies on it; where that fails, the stock codec serves (`Stock`).
"""

import ctypes
from ctypes import byref
from typing import Any, Final, Protocol

from wasmtime import Store, WasiConfig, WasmtimeError
from wasmtime import _ffi as ffi
from wasmtime.component import Func, Record

_VALUE: Final = ctypes.sizeof(ffi.wasmtime_component_val_t)
_PAYLOAD: Final = ffi.wasmtime_component_val_t.of.offset
_KIND: Final = ffi.wasmtime_component_val_t.kind.offset
_FIELDS: Final = (b"method", b"target", b"headers", b"body")
_KEEP_VALUES: Final = 64 * 1024  # a buffer for larger bodies is given back after the call

Answer = tuple[int, bytes, bytes]


class Codec(Protocol):
    """Calls `handle: func(request) -> response`."""

    def call(self, store: Store, func: Func, method: bytes, target: bytes, headers: bytes, body: bytes) -> Answer:
        """Call the guest; all but `body` must be UTF-8. Raises the binding's error if the call fails."""
        ...


def _point(vector: Any, array: Any) -> None:
    """Let a list's value begin at `array`, which its owner keeps.

    The address is written as a number: `ctypes.cast` ties an array and its pointer into a ring, and the memory of a
    large body would then be kept until the collector of rings comes by, long after the lane may have more.
    """
    ctypes.c_void_p.from_address(ctypes.addressof(vector) + type(vector).data.offset).value = ctypes.addressof(array)


def _pointer(string: Any) -> ctypes.c_char_p:
    """Where a string's value begins; set it to bytes, which it keeps until it is set again."""
    return ctypes.c_char_p.from_address(ctypes.addressof(string) + type(string).data.offset)


def _array(length: int) -> Any:
    """An array of `length` u8 values."""
    array = (ctypes.c_uint8 * (length * _VALUE))()
    if length:
        view = memoryview(array).cast("B")
        view[_KIND::_VALUE] = bytes([ffi.WASMTIME_COMPONENT_U8.value]) * length
    return array


class Fast:
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
    assert result.kind == ffi.WASMTIME_COMPONENT_RECORD.value
    fields = {_text(result.of.record.data[i].name): result.of.record.data[i].val for i in range(result.of.record.size)}
    body = _bytes(fields[b"body"].of.list)
    return fields[b"status"].of.u16, _text(fields[b"headers"].of.string), body


def _bytes(values: Any) -> bytes:
    if not values.size:
        return b""
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
        assert result.kind == ffi.WASMTIME_COMPONENT_STRING.value
        return _text(result.of.string)
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
        return (b"" if problem is not None else _bytes(result.of.result.val.contents.of.list)), problem
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
    assert result.kind == ffi.WASMTIME_COMPONENT_RESULT.value
    if result.of.result.is_ok:
        return None
    return _text(result.of.result.val.contents.of.string).decode(errors="replace")


def set_stdin(wasi: WasiConfig, body: bytes) -> None:
    """Make `body` the standard input of a store."""
    vector = ffi.wasm_byte_vec_t()
    # The array is copied, and its owner is then the configuration.
    ffi.wasm_byte_vec_new(byref(vector), len(body), ctypes.cast(ctypes.c_char_p(body), ctypes.POINTER(ctypes.c_uint8)))
    ffi.wasi_config_set_stdin_bytes(wasi.ptr(), byref(vector))


class Stock:
    """The bindings' own codec: slower, and the measure of the other."""

    def call(self, store: Store, func: Func, method: bytes, target: bytes, headers: bytes, body: bytes) -> Answer:
        """See `Codec.call`."""
        request: Any = Record()
        request.method, request.target, request.headers = method.decode(), target.decode(), headers.decode()
        request.body = body
        answer = func(store, request)
        return answer.status, answer.headers.encode(), bytes(answer.body)
