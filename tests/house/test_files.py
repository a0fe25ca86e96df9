"""Files are replaced by `fleet.protocol.files` alone: a variant made by hand forgets a step of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = frozenset({"write_bytes", "write_text", "rename", "mkstemp", "NamedTemporaryFile"})
COVERED = ("agent", "fleet", "signing")
OWNER = ROOT / "fleet" / "protocol" / "files.py"

# file -> why what it writes is no replacement that a power cut may tear
OTHERS = {
    "agent/disk.py": "a log, and a tree that is on the medium already",
    "agent/host/cli.py": "the reason why the host did not start, in a directory that a boot empties",
    "agent/host/supervisor/resources.py": "files of the kernel's control groups",
    "fleet/cli/base.py": "what is no file, such as /dev/stdout; a file by move_into_place",
    "fleet/cli/keys.py": "a directory that is made anew, or refused",
    "fleet/demo/environment.py": "the demo's own directory",
    "signing/conformance.py": "the cache of the conformance client, which the suite makes for each test",
}


def written_by_hand(tree):
    """Lines of calls that write or rename a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of_os = node.func.attr, isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
        # str.replace takes two arguments, Path.replace one
        renames = name == "replace" and (of_os or (len(node.args) == 1 and not node.keywords))
        if name in BY_HAND or renames:
            yield node.lineno


@pytest.mark.parametrize("place", COVERED)
def test_files_are_replaced_in_one_way(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        if file != OWNER and str(file.relative_to(ROOT)) not in OTHERS
        for line in written_by_hand(ast.parse(file.read_text()))
    ]
    assert not found, f"use atomic_write, create_exclusive or move_into_place of fleet.protocol.files: {found}"


IN_TMP = frozenset({"TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "TemporaryDirectory", "gettempdir"})
DEVICE = ("agent", "signing", "fleet/protocol", "fleet/component")


def test_nothing_on_a_device_needs_a_directory_for_temporary_files():
    """A device with a full or read-only /tmp goes on starting and updating."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for place in DEVICE
        for file in sorted((ROOT / place).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in IN_TMP
    ]
    assert not found, f"use framing.memory_file, or a file beside the one that is written: {found}"


@pytest.mark.parametrize("name", OTHERS)
def test_the_list_of_others_has_no_file_that_needs_it_no_longer(name):
    assert list(written_by_hand(ast.parse((ROOT / name).read_text())))
