"""The WIT packages, the list of versions and the code name the same interfaces."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from agent.host.engine import runtime
from fleet.component import reader, wasi

WIT = Path(__file__).resolve().parents[2] / "components/wit"
VERSIONS = tomllib.loads((WIT / "versions.toml").read_text())


def test_every_interface_of_the_packages_is_listed_in_its_version():
    listed = VERSIONS["exports"] | VERSIONS["imports"]
    for path in WIT.glob("deps/*/*.wit"):
        text = path.read_text()
        package, version = re.search(r"^package ([^@;]+)@([^;]+);", text, re.MULTILINE).groups()
        for interface in re.findall(r"^interface ([a-z-]+) \{", text, re.MULTILINE):
            whole = listed.get(package) == ["0.2"] and version.startswith("0.2.")
            assert whole or version in listed[f"{package}/{interface}"], f"{package}/{interface} in {path}"


def test_every_package_that_a_package_names_is_here():
    """A directory that lacks one is no WIT for any toolchain, not even for worlds that do not need it."""
    texts = [path.read_text() for path in WIT.rglob("*.wit")]
    there = {name for text in texts for name in re.findall(r"^package ([^;]+);", text, re.MULTILINE)}
    uses = r"^ *(?:use|import|export|include) ([a-z-]+:[a-z-]+)/[a-z-]+@([0-9a-z.-]*[0-9a-z])"
    named = {f"{package}@{version}" for text in texts for package, version in re.findall(uses, text, re.MULTILINE)}
    assert len(named) > 3
    assert named <= there


def test_what_the_reader_and_the_host_know_is_listed():
    for known in (reader.HTTP_HANDLER, reader.HTTP_HEALTH, reader.SCHEDULE_TASK, wasi.HTTP_HANDLER):
        assert known in VERSIONS["exports"]
    assert {runtime.HANDLER, runtime.HEALTH, runtime.TASK} <= set(VERSIONS["exports"])
    assert {wasi.LOGGING, *wasi.CONFIG} <= set(VERSIONS["imports"])


def test_the_packages_are_valid_wit():
    if shutil.which("wasm-tools") is None:
        pytest.skip("wasm-tools is not on PATH")
    subprocess.run(["wasm-tools", "component", "wit", WIT], check=True, capture_output=True)
