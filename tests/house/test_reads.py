"""Reads of a device go through `fleet.protocol.files`: `open` waits for the other end of a named pipe, or has no bound.

Files of the kernel, which are what they are, have rows below.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAITING = frozenset(["read_text", "read_bytes"])

# file -> reads beside the door, and why nothing else can be in the place of what they read
BESIDE = {
    "agent/arguments.py": ({"os.open"}, "/dev/null"),
    "agent/clock.py": ({".read_text"}, "the kernel's"),
    "agent/disk.py": ({".open"}, "reads and writes: a pipe has both ends then; a new file"),
    "agent/identity/identity.py": ({".read_text"}, "the kernel's"),
    "agent/link/bundle.py": ({"os.open"}, "a pipe, without waiting"),
    "agent/link/https.py": ({".load_cert_chain"}, "read before"),
    "agent/report/device_info.py": ({".read_text"}, "the kernel's"),
    "agent/report/diagnose.py": ({".read_text", "os.open"}, "the kernel's"),
    "agent/update/images.py": ({".read_text"}, "the kernel's"),
    "agent/update/store.py": ({"os.open"}, "of the lock, without waiting"),
    "agent/host/compiler/component_check.py": (
        {".open", "open"},
        "what an author names, and memory",
    ),
    "agent/host/engine/memory_in_use.py": ({"os.open"}, "the kernel's"),
    "agent/host/engine/runtime.py": ({".read_text"}, "the kernel's"),
    "agent/host/http/tls.py": ({".load_cert_chain"}, "read before"),
    "agent/host/interfaces/outgoing_http.py": ({".read_text"}, "certificates of the system"),
    "agent/host/interfaces/page.py": ({".read_text"}, "the project's own, while its documentation is written"),
    "agent/host/ipc/write_quota.py": ({"os.open"}, "the kernel's"),
    "agent/host/processes.py": ({".read_text", ".read_bytes"}, "the kernel's"),
    "agent/host/sandbox/kernel.py": ({"os.open"}, "the kernel's"),
    "agent/host/sandbox/sandbox.py": ({"os.open"}, "the kernel's, and directories"),
    "agent/host/supervisor/pinned_modules.py": ({"os.open"}, "the program itself"),
    "agent/host/engine/image_file.py": ({"os.open"}, "an image in memory"),
    "agent/host/hardware_check.py": ({".read_text"}, "a file, as was looked at before"),
    "agent/host/ipc/serial_abi.py": ({"os.open"}, "a device node, without waiting"),
    "agent/host/supervisor/hardware.py": ({"os.open"}, "device nodes, which no pipe replaces but by root"),
    "agent/report/metrics.py": ({"os.open"}, "directories"),
    "signing/updater.py": ({".open", ".read_bytes"}, "state of a client that is no device"),
    "agent/host/supervisor/resources.py": ({".read_text", "os.open"}, "the kernel's, and /dev/null"),
}


def reads(tree):
    """Yield each call that opens a file to read it otherwise than through the door, as a name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open":
            yield "open"
        if not isinstance(function, ast.Attribute):
            continue
        of = function.value.id if isinstance(function.value, ast.Name) else ""
        if of == "os" and function.attr == "open":
            yield "os.open"
        elif function.attr == "load_cert_chain" or (function.attr in WAITING and of != "files"):
            yield f".{function.attr}"
        elif function.attr == "open" and of not in {"os", "tarfile", "self"} and is_of_a_path(node):
            yield ".open"


def is_of_a_path(node):
    first = node.args[0] if node.args else None
    return isinstance(first, ast.Constant) and isinstance(first.value, str) and set(first.value) <= set("rwxabt+")


def device_files():
    for file in (*sorted((ROOT / "agent").rglob("*.py")), ROOT / "signing" / "updater.py"):
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def test_a_device_reads_through_the_door_alone():
    found = {}
    for name, tree in device_files():
        beside = set(reads(tree)) - BESIDE.get(name, (set(), ""))[0]
        if beside:
            found[name] = sorted(beside)
    assert found == {}, "read with fleet.protocol.files: read, read_text or open_to_read"


@pytest.mark.parametrize("name", BESIDE)
def test_the_list_of_reads_beside_the_door_names_no_others(name):
    assert BESIDE[name][0] <= set(reads(ast.parse((ROOT / name).read_text())))


@pytest.mark.parametrize(
    "line",
    ["open(path)", "path.open('rb')", "os.open(path, os.O_RDONLY)", "path.read_text()", "made.load_cert_chain(a, b)"],
)
def test_a_read_beside_the_door_is_found(line):
    assert list(reads(ast.parse(line)))


@pytest.mark.parametrize("line", ["files.read_text(path)", "logs.open(name)", "tarfile.open(fileobj=f, mode='r:')"])
def test_what_is_no_such_read_is_not_found(line):
    assert not list(reads(ast.parse(line)))
