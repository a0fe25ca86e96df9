"""Tests with the lowest and the newest versions that pyproject.toml allows: `python -m deploy.dependency_bounds`.

For each Python and each of the two sets: a virtual environment of its own in the cache, everything installed, and the
tests of the server and the command line run in it. The lowest set is a constraint file made from pyproject.toml, with
each lower bound as the version; what those versions need in turn is the newest that pip finds. A Python that this
machine does not have is named and left out; fewer than one is a failure.
"""

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from deploy import debian

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.13")
SETS = ("lowest", "newest")
TESTS = ("tests/fleet/server", "tests/fleet/cli", "tests/signing")
NEWER_THAN_THE_LOWEST = ("tests/fleet/server/test_openapi_fuzz.py",)
"""Tests whose own tools need newer versions than the product does."""

EVERYWHERE = "not root and not board and not bench and not density and not nightly"


class BoundsError(Exception):
    """Something cannot be installed, or a test fails."""


def lowest() -> list[str]:
    """Return a line of a constraint file for each library that the product names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(line for extra in ("agent", "cli", "server") for line in extras[extra])]
    return sorted({_lowest(Requirement(line)) for line in named if not line.startswith(f"{project['name']}[")})


def _lowest(requirement: Requirement) -> str:
    for bound in requirement.specifier:
        if bound.operator in {">=", "==", "~="}:
            return f"{requirement.name}=={bound.version}"
    raise BoundsError(f"{requirement} has no lower bound in pyproject.toml")


def interpreter(version: str) -> str | None:
    """Return a Python of this version: from PATH, or one that pyenv has; None for none."""
    for program in _candidates(version):
        told = subprocess.run(
            [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if told.stdout.strip() == version:
            return program
    return None


def _candidates(version: str) -> Iterator[str]:
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        yield sys.executable
    found = shutil.which(f"python{version}")
    if found is not None:
        yield found
    pyenv = shutil.which("pyenv")
    if pyenv is not None:
        told = subprocess.run([pyenv, "prefix", version], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            yield str(Path(told.stdout.strip()) / "bin" / "python")


def environment(python: str, version: str, which: str) -> Path:
    """Make a virtual environment with one set of versions; returns its Python.

    Raises:
        BoundsError: something cannot be installed.
    """
    place = debian.cache_dir() / f"bounds-{version}-{which}"
    _run([python, "-m", "venv", "--clear", str(place)])
    inside = place / "bin" / "python"
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(lowest() if which == "lowest" else []) + "\n")
    pip = [str(inside), "-m", "pip", "install", "--quiet"]
    _run([*pip, "--upgrade", "pip>=25.1"])
    _run(
        [*pip, "--constraint", str(constraints), "--editable", f"{ROOT}[all]", "--group", f"{ROOT}/pyproject.toml:test"]
    )
    return inside


def check(python: str, version: str, which: str, tests: Sequence[str]) -> None:
    """Install one set of versions and run the tests.

    Raises:
        BoundsError: something cannot be installed, or a test fails.
    """
    inside = environment(python, version, which)
    ignored = [f"--ignore={path}" for path in NEWER_THAN_THE_LOWEST]
    _run([str(inside), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", EVERYWHERE, *ignored, *tests])


def _run(command: Sequence[str]) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise BoundsError(" ".join(command))


def main() -> int:
    """Run what the arguments choose; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dependency_bounds", description=__doc__)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions of Python (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=SETS, choices=SETS, dest="sets", help="(default: both)")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files or folders (default: %(default)s)")
    wished = parser.parse_args()
    failed: list[str] = []
    done = 0
    for version in wished.python:
        python = interpreter(version)
        if python is None:
            print(f"=== Python {version}: not on this machine, left out")
            continue
        for which in wished.sets:
            print(f"=== Python {version}, {which} versions", flush=True)
            done += 1
            try:
                check(python, version, which, wished.tests)
            except BoundsError as error:
                failed.append(f"Python {version}, {which}: {error}")
    for each in failed:
        print(f"failed: {each}", file=sys.stderr)
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
