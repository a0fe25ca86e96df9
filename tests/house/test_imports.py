"""Import rules of the layout: who may import whom, which level stands above which, one importer per library.

Read from the source, never run. `docs/architecture.md` shows the same rules in prose.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent", "fleet", "signing")
OURS = frozenset(PACKAGES)
STDLIB = sys.stdlib_module_names | {"__future__"}


@dataclass(frozen=True)
class Import:
    """One import: where it stands, what it names, and whether it runs when the module is loaded."""

    module: str
    file: Path
    line: int
    name: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(base: str, name: str) -> bool:
    if base.split(".", maxsplit=1)[0] not in OURS:
        return False
    path = ROOT.joinpath(*base.split("."), name)
    return path.is_dir() or path.with_suffix(".py").exists()


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, *, at_load: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, at_load
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking(node)
        yield from nodes(node, at_load=at_load and not later)


def imports() -> Iterator[Import]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node, at_load in nodes(ast.parse(file.read_text(), str(file))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{file}: relative imports hide who depends on whom"
                    base = node.module or ""
                    # `from fleet.protocol import bounds` names a module of ours; `from pathlib import Path` does not
                    names = [f"{base}.{alias.name}" if is_module(base, alias.name) else base for alias in node.names]
                else:
                    continue
                for name in names:
                    yield Import(module_name(file), file, node.lineno, name, at_load)


ALL = list(imports())


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


# The rules, most specific room first: what of ours the room may import beside itself, and which libraries (None: any).
LINK_TO_THE_HOST = tuple(f"agent.host.ipc.{name}" for name in ("framing", "host_api", "packet_writer"))
SIGNING_ON_A_DEVICE = tuple(
    f"signing.{name}"
    for name in (
        "errors",
        "state",
        "metadata",
        "trusted_metadata",
        "updater",
        "verifier",
        "policy",
        "dsse",
        "device_statements",
        "sealing",
    )
)
ROOMS: dict[str, tuple[tuple[str, ...], frozenset[str] | None]] = {
    "fleet.protocol": ((), frozenset({"msgspec"})),
    "fleet.component": (("fleet.protocol",), frozenset({"msgspec"})),
    "fleet.rollout": (("fleet.protocol",), frozenset({"msgspec"})),
    "agent.update.machine": (("fleet.protocol",), frozenset()),
    "agent.update.plan": (("fleet.protocol",), frozenset()),
    "agent.update.probation": (("fleet.protocol",), frozenset()),
    "signing": (("fleet.protocol",), frozenset({"cryptography", "tuf", "securesystemslib", "msgspec"})),
    "agent.host": (
        ("fleet.protocol", "fleet.component", "agent.arguments", "agent.disk", "agent.happy_eyeballs", "agent.systemd"),
        frozenset({"msgspec", "wasmtime", "httptools", "pyseccomp"}),
    ),
    "agent": (
        ("fleet.protocol", "fleet.component", *LINK_TO_THE_HOST, *SIGNING_ON_A_DEVICE),
        frozenset({"msgspec", "cryptography", "paho", "systemd", "securesystemslib", "tuf"}),
    ),
    "fleet": (("signing",), None),
}
PURE = (
    "fleet.rollout",
    "agent.update.machine",
    "agent.update.plan",
    "agent.update.probation",
    *(
        f"signing.{name}"
        for name in ("state", "metadata", "dsse", "policy", "trusted_metadata", "director", "verifier")
    ),
    "agent.host.supervisor.crash_policy",
)
IMPURE = ("asyncio", "logging", "os", "pathlib", "random", "socket", "sqlite3", "subprocess", "threading", "time")


def room(module: str) -> str:
    return next(name for name in ROOMS if within(module, name))


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_the_layout_allows(name: str) -> None:
    ours, libraries = ROOMS[name]
    parent = "agent" if name.startswith("agent.update.") else name
    broken = []
    for each in (each for each in ALL if room(each.module) == name):
        top = each.name.split(".")[0]
        if top in OURS:
            home = within(each.name, parent) and (parent != "agent" or not within(each.name, "agent.host"))
            if not (home or within(each.name, *ours)):
                broken.append(str(each))
        elif top not in STDLIB and libraries is not None and top not in libraries:
            broken.append(str(each))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", PURE)
def test_decisions_are_pure(name: str) -> None:
    broken = [
        str(each)
        for each in ALL
        if within(each.module, name)
        and (within(each.name, *IMPURE) or within(each.name, "fleet.protocol.files"))
        and not within(each.module, "agent.update.__main__")
    ]
    assert not broken, "\n".join(broken)


# Levels within a package, lowest first. A module imports its own level and lower ones only.
LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "agent": (
        (
            "agent.arguments",
            "agent.clock",
            "agent.config",
            "agent.disk",
            "agent.happy_eyeballs",
            "agent.kept_log",
            "agent.proxy",
            "agent.starts",
            "agent.systemd",
            "agent.host",
        ),
        ("agent.link",),
        ("agent.identity",),
        ("agent.update",),
        ("agent.report",),
        ("agent.commands", "agent.session"),
        ("agent.service",),
        ("agent.cli",),
    ),
    "agent.host": (
        ("agent.host.ipc",),
        ("agent.host.sandbox",),
        ("agent.host.http", "agent.host.engine"),
        ("agent.host.interfaces",),
        ("agent.host.datagrams",),
        ("agent.host.compiler", "agent.host.worker", "agent.host.egress", "agent.host.keyvalue"),
        ("agent.host.supervisor",),
        ("agent.host.hardware_check",),
        ("agent.host.dev", "agent.host.processes"),
        ("agent.host.cli",),
    ),
    "signing": (
        ("signing.errors", "signing.state"),
        ("signing.metadata", "signing.dsse", "signing.policy"),
        (
            "signing.trusted_metadata",
            "signing.director",
            "signing.device_statements",
            "signing.sealing",
            "signing.keys",
        ),
        ("signing.verifier", "signing.repository", "signing.keyring"),
        ("signing.updater",),
        ("signing.hash_bins", "signing.rotation"),
        ("signing.events",),
        ("signing.event_diff", "signing.conformance"),
    ),
    "fleet": (
        ("fleet.protocol",),
        ("fleet.component", "fleet.rollout"),
        ("fleet.store", "fleet.ca", "fleet.client", "fleet.evidence"),
        ("fleet.server",),
        ("fleet.admin",),
        ("fleet.cli", "fleet.demo", "fleet.simulator"),
    ),
}


def level(package: str, module: str) -> int | None:
    return next((number for number, names in enumerate(LEVELS[package]) if within(module, *names)), None)


@pytest.mark.parametrize("package", LEVELS)
def test_a_module_imports_its_own_level_and_lower_ones(package: str) -> None:
    broken = []
    for each in ALL:
        if not within(each.module, package) or not within(each.name, package):
            continue
        if package == "agent" and within(each.module, "agent.host"):
            continue
        mine, theirs = level(package, each.module), level(package, each.name)
        if mine is not None and theirs is not None and theirs > mine:
            broken.append(str(each))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("package", LEVELS)
def test_every_module_has_a_level(package: str) -> None:
    without = {each.module for each in ALL if within(each.module, package) and level(package, each.module) is None}
    assert without <= {package}, sorted(without)


# room -> rooms that it must not import, although the levels would let it
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "agent.host.supervisor": ("agent.host.worker", "agent.host.engine", "agent.host.interfaces"),
    "agent.host.http": ("agent.host.engine",),
    "agent.host.sandbox": ("agent.host.engine",),
    "agent.host.engine": ("agent.host.http",),
    "fleet": ("agent",),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_rooms_that_must_not_know_each_other(name: str) -> None:
    broken = [str(each) for each in ALL if within(each.module, name) and within(each.name, *FORBIDDEN[name])]
    assert not broken, "\n".join(broken)


def test_no_circle_of_files() -> None:
    known = {each.module for each in ALL}
    graph: dict[str, set[str]] = {}
    for each in ALL:
        if each.at_load and each.name in known and each.name != each.module:
            graph.setdefault(each.module, set()).add(each.name)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


# library -> the modules that may import it
IMPORTERS: dict[str, tuple[str, ...]] = {
    "wasmtime": ("agent.host.engine",),
    "httptools": ("agent.host.http",),
    "pyseccomp": ("agent.host.sandbox",),
    "paho": ("agent.link.mqtt", "fleet.server.mqtt"),
    "systemd": ("agent.systemd",),
    "sqlite3": ("agent.host.keyvalue", "agent.update.store", "fleet.store"),
    "sqlite_utils": ("fleet.store.sqlite",),
    "amqtt": ("fleet.server.broker.embedded",),
    "httpx": ("fleet.client",),
    "prometheus_client": ("fleet.server.api.metrics",),
    "univers": ("fleet.evidence.query",),
    "packageurl": ("fleet.evidence.sbom",),
}


@pytest.mark.parametrize("library", IMPORTERS)
def test_one_importer_per_library(library: str) -> None:
    outside = [str(each) for each in ALL if within(each.name, library) and not within(each.module, *IMPORTERS[library])]
    assert not outside, "\n".join(outside)


def test_nobody_imports_a_command_or_a_test() -> None:
    broken = [
        str(each)
        for each in ALL
        if within(each.name, "tests")
        or (each.name.split(".")[0] in OURS and "cli" in each.name.split(".") and "cli" not in each.module.split("."))
    ]
    assert not broken, "\n".join(broken)


def test_package_files_hold_nothing_but_a_docstring() -> None:
    broken = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("__init__.py"):
            body = ast.parse(file.read_text()).body
            if any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body):
                broken.append(str(file.relative_to(ROOT)))
    assert not broken


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
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).is_file()]
