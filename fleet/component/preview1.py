"""Adapt commands of WASI Preview 1 to WASI 0.2, as `wasm-tools component new --adapt` does.

A command is a core module that imports `wasi_snapshot_preview1` alone and exports its memory and `_start`. The file
beside this module is a component of Wasmtime's published adapter and of a command that imports everything and does
nothing, which is its first core module. Adapting writes another command in its place: all else names that module by its
number, and a module may leave out imports. A function that a command imports twice is there under a second name, as
`wasm-tools` has it. components/preview1 has the build. Pure.
"""

import functools
from typing import Final

from fleet.component import binary
from fleet.component.reader import CORE_MODULE, Fault, NotAComponentError

MODULE: Final = binary.PREVIEW1
ADAPTER: Final = "wasi_snapshot_preview1.command.wasm of Wasmtime 50.0.1"
ADAPTER_SHA256: Final = "0b4fe490390ecc9c2222f969f65b179e658a3327e005efd4ddc959766132a3c4"
"""Of the adapter as its crate has it, wasi-preview1-component-adapter-provider 50.0.1."""

_FILE: Final = "preview1.wasm.xz"


def adapted(data: bytes, *, file_name: str = "component.wasm") -> bytes | None:
    """Return the component for a command; None for what is none, which `fleet.component.reader` explains.

    Raises:
        NotAComponentError: a command that the adapter cannot serve.
    """
    if not data.startswith(binary.MODULE):
        return None
    try:
        command = binary.unique_imports(data)
        names = binary.core_names(command)
    except binary.DamagedError:
        return None
    if names.modules != {MODULE} or "_start" not in names.exports or names.is_embedded():
        return None
    head = f"{file_name} is a command of WASI Preview 1"
    if "memory" not in names.exports:
        raise NotAComponentError(
            Fault.CORE_MODULE, f"{head} that exports no memory, so that nothing can answer it: export it as 'memory'"
        )
    if unknown := sorted(names.imports - _functions()):
        raise NotAComponentError(
            Fault.CORE_MODULE,
            f"{head} and imports {unknown[0][:80]}, which Preview 1 does not have: build it for WASI 0.2 (target "
            "wasm32-wasip2), where sockets and more are interfaces",
        )
    before, _, after = _around()
    return before + binary.section(CORE_MODULE, command) + after


@functools.cache
def _around() -> tuple[bytes, bytes, bytes]:
    """Return the adapter before its command, that command, and what follows."""
    import lzma  # noqa: PLC0415 - few commands read the adapter
    from importlib import resources  # noqa: PLC0415

    whole = lzma.decompress(resources.files("fleet.component").joinpath(_FILE).read_bytes())
    begin = binary.PREAMBLE_BYTES
    for section in binary.sections(whole, 0, len(whole)):
        if section.id == CORE_MODULE:
            return whole[:begin], whole[section.start : section.end], whole[section.end :]
        begin = section.end
    raise AssertionError(f"{_FILE} has no core module: it was not built by components/preview1/build.py")


@functools.cache
def _functions() -> frozenset[str]:
    """Return the functions of Preview 1, which the command in the adapter's file imports."""
    return binary.core_names(_around()[1]).imports
