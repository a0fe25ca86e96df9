"""Page of the interfaces, and the check that modules, versions, WIT packages and the adapter name the same.

    python -m agent.host.interfaces.page > docs/interfaces.md    check, and print the page
    python -m agent.host.interfaces.page --check                 check, the page included

Both need a source tree. The check exits with 1 and says what does not agree.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.host.engine import guest
from agent.host.interfaces import registry, standard
from agent.host.interfaces.package import Package
from fleet.component import served, wasi
from fleet.component.reader import package as package_of

ROOT: Final = Path(__file__).resolve().parents[3]
_PAGE: Final = "docs/interfaces.md"
_HEAD: Final = """\
# Interfaces

For component authors: what a component may import on a device, which grant that needs, its limits, and what is
counted. Anything else is refused by `fleet push`. Where an import needs a grant, that stands in the component's
[component.toml](component-toml.md#grants), and a namespace's ceiling, the device's owner and operators can take it
away.
A denied call counts as a denial in the instance's health, and the first one of each function is named in its log.

Examples are for `wit-bindgen` in Rust and `componentize-py` in Python. In Python a module of `wit_world.imports` has
the name of an interface, and the name of its package before that where two have the same: `wasi_keyvalue_store` beside
`wasi_config_store`. A whole program in both languages is in
[components/examples/sensor](../components/examples/sensor/README.md).

Made by `python -m agent.host.interfaces.page` from the modules in `agent/host/interfaces`.

"""
_PACKAGE: Final = re.compile(r"^package ([^@;\s]+)@([^;]+);", re.MULTILINE)
_BLOCK: Final = re.compile(r"^interface ([a-z0-9-]+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_FUNCTION: Final = re.compile(r"([a-z][a-z0-9-]*): (static )?func\(")
_RESOURCE: Final = re.compile(r"resource ([a-z0-9-]+) \{(.*?)^\s*\}", re.MULTILINE | re.DOTALL)


def packages() -> tuple[Package, ...]:
    """Return all packages, by name."""
    return tuple(sorted((*standard.PACKAGES, *registry.PACKAGES), key=lambda each: each.name))


def text() -> str:
    """Return the page."""
    return _HEAD + "\n".join("\n".join(_section(each)) for each in packages())


def _section(package: Package) -> Iterator[str]:
    yield f"## {package.name}\n"
    yield package.about + "\n"
    yield "| | |\n|---|---|"
    for name, versions in package.served.items():
        said = "every release of 0.2" if versions == ("0.2",) else ", ".join(f"`{each}`" for each in versions)
        yield f"| `{name}` | {said} |"
    yield f"| grant | {package.grant} |"
    for name, said in package.limits.items():
        yield f"| limit: {name} | {said} |"
    for name, said in package.counters.items():
        yield f"| counted: {name} | {said} |"
    yield ""
    for language, example in (("rust", package.rust), ("python", package.python)):
        if example:
            yield f"```{language}\n{example}\n```\n"


def faults(root: Path = ROOT) -> list[str]:
    """Return in sentences what does not agree with the modules."""
    table = {name: versions for each in packages() for name, versions in each.served.items()}
    lists = tomllib.loads((root / "components/wit/versions.toml").read_text(encoding="utf-8"))
    found = [f"versions.toml: {said}" for said in _differences(table, lists["imports"])]
    found += [f"fleet/component: {said}" for said in _of_the_toolkit(table)]
    for path in sorted(root.glob("components/wit/deps/*/*.wit")):
        where = path.relative_to(root)
        found += [f"{where}: {said}" for said in _of_wit(path.read_text(encoding="utf-8"), table | lists["exports"])]
    adapter = root / "components/adapter/wit"
    for path in sorted(adapter.glob("deps/*/*.wit")):
        name, version = _package(path.read_text(encoding="utf-8"))
        if name.startswith("wasi:") and not served.fits(version, *table.get(name, ("",))):
            found.append(f"{path.relative_to(root)}: {name}@{version} is not served")
    named = _functions((adapter / "adapter.wit").read_text(encoding="utf-8"))["host"]
    if named != set(guest.ADAPTERS_OWN):
        found.append(f"components/adapter/wit/adapter.wit: interface host: {sorted(named ^ set(guest.ADAPTERS_OWN))}")
    return found


def _differences(ours: dict[str, tuple[str, ...]], theirs: dict[str, list[str]]) -> Iterator[str]:
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = sorted(ours.get(name, ())), sorted(theirs.get(name, ()))
        if here != there:
            yield f"{name} has {there or 'nothing'}, the modules have {here or 'nothing'}"


def _of_the_toolkit(table: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Compare with what authors' and servers' side takes for served."""
    for name, allowed in served.IMPORTS.items():
        versions = table.get(name) or table.get(package_of(name))
        if versions is None:
            yield f"{name} is taken for served"
        elif (allowed != served.ANY) != (versions == ("0.2",)):
            yield f"{name} is taken for served in {allowed}, the modules have {versions}"
    for name in table:
        if name not in served.IMPORTS and name not in {package_of(each) for each in served.IMPORTS}:
            yield f"{name} is not taken for served"
    reported = {each.rpartition("@")[0] for each in wasi.SERVED}
    if reported != {package_of(name) for name in table}:
        yield f"hosts report {sorted(reported)}"


def _of_wit(wit: str, listed: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Compare a WIT package with the versions and the functions of the modules."""
    package, version = _package(wit)
    if listed.get(package) == ("0.2",) and version.startswith("0.2."):
        return  # the engine's own, whose releases are compatible
    for interface, functions in _functions(wit).items():
        name = f"{package}/{interface}"
        if version not in listed.get(name, ()):
            yield f"{name}@{version} is not listed"
        ours = registry.INTERFACES.get(name)
        if ours is not None and not functions <= set(ours.functions):
            yield f"{name}: the module lacks {sorted(functions - set(ours.functions))}"


def _package(wit: str) -> tuple[str, str]:
    found = _PACKAGE.search(wit)
    assert found is not None, "the WIT names no package"
    return found[1], found[2]


def _functions(wit: str) -> dict[str, set[str]]:
    """Return the functions of each interface, under the names that the linker knows them by."""
    plain = re.sub(r"//.*", "", wit)
    return {name: set(_members(body)) for name, body in _BLOCK.findall(plain)}


def _members(body: str) -> Iterator[str]:
    for resource, inner in _RESOURCE.findall(body):
        for name, static in _FUNCTION.findall(inner):
            yield f"[{'static' if static else 'method'}]{resource}.{name}"
    yield from (name for name, _ in _FUNCTION.findall(_RESOURCE.sub("", body)))


def main(arguments: list[str]) -> int:
    """Check; print the page unless told to check that, too. Returns the exit status."""
    page, wrong = ROOT / _PAGE, faults()
    if "--check" not in arguments:
        sys.stdout.write(text())
    elif not page.exists() or page.read_text(encoding="utf-8") != text():
        wrong.append(f"{_PAGE} is not what the modules say: run python -m agent.host.interfaces.page > {_PAGE}")
    sys.stderr.write("".join(f"{said}\n" for said in wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
