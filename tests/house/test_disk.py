"""Writes to a device's disk go through `agent.disk` alone, each under a name of its own.

Tests cut the power at each named write; one that is made beside the doors would never be cut.
"""

import ast
from pathlib import Path

import pytest

from agent.disk import Write

ROOT = Path(__file__).resolve().parents[2]
DOORS = ROOT / "agent" / "disk.py"
OF_OS = frozenset(
    [
        *("rename", "renames", "replace", "link", "symlink", "unlink", "remove", "mkdir", "makedirs", "rmdir"),
        *("removedirs", "mkfifo", "mknod", "truncate", "ftruncate"),
    ]
)
OF_PATHS = frozenset(
    ["unlink", "mkdir", "rmdir", "touch", "write_text", "write_bytes", "rename", "symlink_to", "hardlink_to", "lchmod"]
)
OF_FILES = frozenset(
    ["atomic_write", "create_exclusive", "move_into_place", "set_aside", "remove_leftovers", "sync_directory"]
)
WRITING_FLAGS = frozenset(["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"])
TREES = frozenset(["rmtree", "copy", "copy2", "copyfile", "copytree", "move"])

# file -> calls beside the doors, and why they write nothing that a power cut could tear
BESIDE = {
    "agent/arguments.py": ({"os.open"}, "/dev/null"),
    "agent/link/bundle.py": ({"os.open"}, "opens the pipe to write a byte into it"),
    "agent/update/store.py": ({"sqlite3.connect"}, "the door to the database"),
    "agent/host/keyvalue.py": ({"sqlite3.connect"}, "the door to the pairs"),
    "agent/report/metrics.py": ({".unlink"}, "a socket in the runtime directory"),
    "agent/host/cli.py": ({".write_text"}, "the runtime directory, which a boot empties"),
    "agent/host/ipc/framing.py": ({"os.ftruncate"}, "memory"),
    "agent/host/sandbox/kernel.py": ({"os.open"}, "a file of the kernel"),
    "agent/host/sandbox/sandbox.py": ({"os.mkdir"}, "a file system in memory"),
    "agent/host/supervisor/agent_server.py": ({".unlink"}, "a socket in the runtime directory"),
    "agent/host/ipc/serial_abi.py": ({"os.open"}, "a device's node"),
    "agent/host/supervisor/hardware.py": ({"os.open"}, "a device's node"),
    "agent/host/supervisor/pinned_modules.py": (
        {".mkdir", ".symlink_to", "shutil.rmtree"},
        "links in the runtime directory",
    ),
    "agent/host/supervisor/resources.py": (
        {".mkdir", ".rmdir", ".unlink", ".write_text"},
        "control groups, and sockets in the runtime directory",
    ),
    "agent/host/supervisor/supervisor.py": ({".unlink"}, "the runtime directory"),
    "agent/host/compiler/component_check.py": ({"open"}, "a file in memory"),
}


def writes(tree):
    """Yield each call that may change what is on a disk, as a name; `disk.x` are the doors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fleet.protocol.files":
            yield from (f"files.{alias.name}" for alias in node.names if alias.name in OF_FILES)
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open" and writes_by_mode(node, 1):
            yield "open"
        if not isinstance(function, ast.Attribute):
            continue
        of = function.value.id if isinstance(function.value, ast.Name) else ""
        if of == "os" and (function.attr in OF_OS or (function.attr == "open" and flags(node) & WRITING_FLAGS)):
            yield f"os.{function.attr}"
        elif of == "shutil" and function.attr in TREES:
            yield f"shutil.{function.attr}"
        elif (of, function.attr) == ("sqlite3", "connect") or of == "tempfile":
            yield f"{of}.{function.attr}"
        elif of not in {"os", "disk", "tarfile"} and is_of_a_path(node, function.attr):
            yield f".{function.attr}"


def is_of_a_path(node, name):
    if name == "open":
        return writes_by_mode(node, 0)
    # str.replace takes two arguments, Path.replace one
    return name in OF_PATHS or (name == "replace" and len(node.args) == 1 and not node.keywords)


def writes_by_mode(node, place):
    given = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] or node.args[place : place + 1]
    mode = given[0].value if given and isinstance(given[0], ast.Constant) else ""
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))


def flags(node):
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def trees():
    for file in sorted((ROOT / "agent").rglob("*.py")):
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def test_a_device_writes_through_the_doors_alone():
    found = {}
    for name, tree in trees():
        beside = set(writes(tree)) - BESIDE.get(name, (set(), ""))[0]
        if beside and ROOT / name != DOORS:
            found[name] = sorted(beside)
    assert found == {}, "write through agent.disk, under a name of its own"


@pytest.mark.parametrize("name", BESIDE)
def test_the_list_of_calls_beside_the_doors_names_no_others(name):
    assert BESIDE[name][0] <= set(writes(ast.parse((ROOT / name).read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "open('x', 'w')",
        "path.open('r+b')",
        "path.open(mode='ab')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "os.replace(a, b)",
        "path.replace(b)",
        "path.unlink()",
        "shutil.rmtree(path)",
        "sqlite3.connect(path)",
        "from fleet.protocol.files import atomic_write",
        "tempfile.mkstemp()",
    ],
)
def test_a_write_beside_the_doors_is_found(line):
    assert list(writes(ast.parse(line)))


@pytest.mark.parametrize("line", ["p.open('rb')", "t.replace('a', 'b')", "disk.remove(x)", "os.open(p, os.O_RDONLY)"])
def test_what_is_no_write_is_not_found(line):
    assert not list(writes(ast.parse(line)))


def test_each_name_is_used_in_one_place_or_more():
    used = {
        node.attr
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Write"
    }
    assert used == {each.name for each in Write}
