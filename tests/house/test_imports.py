"""The house is held to its plan: who may import whom, and one door per library. Read from the source, never run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent", "fleet", "signing")
OURS = frozenset(PACKAGES)


@dataclass(frozen=True)
class Import:
    """One import: where it stands, what it names."""

    module: str
    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> Iterator[Import]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(), str(file))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{file}: relative imports hide who depends on whom"
                    base = node.module or ""
                    # `from fleet.protocol import caps` names a module of ours; `from pathlib import Path` does not
                    names = [f"{base}.{alias.name}" if is_module(base, alias.name) else base for alias in node.names]
                else:
                    continue
                for name in names:
                    yield Import(module_name(file), file, node.lineno, name)


def is_module(base: str, name: str) -> bool:
    if base.split(".", maxsplit=1)[0] not in OURS:
        return False
    path = ROOT.joinpath(*base.split("."), name)
    return path.is_dir() or path.with_suffix(".py").exists()


ALL = list(imports())


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room(module: str) -> str:
    """The room of the plan that a module stands in: the most specific that fits."""
    for name in ("fleet.protocol", "fleet.rollout", "agent.update", "agent.host"):
        if within(module, name):
            return name
    return module.split(".", maxsplit=1)[0]


# room -> (our rooms it may use beside itself, third-party libraries it may use; None for any)
PLAN: dict[str, tuple[tuple[str, ...], frozenset[str] | None]] = {
    "fleet.protocol": ((), frozenset({"msgspec"})),
    "signing": (("fleet.protocol",), frozenset({"cryptography", "tuf", "securesystemslib", "msgspec"})),
    "fleet.rollout": ((), frozenset()),
    "agent.update": (("fleet.protocol.codes", "fleet.protocol.messages"), frozenset()),
    "agent": (
        ("agent.update", "signing", "fleet.protocol", "agent.host.ipc"),
        frozenset({"msgspec", "cryptography", "paho", "systemd", "securesystemslib", "tuf"}),
    ),
    "agent.host": (
        ("fleet.protocol", "agent.systemd"),
        frozenset({"msgspec", "wasmtime", "httptools", "pyseccomp", "seccomp", "smbus2", "gpiod"}),
    ),
    "fleet": (("fleet.rollout", "fleet.protocol", "signing"), None),
}


@pytest.mark.parametrize("name", PLAN)
def test_a_room_imports_only_what_the_plan_allows(name: str) -> None:
    ours, libraries = PLAN[name]
    broken = []
    for each in (each for each in ALL if room(each.module) == name):
        top = each.name.split(".")[0]
        if top in OURS:
            if room(each.name) != name and not within(each.name, *ours):
                broken.append(str(each))
        elif top not in _stdlib() and libraries is not None and top not in libraries:
            broken.append(str(each))
    assert not broken, "\n".join(broken)


def _stdlib() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names | {"__future__"}


# library -> the modules that may import it: one door a side
DOORS: dict[str, tuple[str, ...]] = {
    "wasmtime": ("agent.host.engine", "agent.host.codec"),
    "paho": ("agent.bus", "fleet.server.bus"),
    "systemd": ("agent.systemd",),
    "sqlite3": ("agent.store", "fleet.store"),
    "sqlite_utils": ("fleet.store",),
    "amqtt": ("fleet.server.broker",),
    "httpx": ("fleet.client",),
    "pyseccomp": ("agent.host.cell", "agent.host.seccomp"),
    "httptools": ("agent.host",),
    "univers": ("fleet.evidence.query",),
    "packageurl": ("fleet.evidence.packages",),
}


@pytest.mark.parametrize("library", DOORS)
def test_one_library_one_door(library: str) -> None:
    outside = [str(each) for each in ALL if within(each.name, library) and not within(each.module, *DOORS[library])]
    assert not outside, "\n".join(outside)


def test_nobody_imports_a_command_or_a_test() -> None:
    broken = [
        str(each)
        for each in ALL
        if within(each.name, "tests")
        or (each.name.split(".")[0] in OURS and "cli" in each.name.split(".") and "cli" not in each.module.split("."))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("package", ["agent", "agent/host", "fleet", "fleet/protocol", "signing"])
def test_package_files_are_empty(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_no_package_files_under_tests() -> None:
    # tests/agent/__init__.py would shadow the product's `agent`, in importlib mode too
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_top_level_is_what_was_agreed() -> None:
    allowed = {"agent", "fleet", "signing", "components", "deploy", "tests", "docs"}
    tracked = {path.split("/")[0] for path in _tracked() if "/" in path and not path.startswith(".")}
    assert tracked <= allowed


def test_no_binaries_beyond_small_fixtures() -> None:
    fixtures = [ROOT / path for path in _tracked() if b"\0" in (ROOT / path).read_bytes()[:8192]]
    assert sum(file.stat().st_size for file in fixtures) <= 100 * 1024, fixtures


def _tracked() -> list[str]:
    import subprocess

    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).is_file()]
